"""The script's file and `sbatch`."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from mirai_ds.config.errors import UserError
from mirai_ds.submit.job import SlurmJob
from mirai_ds.submit.render import log_pattern, sbatch_command


class _RefusedError(UserError):
    """The job is not in the queue."""


def script_path(job: SlurmJob) -> Path:
    """RUN/jobs/NAME-TIMESTAMP.sbatch, numbered where it is taken."""
    stem = f"{job.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = Path(job.folder) / "jobs" / f"{stem}.sbatch", 1
    while path.exists():
        number += 1
        path = path.with_name(f"{stem}-{number}.sbatch")
    return path


def write_script(script: Path, text: str) -> list[Path]:
    """Write the script; Slurm opens the log beside it, so the folder must exist.  Returns what was made, the innermost
    first.  Raises UserError."""
    made = [script, *(folder for folder in script.parents if not folder.exists())]
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(text, encoding="utf-8")
    except OSError as error:
        _remove(made)
        raise UserError(f"{script}: cannot be written: {error.strerror}; choose another --run-dir") from None
    return made


def _remove(made: list[Path]) -> None:
    """The script and the folders made for it; what holds anything else by now stays."""
    with suppress(OSError):
        made[0].unlink(missing_ok=True)
        for folder in made[1:]:
            folder.rmdir()


def send(job: SlurmJob, script: Path, text: str) -> list[str]:
    """Write the script and submit it `job.chain` times, each after the one before; returns the job ids.

    Raises UserError with Slurm's reason in one line; what was submitted before that is named in it.  Where nothing was,
    nothing is left behind.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch: not found: Slurm's commands are not on this machine; submit from a login node, or look at the "
            "script with --dry-run"
        )
    made = write_script(script, text)
    ids: list[str] = []
    for _ in range(job.chain):
        command = sbatch_command(job, script, ids[-1] if ids else None)
        try:
            ids.append(_submit(command))
        except UserError as error:
            if not ids and isinstance(error, _RefusedError):
                _remove(made)
            before = f"; submitted before it: {', '.join(ids)} (scancel {' '.join(ids)})" if ids else ""
            raise UserError(f"{error}{before}") from None
    return ids


def _submit(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise _RefusedError(f"sbatch: {error.strerror}") from None
    if done.returncode != 0:
        lines = [re.sub(r"^sbatch: (error: )?", "", line).strip() for line in done.stderr.splitlines()]
        reason = "; ".join(dict.fromkeys(line for line in lines if line)) or f"exit code {done.returncode}"
        raise _RefusedError(f"sbatch refused the job: {reason}")
    match = re.fullmatch(r"([0-9]+)(;.*)?", done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "")
    if match is None:
        # It may be in the queue all the same, and needs its folder.
        raise UserError(f"sbatch gave no job id but {done.stdout.strip()[:80]!r}")
    return match[1]


def log_path(job: SlurmJob, job_id: str) -> str:
    """Where Slurm writes the log of `job_id`, quoted for the shell; of an array the tasks' pattern."""
    path = log_pattern(job).replace("%x", job.name).replace("%j", job_id).replace("%A_%a", job_id)
    if job.template == "array":  # outside of the quotes, which the star must be to mean all rows
        return f"{shlex.quote(path.removesuffix('.log'))}_*.log"
    return shlex.quote(path)
