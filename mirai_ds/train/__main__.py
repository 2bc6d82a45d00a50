"""One rank of a training run: `deepspeed --module mirai_ds.train RECIPE ...`, under torchrun or srun as well.

An entry point, like the command line: it joins all rooms and nothing imports it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from mirai_ds.config import RunConfig, UserError, load
from mirai_ds.config.errors import LocalError
from mirai_ds.runtime.distributed import World, read_world


def arguments(argv: list[str]) -> argparse.Namespace:
    """The options that `mirai-ds train` passes on; `--local_rank` comes from the deepspeed launcher."""
    parser = argparse.ArgumentParser(prog="python -m mirai_ds.train", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    parser.add_argument("--deepspeed", metavar="FILE")
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--resume", metavar="auto|if-present|STEP")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def set_aside(run: Path) -> None:
    """Rename an earlier run of this name to the first free NAME.old-N; nothing is deleted."""
    if not run.exists():
        return
    number = 1
    while (aside := run.with_name(f"{run.name}.old-{number}")).exists():
        number += 1
    run.rename(aside)
    print(f"mirai-ds: set the earlier run aside as {aside}", flush=True)


def train(config: RunConfig, run: Path, world: World, resume: str | None, fresh: bool) -> None:
    """Build the session, resume if asked, run the loop."""
    from mirai_ds.runtime.distributed import local_device

    device = local_device(world)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from mirai_ds.engine.start import start_process_group
    from mirai_ds.hooks import Sinks, default_hooks
    from mirai_ds.train.loop import run_loop
    from mirai_ds.train.session import agree_on_kernel, build_session, open_run_folder

    start_process_group(world, config.launch.timeout_minutes)
    kernel = agree_on_kernel(config, device, world)
    facts = {"alignment_kernel": kernel}
    resume = open_run_folder(config, run, world, resume, set_aside if fresh else None, facts)
    if kernel is not None and world.rank == 0:
        print(f"mirai-ds: alignment loss: {kernel} kernel (foresight.kernel: {config.foresight.kernel})", flush=True)
    session = build_session(config, run, world, device)
    if resume is not None:
        session.resume(resume)
    sinks = Sinks()
    try:
        run_loop(session, default_hooks(sinks))
    finally:
        session.loader.close()
        sinks.close()


def main(argv: list[str] | None = None) -> None:
    """Exit code 2 and one line for a mistake of the user."""
    args = arguments(sys.argv[1:] if argv is None else argv)
    world = read_world() or World(0, 0, 1, 1)
    try:
        config = load(args.recipe, args.overrides, args.deepspeed)
        run = args.run_dir or Path(config.output_dir) / config.name
        train(config, run, world, args.resume, args.fresh)
    except UserError as error:
        if world.rank == 0 or isinstance(error, LocalError):
            print(f"mirai-ds: error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # the launcher ends everybody at the first exit: let rank 0 speak
        sys.stdout.flush()
        os._exit(2)  # not sys.exit: a process group with waiting peers would hang in its destructor
    import torch.distributed as dist

    dist.destroy_process_group()


if __name__ == "__main__":
    main()
