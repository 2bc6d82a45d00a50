"""What this machine can do for a run, in words."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from mirai_ds.config import UserError
from mirai_ds.kernels import build, toolchain
from mirai_ds.kernels.toolchain import read_arch_names
from mirai_ds.runtime.distributed import unusable_because, use_cuda
from mirai_ds.runtime.environment import cpu_name, package_versions
from mirai_ds.runtime.launch import gpu_names
from mirai_ds.selfcheck.self_test import run_self_test


def examine(self_test: bool | None = None) -> tuple[list[str], bool]:
    """Lines of a report, and whether training can work here.

    self_test: also let every GPU (without any: two CPU ranks) compute; None: where there are GPUs.
    """
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
    gpu_lines, usable = _gpu_lines(torch)
    lines += gpu_lines
    healthy = healthy and usable
    lines.append(f"compiler    {_compiler()}")
    lines.append(f"nvcc        {_nvcc()}")
    lines += _kernel_lines(torch)
    lines += _shared_memory()
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    lines.append(f"disk        {free:.0f} GiB free in {Path.cwd()}")
    if healthy and (use_cuda() if self_test is None else self_test):
        tested, well = run_self_test()
        lines += tested
        healthy = well
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


def _gpu_lines(torch: Any) -> tuple[list[str], bool]:
    """The GPUs, what hinders torch or the launcher from using them, and whether nothing does."""
    names, problems = gpu_names(), []
    if not use_cuda():
        if not names:
            return ["gpu         none: ranks run on the CPU with gloo"], True
        return [f"gpu         {len(names)}, and torch can use none", f"  PROBLEM   {unusable_because()}"], False
    lines, known = [], torch.cuda.get_arch_list()
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        lines.append(f"gpu         {p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}, NCCL")
        compiled = read_arch_names(known)
        if known and not compiled.run_on((p.major, p.minor)):
            problems.append(f"torch {torch.__version__} is compiled for {compiled}, not for this sm_{p.major}{p.minor}")
    if not names:
        problems.append(
            "torch sees GPUs and `mirai-ds train` does not: no /dev/nvidia*, and no nvidia-smi to ask; start ranks by "
            "torchrun or srun"
        )
    elif names[0].startswith("MIG-"):
        lines.append("            a MIG slice: one rank, since NCCL does not connect slices")
    return lines + [f"  PROBLEM   {problem}" for problem in problems], not problems


def _shared_memory() -> list[str]:
    """Workers hand batches of images over in /dev/shm; containers often have 64 MiB of it and die of a bus error."""
    try:
        free = shutil.disk_usage("/dev/shm").free / 2**30
    except OSError:
        return ["shm         no /dev/shm: use data.workers: 0"]
    advice = "" if free >= 1 else "; too little for data.workers with images: docker run --shm-size 8g"
    return [f"shm         {free:.1f} GiB free in /dev/shm{advice}"]


def _compiler() -> str:
    path = toolchain.host_compiler()
    said = toolchain.output_of([path, "--version"]).splitlines() if path else []
    return f"{path} ({said[0] if said else 'unknown version'})" if path else "none: compiled kernels cannot be built"


def _nvcc() -> str:
    path = toolchain.nvcc_path()
    if path is None:
        return "none: CUDA kernels cannot be built"
    home = toolchain.cuda_home(path)
    where = f"CUDA_HOME={home}" if home else "CUDA_HOME unknown: no folder with include/ beside it"
    return f"{path} (release {toolchain.cuda_release(path) or 'unknown'}), {where}"


def _kernel_lines(torch: Any) -> list[str]:
    """What is compiled, for what, and what the alignment loss will run on."""
    lines = [
        f"kernels     cpu ({toolchain.vector_unit()}): {_built('cpu')[1]}",
        f"            cuda ({_architectures()}): {_built('cuda')[1]}",
    ]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = f"the compiled {device} kernel" if _built(device)[0] else "reference (plain PyTorch)"
    lines.append(f"alignment   kernel: auto will run {runs}")
    return lines


def _architectures() -> str:
    try:
        return str(toolchain.architectures())
    except build.BuildError:
        return "?"  # the build says why


def _built(target: str) -> tuple[bool, str]:
    """Whether a target can run, and what stands in the way or where it is."""
    try:
        path = build.find(target)
        if path is not None:
            return True, f"built, {path}"
        build.steps(target)
    except build.BuildError as error:
        return False, f"cannot be built: {error}"
    return True, f"not built yet; the first use builds it in {build.cache_folder()}"
