"""One rank of a training run: `deepspeed --module mirai_ds.train RECIPE ...`, under torchrun or srun as well.

An entry point, like the command line: it joins all rooms and nothing imports it.
"""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from mirai_ds.config import RunConfig, UserError, load
from mirai_ds.config.errors import LocalError
from mirai_ds.config.paths import absolute_paths
from mirai_ds.runs.lock import RunLock, RunTakenOverError
from mirai_ds.runs.outcome import EXIT_CODES, Outcome, Verdict
from mirai_ds.runtime.distributed import World, read_world
from mirai_ds.runtime.log import LOG, log_crash, log_into, start_log
from mirai_ds.runtime.signals import STOP, StopRequests
from mirai_ds.train.options import TrainOptions, train_options


def set_aside(run: Path) -> None:
    """Rename an earlier run of this name to the first free NAME.old-N; nothing is deleted."""
    if not run.exists():
        return
    number = 1
    while (aside := run.with_name(f"{run.name}.old-{number}")).exists():
        number += 1
    run.rename(aside)
    LOG.info("set the earlier run aside as %s", aside)


# errno values that a restart cannot fix: disk full, quota, permissions.
NOT_FIXED_BY_RESTART = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}


class RankStartup:
    """One start of a run on this rank, from joining the others to the outcome."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.outcome = Outcome()
        self.stop = StopRequests()
        self.stop.leave = self.leave
        self.run_lock: RunLock | None = None
        self.watchdog: Any = None

    def leave(self, reason: str) -> None:
        """End this process wherever it is; the earlier checkpoints are whole."""
        verdict: Verdict = "stopped" if self.stop.kind == STOP else "requeue"
        self.outcome.write_in_time(verdict, reason)
        LOG.error("%s; the last checkpoint stands", reason)
        os._exit(EXIT_CODES[verdict])

    def train(self, config: RunConfig, run: Path, resume: str | None, fresh: bool) -> tuple[str, str]:
        """Build the session, resume if asked, run the loop; the verdict."""
        from mirai_ds.runtime.distributed import local_device

        device = local_device(self.world)
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from mirai_ds.engine.start import start_process_group
        from mirai_ds.train.agree import agree_on_kernel, agree_on_start
        from mirai_ds.train.hooks.log import Sinks
        from mirai_ds.train.hooks.registry import build_hooks
        from mirai_ds.train.loop import run_loop
        from mirai_ds.train.run_folder import open_run_folder

        start_process_group(self.world, config.launch.timeout_minutes)
        agree_on_start(config, self.world, {"--run-dir": str(run), "--resume": resume, "--fresh": fresh})
        kernel = agree_on_kernel(config, device, self.world)
        facts = {"alignment_kernel": kernel}
        resume, run_lock = open_run_folder(
            config, run, self.world, resume, set_aside if fresh else None, facts, self.outcome
        )
        self.run_lock = run_lock
        self._stand_guard(config, run, run_lock)
        log_into(run, self.world.rank)
        if kernel is not None:
            LOG.info("alignment loss: %s kernel (foresight.kernel: %s)", kernel, config.foresight.kernel)
        session = self._session(config, run, device, run_lock, resume)
        sinks = Sinks()
        try:
            run_loop(session, build_hooks(config.hooks, sinks))
        finally:
            session.loader.close()
            session.checkpoints.saver.close()
            sinks.close()
            self.watchdog.close()
        assert session.ended is not None
        verdict, reason = session.ended
        session.control.barrier()  # nobody leaves before all are done: launchers end the others
        if self.world.rank == 0:
            run_lock.release(f"{verdict} {reason}")
            self.outcome.write(verdict, reason)
            if verdict != "finished":
                LOG.info("%s: %s", verdict, reason)
        session.control.barrier()
        return verdict, reason

    def _session(self, config: RunConfig, run: Path, device: Any, run_lock: RunLock, resume: str | None) -> Any:
        from mirai_ds.train.build import build_session
        from mirai_ds.train.preflight import preflight

        session = build_session(config, run, self.world, device, run_lock, self.stop)
        session.beat = self.watchdog.beat
        if config.guard.preflight:
            preflight(session)
        if resume is not None:
            session.beat("loading")
            session.checkpoints.resume(resume)
        else:
            run_lock.note_start(0, None)
        return session

    def _stand_guard(self, config: RunConfig, run: Path, run_lock: RunLock) -> None:
        from mirai_ds.runtime.watchdog import Watchdog

        self.stop.deadline_seconds = config.guard.stop_deadline_seconds
        self.stop.watch_file(run)
        if self.world.rank == 0:
            run_lock.watch()
        folder = run / "hang" / f"start-{run_lock.mine.number:05d}"
        self.watchdog = Watchdog(
            config.guard.hang_seconds, folder, self.world.rank, self.world.size,
            lambda text: self.outcome.write_in_time("requeue", f"hang: {text}"), config.guard.first_step_seconds,
        )  # fmt: skip


@click.command()
@train_options
@click.option("--local_rank", "--local-rank", type=int, hidden=True, expose_value=False)  # deepspeed's launcher adds it
def main(options: TrainOptions) -> None:
    """Be one rank of a run: `deepspeed --module mirai_ds.train RECIPE`; torchrun and srun likewise."""
    run_rank(options)


def run_rank(options: TrainOptions) -> None:
    """Exit code 2 and one line for a mistake of the user, 75 to be started again, 1 for anything unforeseen."""
    world = read_world() or World(0, 0, 1, 1)
    start_log(world.rank)
    start = RankStartup(world)
    start.stop.install()
    if world.rank == 0:
        start.outcome.clear_named()
    try:
        config = absolute_paths(load(options.recipe, options.overrides, options.deepspeed))
        run = options.run_dir or Path(config.output_dir) / config.name
        verdict, _ = start.train(config, run, options.resume, options.fresh)
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            if error.errno not in NOT_FIXED_BY_RESTART:
                crash(start, error)
            error = LocalError(
                f"{error.filename or 'the run folder'}: {error.strerror}; the earlier checkpoints are intact"
            )
        if not isinstance(error, RunTakenOverError):
            start.outcome.write("failed", str(error))
            if start.run_lock is not None and world.rank == 0:
                start.run_lock.release(f"failed {error}")
        _say_and_leave(error, world)
    except BaseException as error:
        crash(start, error)
    import torch.distributed as dist

    dist.destroy_process_group()
    if verdict != "finished":
        sys.stdout.flush()
        os._exit(EXIT_CODES[verdict])  # type: ignore[index]


def crash(start: RankStartup, error: BaseException) -> NoReturn:
    """Leave with the reason, to be started again."""
    rank = start.world.rank
    if lost_a_peer(error):
        LOG.error("rank %d: another rank is gone (%s)", rank, error)
        start.outcome.write("requeue", f"rank {rank} lost another rank")
    else:
        traceback.print_exception(error)
        log_crash(error)
        start.outcome.write("requeue", f"crashed: rank {rank}: {type(error).__name__}: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # not sys.exit: a process group with waiting peers would hang in its destructor


def lost_a_peer(error: BaseException) -> bool:
    """Whether a collective failed because another process ended; that one knows why."""
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        part in text
        for part in ("onnection reset by peer", "onnection closed by peer", "roken pipe", "emote process exited")
    )


def _say_and_leave(error: UserError, world: World) -> None:
    if world.rank == 0 or isinstance(error, (LocalError, RunTakenOverError)):
        LOG.error("%s", error)
    else:
        time.sleep(2)  # the launcher ends everybody at the first exit: let rank 0 speak
    sys.stdout.flush()
    os._exit(2)


if __name__ == "__main__":
    main(prog_name="python -m mirai_ds.train")
