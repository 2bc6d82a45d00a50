"""Compiles the fused operations with ninja on first use.

A library lies in a folder named by a digest of everything that decides it (sources, flags, torch, CUDA, architecture),
so a stale one cannot be loaded.  One process a node compiles under a lock that the kernel of the operating system drops
when its owner dies; the others wait and say for whom.  The folder appears by a rename, whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from mirai_ds.kernels import toolchain
from mirai_ds.kernels.toolchain import BuildError

HERE = Path(__file__).resolve().parent
TARGETS = ("cpu", "cuda")
SOURCES = {
    "cpu": ("foresight_cosine/cpu.cpp",),
    "cuda": ("foresight_cosine/cuda.cu", "foresight_cosine/cuda_op.cpp"),
}
HEADERS = {
    "cpu": ("foresight_cosine/arguments.h", "foresight_cosine/head.h"),
    "cuda": ("foresight_cosine/arguments.h", "foresight_cosine/head.h", "foresight_cosine/launch.h"),
}
WAIT_SECONDS = 900.0
_ERRORS_SHOWN = 5


def say_on_stderr(message: str) -> None:
    """The default way to tell what takes so long."""
    print(f"mirai-ds: {message}", file=sys.stderr, flush=True)


def digest(target: str) -> str:
    """16 hex digits that change with anything that decides the compiled code of `target`."""
    import torch

    facts = {
        "flags": toolchain.host_flags(target) + (toolchain.device_flags() if target == "cuda" else []),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if target == "cuda" else None,
        "machine": platform.machine(),
        "system": platform.system(),
    }
    state = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(SOURCES[target] + HEADERS[target]):
        state.update(name.encode() + b"\0" + (HERE / name).read_bytes())
    return state.hexdigest()[:16]


def cache_folder() -> Path:
    """Where compiled libraries are kept: $MIRAI_DS_CACHE, else $XDG_CACHE_HOME or ~/.cache, /mirai_ds/kernels."""
    if own := os.environ.get("MIRAI_DS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mirai_ds" / "kernels"


def prebuilt_folder() -> Path:
    """Where libraries lie that were compiled ahead; nothing is written there: $MIRAI_DS_PREBUILT, else beside the
    sources, where a wheel has them."""
    return Path(os.environ.get("MIRAI_DS_PREBUILT") or HERE / "prebuilt")


def library_name(target: str) -> str:
    """File name of a target's library."""
    return f"mirai_{target}.so"


def find(target: str) -> Path | None:
    """The compiled library that fits this machine and these sources: compiled ahead, or in the cache."""
    key = digest(target)
    places = (prebuilt_folder(), cache_folder())
    return next((path for place in places if (path := place / key / library_name(target)).is_file()), None)


def library(target: str, say: Callable[[str], None] = say_on_stderr, wait_seconds: float = WAIT_SECONDS) -> Path:
    """The compiled library of `target`, compiled now if need be.  Raises BuildError."""
    return find(target) or build(target, cache_folder(), say, wait_seconds)


@dataclass(frozen=True)
class Steps:
    """The commands that make a library, for ninja."""

    compile: dict[str, tuple[str, ...]]  # suffix -> command; $in and $out are ninja's
    link: tuple[str, ...]


def steps(target: str) -> Steps:
    """Commands for `target` with this machine's compilers.  Raises BuildError when one is missing or does not fit."""
    compiler = toolchain.host_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler (c++, g++ or clang++, or $CXX): install one, e.g. apt-get install g++")
    torch_folder = toolchain.torch_folder()
    # -isystem: the warnings of torch's headers are not ours.
    includes = [f"-isystem{torch_folder / 'include'}", f"-isystem{torch_folder / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu"]
    host = (compiler, *toolchain.host_flags(target))
    shared = (*host, "-shared", "-Wl,-z,defs", "$in", "-o", "$out")  # a missing symbol fails here, not in a run
    if target == "cpu":
        return Steps({".cpp": (*host, *includes, "-c", "$in", "-o", "$out")}, (*shared, *libraries))
    nvcc, home = _cuda_toolkit()
    includes.append(f"-isystem{home / 'include'}")
    libraries += ["-lc10_cuda", f"-L{home / 'lib64'}", f"-L{home / 'lib'}", "-lcudart"]
    return Steps(
        {
            ".cpp": (*host, *includes, "-c", "$in", "-o", "$out"),
            ".cu": (nvcc, *toolchain.device_flags(), "-ccbin", compiler, "-c", "$in", "-o", "$out"),
        },
        (*shared, *libraries),
    )


def _cuda_toolkit() -> tuple[str, Path]:
    import torch

    nvcc = toolchain.nvcc_path()
    if nvcc is None:
        raise BuildError("no nvcc on the PATH or in $CUDA_HOME/bin: install the CUDA toolkit of torch's release")
    home = toolchain.cuda_home(nvcc)
    if home is None:
        raise BuildError(f"{nvcc}: no include/cuda_runtime.h beside it; set CUDA_HOME to a whole toolkit")
    release, wanted = toolchain.cuda_release(nvcc), torch.version.cuda
    if wanted is None:
        raise BuildError(f"torch {torch.__version__} is a build without CUDA: install torch with CUDA")
    if release is None or release.split(".")[0] != wanted.split(".")[0]:
        raise BuildError(f"{nvcc} is release {release}, torch was built with CUDA {wanted}: use a toolkit {wanted}")
    return nvcc, home


def build(target: str, place: Path, say: Callable[[str], None] = say_on_stderr, wait: float = WAIT_SECONDS) -> Path:
    """Compile `target` into `place`/<digest>/ unless it is there.  One process a node does it, others wait up to `wait`
    seconds.  Raises BuildError with the compiler's own words."""
    key = digest(target)
    finished = place / key / library_name(target)
    began = time.time()
    with _Lock(key, target, say, wait):
        if finished.is_file():
            return finished
        _same_failure(target, key, began)
        commands = steps(target)
        say(f"compiling the {target} kernels once for this machine, about half a minute ...")
        try:
            place.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(place, key)
            folder = Path(tempfile.mkdtemp(prefix=f"{key}.{socket.gethostname()}.", dir=place))
        except OSError as error:
            raise BuildError(f"{place}: cannot be written ({error.strerror}); set MIRAI_DS_CACHE") from None
        try:
            _run_ninja(target, commands, folder, key)
            _publish(folder, finished)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    say(f"compiled the {target} kernels in {time.time() - began:.0f} s: {finished}")
    return finished


def _run_ninja(target: str, commands: Steps, folder: Path, key: str) -> None:
    import ninja
    from ninja.ninja_syntax import Writer

    objects = []
    with (folder / "build.ninja").open("w", encoding="utf-8") as file:
        writer: Any = Writer(cast(Any, file), width=1000)  # its annotations are not what it takes
        for suffix, command in commands.compile.items():
            writer.rule(f"compile{suffix.replace('.', '_')}", " ".join(command))
        writer.rule("link", " ".join(commands.link))
        for name in SOURCES[target]:
            source = HERE / name
            objects.append(f"{source.name}.o")
            writer.build(objects[-1], f"compile{source.suffix.replace('.', '_')}", str(source))
        writer.build(library_name(target), "link", objects)
    try:
        done = subprocess.run(
            [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise BuildError(f"ninja cannot run ({error}): pip install ninja") from None
    (folder / "build.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode != 0:
        log = _state_folder() / f"{key}.failed"
        log.write_text(done.stdout + done.stderr, encoding="utf-8")
        raise BuildError(_why(target, done.stdout + done.stderr, log))


def _why(target: str, text: str, log: Path) -> str:
    """The compiler's first errors, and where the rest is."""
    lines = [line.strip() for line in text.splitlines() if re.search(r"\b(fatal )?error\b|cannot find|undefined", line)]
    lines = lines or [line.strip() for line in text.splitlines() if line.strip()][-_ERRORS_SHOWN:]
    shown = "\n  ".join(lines[:_ERRORS_SHOWN])
    return f"compiling the {target} kernels failed:\n  {shown}\n  everything the compiler said: {log}"


def _same_failure(target: str, key: str, began: float) -> None:
    """Whoever held the lock while this process waited may have failed: do not fail again, slowly, in every rank."""
    log = _state_folder() / f"{key}.failed"
    if log.is_file() and log.stat().st_mtime >= began:
        raise BuildError(_why(target, log.read_text(encoding="utf-8"), log))


def _publish(folder: Path, finished: Path) -> None:
    """Make `folder` appear as the finished one; another node sharing the file system may have been first."""
    for path in folder.iterdir():
        if path.suffix == ".o" or path.name.startswith(".ninja") or path.name == "build.ninja":
            path.unlink()
    folder.chmod(0o755)
    try:
        folder.rename(finished.parent)
    except OSError:
        if not finished.is_file():
            raise


def _remove_leftovers(place: Path, key: str) -> None:
    """Folders of builds of this node that were killed; nobody else builds here while the lock is held."""
    for path in place.glob(f"{key}.{socket.gethostname()}.*"):
        shutil.rmtree(path, ignore_errors=True)


def _state_folder() -> Path:
    """Locks and failure logs: on this node's own disk, where locking works whatever the home directory is on."""
    folder = Path(tempfile.gettempdir()) / f"mirai_ds-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


UNSAID_SECONDS = 1.0  # a shorter wait is not worth a line: another rank finds what is built, or that nothing can be


class _Lock:
    """Mutual exclusion of builds on one node.  The operating system frees it when its owner dies, however it dies, so
    there is no stale lock to recover from; the owner's name beside it is for those who wait."""

    def __init__(self, key: str, target: str, say: Callable[[str], None], wait: float) -> None:
        from filelock import FileLock

        self._path = _state_folder() / f"{key}.lock"
        self._owner = self._path.with_suffix(".owner")
        self._lock = FileLock(self._path)
        self._target, self._say, self._wait = target, say, wait

    def __enter__(self) -> _Lock:
        from filelock import Timeout

        soon = min(UNSAID_SECONDS, self._wait)
        try:
            self._lock.acquire(timeout=soon, poll_interval=0.05)
        except Timeout:
            self._say(f"waiting for {self._who()} to compile the {self._target} kernels ...")
            try:
                self._lock.acquire(timeout=self._wait - soon, poll_interval=0.1)
            except Timeout:
                raise BuildError(
                    f"{self._who()} holds the build lock {self._path} for more than {self._wait:.0f} s; end that "
                    "process, or build once beforehand: python -m mirai_ds.kernels.build"
                ) from None
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%H:%M:%S")}
        self._owner.write_text(json.dumps(owner), encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._owner.unlink(missing_ok=True)
        self._lock.release()

    def _who(self) -> str:
        for _ in range(10):  # it writes its name just after it has the lock
            try:
                owner = json.loads(self._owner.read_text(encoding="utf-8"))
                return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
            except (OSError, ValueError, KeyError):
                time.sleep(0.05)
        return "another process"


def main(argv: list[str]) -> int:
    """`python -m mirai_ds.kernels.build [cpu] [cuda] [--into FOLDER]`: build ahead of the first run.

    $TORCH_CUDA_ARCH_LIST says for which GPUs, $ATEN_CPU_CAPABILITY (default, avx2, avx512) for which vector unit; the
    machine that uses the libraries needs the same list, and MIRAI_DS_PREBUILT=FOLDER.
    """
    import argparse

    parser = argparse.ArgumentParser(prog="python -m mirai_ds.kernels.build", description=__doc__)
    parser.add_argument("targets", nargs="*", help="cpu, cuda; default: both where nvcc is present")
    parser.add_argument("--into", type=Path, help="folder instead of the cache, for MIRAI_DS_PREBUILT")
    args = parser.parse_args(argv)
    chosen = args.targets or [t for t in TARGETS if t == "cpu" or toolchain.nvcc_path()]
    wrong = [t for t in chosen if t not in TARGETS]
    if wrong:
        parser.error(f"unknown target {wrong[0]!r}: use cpu or cuda")
    try:
        for target in chosen:
            print((None if args.into else find(target)) or build(target, args.into or cache_folder()))
    except BuildError as error:
        say_on_stderr(f"error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
