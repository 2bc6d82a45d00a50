"""A run's checkpoints on disk: what there is, what is whole, where to resume.  Imports no torch: tools need it too."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirai_ds.config import RunConfig, UserError, build
from mirai_ds.runs import lock
from mirai_ds.runs.configuration import read_run_config
from mirai_ds.runtime.disk import digest_of_file, left_behind

FORMAT = 1
# Written before the first step: a start that failed on a mistake leaves only these, and may be repeated.
START_FILES = frozenset(
    {
        "config.yaml",
        "log.txt",
        "deepspeed.json",
        "environment.json",
        "starts.jsonl",
        "outcome",
        "stop",
        "jobs",
        "hang",
        lock.FOLDER,
    }
)
POINTER, MANIFEST, INFO = "latest", "manifest.json", "info.json"
RETIRED = frozenset({"samples_in_epoch"})  # fields of info.json that earlier versions wrote and nothing needs
READERS = 4  # digests at once: one core hashes slower than a disk reads


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds beside its tensors."""

    step: int
    global_batch_size: int
    seed: int
    world_size: int
    zero_stage: int
    precision: str
    method: str
    code: str
    applied_steps: int
    incarnation: int = 0  # which start wrote it (runs.lock)
    data: str = ""  # digest of codes and labels
    teacher: str = ""  # digest of a frozen teacher's weights
    batch_offset: int = 0  # batches left out by rollbacks: step s trains on batch s + offset
    log_bytes: int = -1  # length of metrics.jsonl at that moment
    metrics: dict[str, float] = field(default_factory=dict)  # measured at this step
    hooks: dict[str, Any] = field(default_factory=dict)  # what guards remember
    config: dict[str, Any] = field(default_factory=dict)  # the run's, as it was trained; empty: see RUN/config.yaml
    format: int = FORMAT


def folder_of(run: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return run / "checkpoints" / f"step-{step:08d}"


def list_steps(run: Path) -> list[int]:
    """Steps of the finished checkpoints of a run, oldest first (not yet verified)."""
    folder = run / "checkpoints"
    suffixes = [p.name.removeprefix("step-") for p in folder.glob("step-*") if p.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in suffixes if name.isdigit())


def half_done(run: Path) -> list[Path]:
    """Folders of saves and deletions that were killed on their way: nothing reads them."""
    return sorted(path for kind in ("partial", "deleted") for path in (run / "checkpoints").glob(f"step-*.{kind}-*"))


def read_info(folder: Path) -> CheckpointInfo:
    """What a checkpoint says of itself.  Raises OSError, ValueError, TypeError."""
    return info_of(json.loads((folder / INFO).read_text(encoding="utf-8")))


def info_of(data: dict[str, Any]) -> CheckpointInfo:
    """From JSON.  Raises TypeError for fields that are missing, or that this version does not know."""
    return CheckpointInfo(**{name: value for name, value in data.items() if name not in RETIRED})


def config_of(folder: Path, info: CheckpointInfo) -> RunConfig:
    """The configuration that a checkpoint's weights were trained with: its own, or (of an earlier version's) the run's.
    Raises UserError where neither can be read."""
    return build(info.config, str(folder / INFO)) if info.config else read_run_config(folder.parent.parent)


def check_sizes(folder: Path) -> CheckpointInfo:
    """The cheap part of `verify`: manifest, presence and sizes.  Raises UserError with what is wrong."""
    try:
        for name, entry in files_of(folder).items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                raise UserError(f"{folder / name}: {size} bytes, should be {entry['bytes']}")
        return read_info(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: not a whole checkpoint ({type(error).__name__}: {error})") from None


def verify(folder: Path) -> CheckpointInfo:
    """Check every file's size and digest; raises UserError with the reason when the checkpoint is not whole."""
    check_sizes(folder)
    try:
        files = files_of(folder)
        with ThreadPoolExecutor(READERS) as pool:
            for name, digest in zip(files, pool.map(lambda n: digest_of_file(folder / n), files), strict=True):
                if digest != files[name]["sha256"]:
                    raise UserError(f"{folder / name}: content differs from its digest")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: not a whole checkpoint ({type(error).__name__}: {error})") from None
    return check_sizes(folder)  # again: what was read just now had the right digests


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The manifest's files: name -> {bytes, sha256}.  Raises UserError for another format or a damaged manifest, and
    OSError or ValueError for one that cannot be read."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"), object_pairs_hook=_each_name_once)
    if manifest["format"] != FORMAT:
        raise UserError(f"{folder}: format {manifest['format']}, this version reads {FORMAT}")
    files: dict[str, dict[str, Any]] = manifest["files"]
    if INFO not in files or len(files) < 2:
        raise UserError(f"{folder}: not a whole checkpoint (its manifest lists no state)")
    for name in files:
        if Path(name).name != name:  # a checkpoint may come from elsewhere: nothing outside its folder is read
            raise UserError(f"{folder}: its manifest names {name!r}, which is not a file in it")
    return files


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One flipped bit makes two ranks' files of one name; JSON would keep the last, and the other go unchecked."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in the manifest")
    return found


def ignored_because(folder: Path, attempt: int) -> str:
    """Why a checkpoint is passed over that is whole, but of a branch of the run that was given up."""
    return f"{folder}: written by attempt {attempt} after a later attempt had resumed from an earlier step; ignored"


def is_valid(info: CheckpointInfo, valid: dict[int, float]) -> bool:
    """Whether the run still builds upon this checkpoint, by `lock.valid_attempts`."""
    return not valid or info.step <= valid.get(info.incarnation, -1)


def holds_a_run(run: Path) -> bool:
    """Whether there is anything in the folder but what a start writes before its first step."""
    if not run.is_dir():
        return run.exists()
    unfinished = set(left_behind(run / "*"))  # of a start that was killed while it wrote its first files
    return any(
        p.name not in START_FILES and not p.name.startswith("config.before-") and p not in unfinished
        for p in run.iterdir()
    )


def check_run_folder(run: Path, resume: str | None, fresh: bool = False) -> None:
    """Cheap checks before anything starts; raises UserError.

    A folder that holds a run is touched only to resume it or to set it aside.  `if-present` starts afresh only where no
    checkpoint was ever written: a run whose checkpoints are all broken is not silently begun again.
    """
    if resume is None and not fresh and holds_a_run(run):
        raise UserError(
            f"{run}: already holds a run; continue it with --resume auto, set it aside with --fresh, or choose another "
            "--run-dir"
        )
    if resume not in (None, "auto", "if-present") and not (resume or "").isdigit():
        raise UserError(f"--resume {resume}: use auto, if-present or the step of a checkpoint")
    if resume == "auto" and not list_steps(run):
        raise UserError(f"--resume auto: nothing to resume from in {run}: there is no checkpoint")


def find(run: Path, request: str) -> tuple[Path, CheckpointInfo, list[str]]:
    """The checkpoint to resume from, its info, and what was skipped on the way.

    request: `auto` (the newest that is whole) or a step number.  Raises UserError when there is none: a run that was
    asked to resume never starts afresh.
    """
    steps, valid = list_steps(run), lock.valid_attempts(lock.read_all(run))
    if request not in ("auto", "if-present"):
        if not request.isdigit() or int(request) not in steps:
            raise UserError(f"--resume {request}: {run} has checkpoints of steps {steps or 'none'}; give one or 'auto'")
        folder = folder_of(run, int(request))
        return folder, verify(folder), []
    skipped: list[str] = []
    for step in reversed(steps):
        folder = folder_of(run, step)
        try:
            info = verify(folder)
        except UserError as error:
            skipped.append(str(error))
            continue
        if is_valid(info, valid):
            return folder, info, skipped
        skipped.append(ignored_because(folder, info.incarnation))
    reason = f"; none of {len(skipped)} is whole: {skipped[0]}" if skipped else ": there is no checkpoint"
    raise UserError(f"--resume {request}: nothing to resume from in {run}{reason}")
