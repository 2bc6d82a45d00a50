"""One rank of a training run: `deepspeed --module mirai_ds.train RECIPE ...`, under torchrun or srun as well.

An entry point, like the command line: it joins all rooms and nothing imports it.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from mirai_ds.config import RunConfig, UserError, load
from mirai_ds.config.errors import LocalError
from mirai_ds.config.paths import absolute_paths
from mirai_ds.runs.lock import RunTakenOverError
from mirai_ds.runs.outcome import EXIT_CODES, Outcome, Verdict
from mirai_ds.runtime.failures import lost_a_peer, mistake_behind
from mirai_ds.runtime.launcher import World, recognise
from mirai_ds.runtime.log import LOG, log_crash, log_into, start_log
from mirai_ds.runtime.peers import Peers, meet
from mirai_ds.runtime.processes import watch_starter
from mirai_ds.runtime.signals import NOTHING, STOP, STOP_FILE, STOP_FILE_VARIABLE, StopRequests
from mirai_ds.train.options import TrainOptions, train_options


class RankStartup:
    """One start of a run on this rank, from joining the others to the outcome."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.outcome = Outcome()
        self.stop = StopRequests()
        self.stop.leave = self.leave
        self.folder: Any = None  # a RunFolder, once there is one
        self.watchdog: Any = None
        self.peers: Peers | None = None
        self.steps_done: Callable[[], int] = lambda: 0  # by this start

    def leave(self, reason: str) -> None:
        """End this process wherever it is; the earlier checkpoints are whole."""
        verdict: Verdict = "stopped" if self.stop.kind == STOP else "requeue"
        self.outcome.write_in_time(verdict, reason)
        LOG.error("%s; the last checkpoint stands", reason)
        os._exit(EXIT_CODES[verdict])

    def abandon(self, reason: str) -> None:
        """Whoever started this rank is gone: save after the step, or leave at once where there is nothing to save."""
        if self.folder is not None and self.folder.accepted:
            self.stop.abandon(reason)
        else:
            self.leave(reason)

    def obey_early(self) -> None:
        """Leave if that was asked for already: the ranks that are waited for may have left for the same reason."""
        if self.stop.kind != NOTHING:
            self.leave(f"{self.stop.reason} before all ranks had started")

    def lost(self, text: str) -> None:
        """End this process, because another of the ranks has ended."""
        LOG.error("rank %d: %s", self.world.rank, text)
        self.outcome.write_in_time("requeue", f"rank {self.world.rank} lost another rank: {text}")
        os._exit(1)

    def train(self, config: RunConfig, run: Path, options: TrainOptions) -> tuple[str, str]:
        """Build the session, resume if asked, run the loop; the verdict."""
        from mirai_ds.runtime.distributed import export_world, local_device

        device = local_device(self.world)
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        export_world(self.world)
        # Before the imports, which take seconds.
        self.peers = meet(self.world, config.launch.timeout_minutes, self.lost, self.obey_early)
        from mirai_ds.engine.start import start_process_group
        from mirai_ds.train.agree import agree_on_kernel, agree_on_start
        from mirai_ds.train.hooks.log import Sinks
        from mirai_ds.train.hooks.registry import build_hooks
        from mirai_ds.train.loop import run_loop
        from mirai_ds.train.resume_rules import check_allowed
        from mirai_ds.train.run_folder import RunFolder

        start_process_group(self.world, config.launch.timeout_minutes)
        agree_on_start(config, self.world, {
            "--run-dir": str(run), "--resume": options.resume, "--fresh": options.fresh,
            "--allow-change": list(options.allow_change),
        })  # fmt: skip
        check_allowed(options.allow_change)
        kernel = agree_on_kernel(config, device, self.world)
        folder = self.folder = RunFolder.open(config, run, self.world, options.resume, options.fresh)
        self._stand_guard(config, folder)
        if kernel is not None:
            LOG.info("alignment loss: %s kernel (foresight.kernel: %s)", kernel, config.foresight.kernel)
        session = self._session(config, folder, device, options.allow_change)
        sinks = Sinks()
        hooks = build_hooks(config.hooks, sinks)
        for hook in hooks.values():
            hook.check(session)
        folder.accept(config, {"alignment_kernel": kernel})
        self._note_acceptance(folder)
        try:
            run_loop(session, hooks)
        finally:
            session.loader.close()
            session.checkpoints.saver.close()
            sinks.close()
            self.watchdog.close()
        assert session.ended is not None
        verdict, reason = session.ended
        if self.peers is not None:
            self.peers.close()
        session.control.barrier()  # nobody leaves before all are done: launchers end the others
        if self.world.rank == 0:
            folder.lock.release(f"{verdict} {reason}")
            self.outcome.write(verdict, reason)
            if verdict != "finished":
                LOG.info("%s: %s", verdict, reason)
        session.control.barrier()
        return verdict, reason

    def _session(self, config: RunConfig, folder: Any, device: Any, allowed: tuple[str, ...]) -> Any:
        from mirai_ds.train.build import build_session
        from mirai_ds.train.preflight import preflight
        from mirai_ds.train.staging import stage_data

        resuming = folder.resume is not None
        data = stage_data(config, self.world, self.watchdog.beat, self.obey_early)
        session = build_session(config, folder.run, self.world, device, folder.lock, self.stop, resuming, data)
        session.beat = self.watchdog.beat
        if config.guard.preflight:
            preflight(session)
        if resuming:
            session.beat("loading")
            session.checkpoints.resume(folder.resume, allowed)
        began = session.step
        self.steps_done = lambda: session.step - began
        return session

    def _stand_guard(self, config: RunConfig, folder: Any) -> None:
        from mirai_ds.runtime.watchdog import Watchdog

        self.stop.deadline_seconds = config.guard.stop_deadline_seconds
        if named := os.environ.get(STOP_FILE_VARIABLE):
            self.stop.watch_file(Path(named))
        if self.world.rank == 0:
            folder.lock.watch()
        self.watchdog = Watchdog(
            config.guard.hang_seconds, stacks_folder(folder), self.world.rank, self.world.size,
            lambda text: self.outcome.write_in_time("requeue", f"hang: {text}"), config.guard.first_step_seconds,
        )  # fmt: skip

    def _note_acceptance(self, folder: Any) -> None:
        """From now on what becomes of this start is told in the run's folder too, and a request to stop may lie
        there."""
        self.watchdog.folder = stacks_folder(folder)
        self.outcome.in_run(folder.run, folder.lock.check)
        self.stop.watch_file(folder.run / STOP_FILE)
        log_into(folder.run, self.world.rank)


def stacks_folder(folder: Any) -> Path:
    """Where a start writes the stacks of its ranks when it hangs."""
    return Path(folder.run) / "hang" / f"start-{folder.lock.mine.number:05d}"


@click.command()
@train_options
@click.option("--local_rank", "--local-rank", type=int, hidden=True, expose_value=False)  # deepspeed's launcher adds it
def main(options: TrainOptions) -> None:
    """Be one rank of a run: `deepspeed --module mirai_ds.train RECIPE`; torchrun and srun likewise."""
    run_rank(options)


def run_rank(options: TrainOptions) -> None:
    """Exit code 2 and one line for a mistake of the user, 75 to be started again, 1 for anything unforeseen."""
    found = recognise()
    world = found.world or World(0, 0, 1, 1)
    start_log(world.rank)
    for note in found.notes:
        LOG.warning("%s", note)
    here = f", {world.local_size} on this machine" if world.size > 1 else ""
    LOG.info("launcher: %s; %d rank%s%s", found.launcher, world.size, "s" * (world.size > 1), here)
    start = RankStartup(world)
    start.stop.install()
    watch_starter(start.abandon)
    if world.rank == 0:
        start.outcome.clear_named()
    try:
        config = absolute_paths(load(options.recipe, options.overrides, options.deepspeed))
        run = options.run_dir or Path(config.output_dir) / config.name
        verdict, _ = start.train(config, run, options)
    except BaseException as error:
        mistake = mistake_behind(error, start.steps_done())
        if mistake is None:
            crash(start, error)
        if not isinstance(mistake, RunTakenOverError):
            start.outcome.write("failed", str(mistake))
            if start.folder is not None:
                start.folder.refuse(str(mistake))
        if start.peers is not None:
            start.peers.close()
        _say_and_leave(mistake, world)
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
        if start.folder is not None and not start.folder.accepted:  # a crash while building: no mistake of the user
            log_into(start.folder.run, rank)
        log_crash(error)
        start.outcome.write("requeue", f"crashed: rank {rank}: {type(error).__name__}: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # not sys.exit: a process group with waiting peers would hang in its destructor


def _say_and_leave(error: UserError, world: World) -> None:
    if world.rank == 0 or isinstance(error, (LocalError, RunTakenOverError)):
        LOG.error("%s", error)
    else:
        time.sleep(2)  # the launcher ends everybody at the first exit: let rank 0 speak
    sys.stdout.flush()
    os._exit(2)


if __name__ == "__main__":
    main(prog_name="python -m mirai_ds.train")
