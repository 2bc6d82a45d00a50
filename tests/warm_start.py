"""The command line in processes forked from a warm one (`tests/warm.py`): imports are most of a short run's time.

All is as from a shell but for two things: modules are there before the first line, and in the place of DeepSpeed's
launcher this process forks the ranks, with the variables that it would set.  The launcher itself, and what a start
imports, have tests of their own (`tests/fault/test_early_deaths.py`, `tests/engine/test_startup.py`).
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

from tests.warm import warm_context


class Done(NamedTuple):
    """A finished process."""

    code: int
    out: str
    err: str


def warm_mirai_ds(
    *arguments: str, timeout: float = 300, env: dict[str, str] | None = None, cwd: Path | None = None
) -> Done:
    """`mirai-ds ARGUMENTS`.  env: added to this process's; cwd: the folder it is given in.  Raises TimeoutExpired."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        process = start_mirai_ds(arguments, files, env, cwd)
        process.join(timeout)
        with suppress(ProcessLookupError):  # ranks that outlive the command would be orphans
            assert process.pid is not None
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        out, err = (path.read_text(errors="replace") if path.exists() else "" for path in files)
        if process.exitcode == -signal.SIGKILL:
            raise subprocess.TimeoutExpired(["mirai-ds", *arguments], timeout, out, err)
        assert process.exitcode is not None
        return Done(process.exitcode, out, err)


def start_mirai_ds(
    arguments: Sequence[str], files: list[Path], env: dict[str, str] | None = None, cwd: Path | None = None
) -> ForkServerProcess:
    """The same, begun; what it says goes to two files."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_"))}
    given = (tuple(arguments), {**clean, **(env or {})}, str(cwd or Path.cwd()), [*map(str, files)])
    process = warm_context().Process(target=_command, args=given)
    process.start()
    return process


def _command(arguments: tuple[str, ...], env: dict[str, str], cwd: str, files: list[str]) -> None:
    os.setsid()
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.chdir(cwd)
    _take_over(env)
    sys.path[:0] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    from mirai_ds.runtime import launch

    cold = launch.launch
    launch.launch = lambda module, given, ranks, gpus, stop_file=None: (
        cold(module, given, ranks, gpus, stop_file) if gpus else _fork_ranks(module, given, ranks)
    )
    sys.argv = ["mirai-ds", *arguments]
    from mirai_ds.cli.main import main

    main()


def _take_over(env: dict[str, str]) -> None:
    """The environment, and what torch has read of it when it was imported."""
    import torch

    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))


def _fork_ranks(module: str, arguments: list[str], ranks: int) -> int:
    """`mirai_ds.runtime.launch.launch` on CPUs; when a rank fails the others are asked to end."""
    from mirai_ds.runtime.launch import free_port, launch_environment
    from mirai_ds.runtime.log import start_log
    from mirai_ds.runtime.processes import as_parent

    start_log()
    shared = {
        **launch_environment(ranks, 0), **as_parent(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "CROSS_RANK": "0", "CROSS_SIZE": "1",
    }  # fmt: skip
    sys.stdout.flush()
    left = {_fork_rank(module, arguments, {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(ranks)}
    code = 0
    while left:
        pid, status = os.wait()
        left.discard(pid)
        ended = os.waitstatus_to_exitcode(status)
        if ended and not code:
            code = ended % 256  # of a process that was killed: 256 less the signal
            for other in left:
                os.kill(other, signal.SIGTERM)
    return code


def _fork_rank(module: str, arguments: list[str], env: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code: Any = 1
    try:
        _take_over(env)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
