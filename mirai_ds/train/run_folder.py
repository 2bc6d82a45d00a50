"""A run's folder: taken by one start at a time, explaining itself from the first moment on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mirai_ds.checkpoint import store
from mirai_ds.config import RunConfig, UserError, dump
from mirai_ds.config.deepspeed_file import resolve
from mirai_ds.runs.lock import Attempt, RunLock, check_free, read_all, starts_without_progress
from mirai_ds.runs.outcome import NAME as OUTCOME
from mirai_ds.runs.outcome import Outcome
from mirai_ds.runtime.disk import left_behind, write_whole
from mirai_ds.runtime.distributed import World
from mirai_ds.runtime.environment import describe
from mirai_ds.runtime.launch import has_parent
from mirai_ds.runtime.signals import STOP_FILE


def open_run_folder(
    config: RunConfig,
    run: Path,
    world: World,
    resume: str | None,
    set_aside: Callable[[Path], None] | None,
    facts: dict[str, Any],
    outcome: Outcome,
) -> tuple[str | None, RunLock]:
    """Collective: the main rank takes the folder and writes what explains the run, with `facts` about this start.

    Returns the resume request to obey (`store.check_run_folder` says what is refused) and this rank's hold on the run.
    Raises UserError on every rank.
    """
    problem, mine = "", None
    if world.rank == 0:
        try:
            mine = _take(config, run, world.size, resume, set_aside, facts, outcome)
            if resume == "if-present" and not store.list_steps(run):
                resume = None
        except (UserError, OSError) as error:
            problem = str(error)
    said: list[Any] = [problem, resume, mine]
    dist.broadcast_object_list(said, src=0)
    problem, resume, mine = said
    if problem or mine is None:
        raise UserError(problem)
    run_lock = RunLock(run, mine, main=world.rank == 0)
    if world.rank != 0:
        outcome.in_run(run, run_lock.check)
    return resume, run_lock


def _take(
    config: RunConfig,
    run: Path,
    world_size: int,
    resume: str | None,
    set_aside: Callable[[Path], None] | None,
    facts: dict[str, Any],
    outcome: Outcome,
) -> Attempt:
    store.check_run_folder(run, resume, fresh=set_aside is not None)
    if set_aside is not None and resume is None:
        check_free(run)
        set_aside(run)
    try:
        run.mkdir(parents=True, exist_ok=True)
        run_lock = RunLock.take(run)
        for path in left_behind(run / "*"):
            path.unlink(missing_ok=True)
        mine = run_lock.mine
        outcome.in_run(run, run_lock.check)
        (run / OUTCOME).unlink(missing_ok=True)
        if not has_parent():  # else the file may be what the parent just asked for
            (run / STOP_FILE).unlink(missing_ok=True)
        if resume == "if-present":
            _check_progress(run, config.guard.max_restarts)
        _explain(config, run, world_size, {"incarnation": mine.number, **facts})
    except OSError as error:
        raise UserError(f"{run}: cannot be written ({error})") from None
    return mine


def _check_progress(run: Path, most: int) -> None:
    """A scheduler requeues for ever: after `most` starts in a row that died where they began, somebody must look."""
    newest = max(store.list_steps(run), default=0)
    if starts_without_progress(read_all(run)[:-1], newest) >= most:
        raise UserError(
            f"{run}: the last {most} starts died without getting to a checkpoint after step {newest}; find out why, "
            "then continue with --resume auto"
        )


def _explain(config: RunConfig, run: Path, world_size: int, facts: dict[str, Any]) -> None:
    ds_config = resolve(config, world_size)
    try:
        run.mkdir(parents=True, exist_ok=True)
        path, text = run / "config.yaml", dump(config)
        if path.exists() and path.read_text(encoding="utf-8") != text:  # a resume with other settings keeps both
            path.rename(run / f"config.before-{int(time.time())}.yaml")
        write_whole(path, text)
        write_whole(run / "deepspeed.json", json.dumps(ds_config, indent=2) + "\n")
        environment = {**describe(world_size), **facts}
        write_whole(run / "environment.json", json.dumps(environment, indent=2) + "\n")
        with (run / "starts.jsonl").open("a", encoding="utf-8") as file:  # one line a start, resumes included
            file.write(json.dumps({"unix_time": int(time.time()), **environment}) + "\n")
    except OSError as error:
        raise UserError(f"{run}: cannot be written ({error})") from None
