"""Slurm's commands as small scripts that write down how they were called: job scripts run without Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

# What the ranks do is in $STUB/ranks, what squeue says of the job in $STUB/state.  As Slurm does, requeueing a job
# sends TERM to its script.
STUBS = {
    "srun": 'printf "%s\\0" "$@" >>"$STUB/srun.calls"; printf "\\1" >>"$STUB/srun.calls"; . "$STUB/ranks"',
    "scontrol": '[ "$1 $2" != "show hostnames" ] || { echo node1; echo node2; exit; }\n'
                '[ "$1 $2" != "show job" ] || { echo "Requeue=1 Restarts=$(cat "$STUB/restarts") A=0"; exit; }\n'
                'echo "$@" >>"$STUB/scontrol.calls"\n'
                '[ ! -e "$STUB/next-state" ] || mv "$STUB/next-state" "$STUB/state"\n'
                '[ ! -e "$STUB/no-requeue" ] || exit 1; kill -TERM $PPID',
    "squeue": 'cat "$STUB/state"',
    "scancel": '[ ! -e "$STUB/no-step" ] || exit 1; echo "$@" >>"$STUB/scancel.calls"; : >"$STUB/signalled"',
    "sleep": 'case $1 in 120) exec /bin/sleep 120 ;; *) exec /bin/sleep 0.01 ;; esac',
}  # fmt: skip


@dataclass
class Ran:
    """A job script that has ended."""

    code: int
    out: str
    ranks: list[list[str]]
    requeued: list[str]
    cancelled: list[str]


class FakeSlurm:
    """A folder with stubs, and what they wrote down."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        for name, body in STUBS.items():
            path = folder / "bin" / name
            path.write_text(f"#!/bin/bash\n{body}\n")
            path.chmod(0o755)
        self.set()

    def set(self, ranks: str = "", state: str = "RUNNING None", requeue_works: bool = True) -> None:
        """What the ranks do (shell; they may write $MIRAI_DS_OUTCOME) and what squeue says; forgets earlier calls."""
        for path in self.folder.iterdir():
            if path.is_file():
                path.unlink()
        (self.folder / "ranks").write_text(ranks + "\n")
        (self.folder / "state").write_text(state + "\n")
        if not requeue_works:
            (self.folder / "no-requeue").touch()

    def run(self, script: str, restart: int = 0, job: int = 7, array_task: int | None = None,
            send: tuple[signal.Signals, ...] = (), inherited: int = 2) -> Ran:  # fmt: skip
        """Run a job script; `send` are signals it gets while its ranks run (they must touch $STUB/running).

        inherited: the restarts of the job that this one was sent from; Slurm sets the variable from the second on.
        """
        (self.folder / "restarts").write_text(f"{restart}\n")
        path = self.folder / "job.sbatch"
        path.write_text(script, encoding="utf-8")
        env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MIRAI_DS"))}
        env |= {"STUB": str(self.folder), "SLURM_JOB_ID": str(job), "SLURM_JOB_NODELIST": "node[1-2]",
                "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2", "SLURM_CPUS_PER_TASK": "3"}  # fmt: skip
        env |= {"SLURM_RESTART_COUNT": str(restart or inherited)}
        # A job that is submitted from within an array inherits its variables.
        array = (3, 1) if array_task is None else (job, array_task)
        env |= {"SLURM_ARRAY_JOB_ID": str(array[0]), "SLURM_ARRAY_TASK_ID": str(array[1])}
        env["PATH"] = f"{self.folder}/bin:{env['PATH']}"
        process = subprocess.Popen(
            ["bash", str(path)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for number in send:
            end = time.monotonic() + 20
            while not (self.folder / "running").exists():
                assert time.monotonic() < end
                time.sleep(0.01)
            process.send_signal(number)
        out, _ = process.communicate(timeout=60)
        return Ran(process.returncode, out, self._ranks(), self._lines("scontrol"), self._lines("scancel"))

    def _lines(self, name: str) -> list[str]:
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def _ranks(self) -> list[list[str]]:
        path = self.folder / "srun.calls"
        calls = path.read_text(encoding="utf-8").split("\1")[:-1] if path.exists() else []
        return [call.split("\0")[:-1] for call in calls]
