"""What compiles the fused operations: compilers, flags, where torch's and CUDA's headers are.  Imports no torch at the
top: the doctor and a wheel's build ask without it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# One library for every A100 (and, by binary compatibility, A40, L40, RTX 30 and 40) and H100 of a cluster; newer
# devices compile the PTX of the last one when they load it.
CUDA_ARCHITECTURES = ("80", "90")
ARCH_LIST = "TORCH_CUDA_ARCH_LIST"  # torch's own variable for extensions: "8.0;9.0+PTX"

_X86_512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]
# torch's name of the vector unit it uses on this machine -> compiler flags for the same one.
_VECTOR_FLAGS = {"AVX512": _X86_512, "AVX2": ["-mavx2", "-mfma", "-mf16c"]}


def vector_unit() -> str:
    """The vector unit torch uses here: AVX512, AVX2 or, elsewhere, DEFAULT (ATEN_CPU_CAPABILITY lowers it)."""
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return capability if capability in _VECTOR_FLAGS else "DEFAULT"


def host_compiler() -> str | None:
    """$CXX, else c++ or g++ or clang++, whichever is there."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def nvcc_path() -> str | None:
    """$CUDA_HOME's nvcc, else the one on the PATH."""
    home = os.environ.get("CUDA_HOME")
    inside = str(Path(home) / "bin" / "nvcc") if home else None
    return inside if inside and os.access(inside, os.X_OK) else shutil.which("nvcc")


def cuda_home(nvcc: str) -> Path | None:
    """The folder that really holds include/ and lib64/: `nvcc` may be a link or a wrapper script, so the compiler
    itself is asked where it is."""
    match = re.search(r"_HERE_=(\S+)", output_of([nvcc, "--dryrun", "-c", "none.cu"]))
    homes = [Path(match[1]).resolve().parent] if match else []
    homes.append(Path(nvcc).resolve().parents[1])
    return next((home for home in homes if (home / "include" / "cuda_runtime.h").is_file()), None)


def cuda_release(nvcc: str) -> str | None:
    """nvcc's release, such as 13.0."""
    match = re.search(r"release (\d+\.\d+)", output_of([nvcc, "--version"]))
    return match[1] if match else None


def output_of(command: list[str]) -> str:
    """What a command prints on both streams; empty when it cannot run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout + done.stderr


def torch_folder() -> Path:
    """The installed torch package."""
    import torch

    return Path(torch.__file__).parent


def host_flags(target: str) -> list[str]:
    """Flags of the C++ compiler that decide what a `target` library computes; no paths (they are no part of a hash)."""
    import torch

    flags = ["-std=c++20", "-O3", "-fPIC", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    if target == "cuda":
        return flags
    unit = vector_unit()
    return [*flags, "-fopenmp", f"-DCPU_CAPABILITY={unit}", f"-DCPU_CAPABILITY_{unit}", *_VECTOR_FLAGS.get(unit, [])]


class BuildError(RuntimeError):
    """A library that cannot be compiled here: the message says why and what helps."""


@dataclass(frozen=True)
class Architectures:
    """What a CUDA library is compiled for: compute capabilities, such as 80, as machine code and as PTX."""

    machine_code: tuple[str, ...]
    ptx: tuple[str, ...]

    def run_on(self, capability: tuple[int, int]) -> bool:
        """Whether a device of this compute capability can run the library: machine code of its major version and at
        most its minor one, or PTX of at most its capability."""
        major, minor = capability
        same_major = any(int(n) // 10 == major and int(n) % 10 <= minor for n in self.machine_code)
        return same_major or any(int(n) <= 10 * major + minor for n in self.ptx)

    def __str__(self) -> str:
        return ", ".join([*(f"sm_{number}" for number in self.machine_code), *(f"PTX {number}" for number in self.ptx)])


def architectures() -> Architectures:
    """$TORCH_CUDA_ARCH_LIST where it is set, else CUDA_ARCHITECTURES and whatever the GPUs of this machine need beside.

    Raises BuildError for a list that cannot be read.
    """
    if listed := os.environ.get(ARCH_LIST):
        return read_arch_list(listed)
    usual = Architectures(CUDA_ARCHITECTURES, CUDA_ARCHITECTURES[-1:])
    more = {f"{major}{minor}" for major, minor in device_capabilities() if not usual.run_on((major, minor))}
    return Architectures((*sorted(more), *usual.machine_code), usual.ptx)


def read_arch_list(text: str) -> Architectures:
    """Of a list such as `8.0;8.6 9.0+PTX`, as torch's extensions read it (without names such as Ampere).

    Raises BuildError naming the entry that is none.
    """
    machine_code, ptx = [], []
    for entry in re.split(r"[;,\s]+", text.strip("; ,")):
        parts = re.fullmatch(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", entry)
        if parts is None:
            raise BuildError(f"{ARCH_LIST} = {text!r}: {entry!r} is no compute capability; write such as 8.0;9.0+PTX")
        number = parts[1] + parts[2]
        machine_code.append(number)
        ptx += [number] if parts[4] else []
    return Architectures(tuple(dict.fromkeys(machine_code)), tuple(dict.fromkeys(ptx)))


def read_arch_names(names: Iterable[str]) -> Architectures:
    """Of names as torch.cuda.get_arch_list() gives them: sm_80 is machine code, compute_90 is PTX."""
    numbers = [re.fullmatch(r"(sm|compute)_(\d+)[a-z]?", name) for name in names]
    pairs = [(match[1], match[2]) for match in numbers if match]
    return Architectures(*(tuple(n for kind, n in pairs if kind == wanted) for wanted in ("sm", "compute")))


def device_capabilities() -> set[tuple[int, int]]:
    """Compute capabilities of the GPUs that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return set()
    return {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}


def device_flags() -> list[str]:
    """Flags of nvcc.  Raises BuildError as `architectures` does."""
    chosen = architectures()
    flags = ["-std=c++20", "-O3", "-Xcompiler", "-fPIC", "-Xptxas", "-v"]
    flags += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in chosen.machine_code]
    return [*flags, *(f"-gencode=arch=compute_{number},code=compute_{number}" for number in chosen.ptx)]
