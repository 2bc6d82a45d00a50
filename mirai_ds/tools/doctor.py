"""What this machine can do for a run, in words."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from mirai_ds.config import UserError
from mirai_ds.runtime.environment import cpu_name, package_versions


def examine() -> tuple[list[str], bool]:
    """Lines of a report, and whether training can work here."""
    import torch

    from mirai_ds.engine.start import check_version

    lines, healthy = [], True
    versions = package_versions()
    missing = [name for name, version in versions.items() if version == "missing"]
    lines.append("packages    " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    if missing:
        lines.append(f"  PROBLEM   not installed: {', '.join(missing)}; run pip install -e .")
        healthy = False
    elif not _deepspeed_ok(versions["deepspeed"], check_version, lines):
        healthy = False
    if tuple(int(p) for p in versions["torch"].split("+")[0].split(".")[:2] if p.isdigit()) < (2, 8):
        lines.append(f"  PROBLEM   torch {versions['torch']}: 2.8 or newer is needed")
        healthy = False
    flags = cpu_flags()
    fast = sorted(flags & {"avx512_bf16", "amx_bf16"})
    lines.append(f"cpu         {cpu_name()}, {len(os.sched_getaffinity(0))} cores")
    advice = f"has {', '.join(fast)}: bf16 pays" if fast else "no bf16 instructions: use train.precision: fp32 on CPU"
    lines.append(f"            {advice}")
    lines += _gpu_lines(torch)
    lines.append(f"compiler    {_first_line(['c++', '--version']) or 'none: compiled CPU kernels cannot be built'}")
    lines.append(f"nvcc        {_nvcc()}")
    lines.append("alignment   reference (plain PyTorch)")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    lines.append(f"disk        {free:.0f} GiB free in {Path.cwd()}")
    lines.append(
        "verdict     " + ("ready to train" if healthy else "cannot train before the problems above are mended")
    )
    return lines, healthy


def _deepspeed_ok(version: str, check: object, lines: list[str]) -> bool:
    try:
        check(version)  # type: ignore[operator]
    except UserError as error:
        lines.append(f"  PROBLEM   {error}")
        return False
    return True


def cpu_flags() -> set[str]:
    """Instruction-set flags of this processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


def _gpu_lines(torch: object) -> list[str]:
    cuda = torch.cuda  # type: ignore[attr-defined]
    if not cuda.is_available():
        return ["gpu         none: ranks run on the CPU with gloo"]
    lines = []
    for i in range(cuda.device_count()):
        p = cuda.get_device_properties(i)
        lines.append(f"gpu         {p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}, NCCL")
    return lines


def _first_line(command: list[str]) -> str | None:
    return next(iter(_output(command).splitlines()), None) if shutil.which(command[0]) else None


def _nvcc() -> str:
    path = shutil.which("nvcc")
    if path is None:
        return "none: CUDA kernels cannot be built"
    version = _output([path, "--version"]).strip().splitlines()
    home = cuda_home(path)
    where = f"CUDA_HOME={home}" if home else "CUDA_HOME unknown: no folder with include/ beside it"
    return f"{path} ({version[-1] if version else 'unknown version'}), {where}"


def cuda_home(nvcc: str) -> Path | None:
    """The folder that really holds include/ and lib64/: `nvcc` may be a link or a wrapper script, so the compiler
    itself is asked where it is."""
    found = re.search(r"_HERE_=(\S+)", _output([nvcc, "--dryrun", "-c", "none.cu"]))
    homes = [Path(found[1]).resolve().parent] if found else []
    homes.append(Path(nvcc).resolve().parents[1])
    return next((home for home in homes if (home / "include" / "cuda_runtime.h").is_file()), None)


def _output(command: list[str]) -> str:
    """What a command prints on both streams; empty when it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout + done.stderr
