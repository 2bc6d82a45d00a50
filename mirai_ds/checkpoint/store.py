"""A run's checkpoints on disk: written aside, digested, renamed, pointer last; verified before they are loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mirai_ds.config import UserError
from mirai_ds.runtime.disk import digest_of_file, sync

FORMAT = 1
# Written before the first step: a start that failed on a mistake leaves only these, and may be repeated.
START_FILES = frozenset({"config.yaml", "deepspeed.json", "environment.json", "starts.jsonl"})
_POINTER, _MANIFEST, _PARTIAL = "latest", "manifest.json", ".partial"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint holds beside its tensors."""

    step: int
    global_batch_size: int
    seed: int
    samples_in_epoch: int
    world_size: int
    zero_stage: int
    precision: str
    method: str
    code: str
    applied_steps: int
    format: int = FORMAT


def folder_of(run: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return run / "checkpoints" / f"step-{step:08d}"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    sync(path)


def save(run: Path, info: CheckpointInfo, write_rank: Callable[[Path], Path], keep_last: int) -> Path:
    """Collective.  `write_rank(folder)` writes this rank's file and returns it.

    On any rank's failure every rank raises with the cause, and the earlier checkpoints are as they were.
    """
    import torch.distributed as dist  # here: the rest of this file is for tools that need no torch

    rank, target = dist.get_rank(), folder_of(run, info.step)
    partial = target.with_name(target.name + _PARTIAL)
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    report: tuple[str, str, int] | str
    try:
        path = write_rank(partial)
        sync(path)
        report = (path.name, digest_of_file(path), path.stat().st_size)
    except (OSError, RuntimeError, ValueError) as error:
        report = f"rank {rank}: {type(error).__name__}: {error}"
    reports: list[tuple[str, str, int] | str] = [""] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    failures = [r for r in reports if isinstance(r, str)]
    if not failures and rank == 0:
        try:
            _publish(partial, target, info, [r for r in reports if not isinstance(r, str)])
            _prune(run, keep_last)
        except OSError as error:
            failures = [f"rank 0: {type(error).__name__}: {error}"]
    outcome = [failures]
    dist.broadcast_object_list(outcome, src=0)
    failures = outcome[0]
    if failures:
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"checkpoint of step {info.step} could not be written ({failures[0]}); earlier ones are intact")
    return target


def _publish(partial: Path, target: Path, info: CheckpointInfo, files: list[tuple[str, str, int]]) -> None:
    _write_text(partial / "info.json", json.dumps(asdict(info), indent=1))
    entries = {name: {"sha256": sha, "bytes": size} for name, sha, size in files}
    path = partial / "info.json"
    entries[path.name] = {"sha256": digest_of_file(path), "bytes": path.stat().st_size}
    _write_text(partial / _MANIFEST, json.dumps({"format": FORMAT, "files": entries}, indent=1))
    sync(partial)
    replaced = target.with_name(target.name + ".replaced")
    if target.exists():  # the same step was saved before this resume; the new one takes its place
        os.rename(target, replaced)
    os.rename(partial, target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    pointer = target.parent / _POINTER
    _write_text(pointer.with_suffix(".new"), target.name)
    os.replace(pointer.with_suffix(".new"), pointer)
    sync(target.parent)


def _prune(run: Path, keep_last: int) -> None:
    for old in list_steps(run)[:-keep_last]:
        shutil.rmtree(folder_of(run, old), ignore_errors=True)


def list_steps(run: Path) -> list[int]:
    """Steps of the finished checkpoints of a run, oldest first (not yet verified)."""
    folder = run / "checkpoints"
    found = [p.name.removeprefix("step-") for p in folder.glob("step-*") if p.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in found if name.isdigit())


def verify(folder: Path) -> CheckpointInfo:
    """Check every file's size and digest; raises UserError with the reason when the checkpoint is not whole."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            raise UserError(f"{folder}: format {manifest['format']}, this version reads {FORMAT}")
        for name, entry in files.items():
            path = folder / name
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise UserError(f"{path}: {size} bytes, should be {entry['bytes']}")
            if digest_of_file(path) != entry["sha256"]:
                raise UserError(f"{path}: content differs from its digest")
        return CheckpointInfo(**json.loads((folder / "info.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: not a whole checkpoint ({type(error).__name__}: {error})") from None


def holds_a_run(run: Path) -> bool:
    """Whether there is anything in the folder but what a start writes before its first step."""
    if not run.is_dir():
        return run.exists()
    return any(p.name not in START_FILES and not p.name.startswith("config.before-") for p in run.iterdir())


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
    steps = list_steps(run)
    if request not in ("auto", "if-present"):
        if not request.isdigit() or int(request) not in steps:
            raise UserError(f"--resume {request}: {run} has checkpoints of steps {steps or 'none'}; give one or 'auto'")
        folder = folder_of(run, int(request))
        return folder, verify(folder), []
    skipped: list[str] = []
    for step in reversed(steps):
        folder = folder_of(run, step)
        try:
            return folder, verify(folder), skipped
        except UserError as error:
            skipped.append(str(error))
    reason = f"; none of {len(skipped)} is whole: {skipped[0]}" if skipped else ": there is no checkpoint"
    raise UserError(f"--resume {request}: nothing to resume from in {run}{reason}")
