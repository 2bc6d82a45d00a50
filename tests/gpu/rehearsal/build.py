"""Compiles the fake CUDA with the system's compiler, once for each state of its sources.

python -m tests.gpu.rehearsal.build        # where it lies, or why it cannot be
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mirai_ds.kernels import toolchain

SOURCES = Path(__file__).with_name("fake_cuda")
LIBRARY = "libmirai_fake_cuda.so"
# By Triton and torch, at run time; older Triton links to the first name.
OPENED_BY_NAME = ("libcuda.so", "libcuda.so.1", "libnvidia-ml.so.1")
NEEDED = ("cuda.h", "cuda_runtime_api.h", "crt/host_defines.h")  # the runtime's pip package lacks the last one
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-w")
SECONDS = 300
# What a generated function does, by the heading above its name in stubs.txt.
BODIES = {
    "succeed and do nothing": "int {name}() {{ return 0; }}",
    "make an object": "int {name}(void** made) {{ *made = calloc(1, 512); return 0; }}",
    "launch on the stream of the cuBLAS handle": (
        'int {name}(void* handle) {{ return fake_blas_launch(handle, "{name}"); }}'
    ),
    "stop the process: nothing here does their work": (
        'int {name}() {{ fputs("fake CUDA: {name} is not made here\\n", stderr); abort(); }}'
    ),
}


@dataclass(frozen=True)
class Unavailable:
    """Why there is no fake CUDA here."""

    reason: str


def fake_cuda() -> Path | Unavailable:
    """The folder with the library, compiled if it is not there yet, or why it cannot be."""
    if not sys.platform.startswith("linux"):
        return Unavailable(f"the fake is preloaded as Linux does it, and this is {sys.platform}")
    version = _cuda_of_torch()
    if isinstance(version, Unavailable):
        return version
    compiler = toolchain.host_compiler()
    if compiler is None:
        return Unavailable("no C++ compiler: neither $CXX nor c++, g++ or clang++ is there")
    headers = find_headers(version)
    if headers is None:
        return Unavailable(
            f"no CUDA headers: {', '.join(NEEDED)} are not together in $CUDA_HOME, beside nvcc, or in the pip packages "
            "nvidia and triton"
        )
    folder = cache_folder() / _digest(headers)
    if (folder / LIBRARY).exists():
        return folder
    return _compile(compiler, headers, folder)


def cache_folder() -> Path:
    """Where built fakes are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mirai_ds" / "rehearsal"


def find_headers(version: str) -> Path | None:
    """The folder of the CUDA headers; those of torch's own major version first."""
    found = [path for path in _header_folders() if all((path / name).is_file() for name in NEEDED)]
    major = version.split(".")[0]
    found.sort(key=lambda path: header_version(path) // 1000 != int(major))  # stable: the order of the search otherwise
    return found[0] if found else None


def header_version(headers: Path) -> int:
    """As CUDA writes it: 13000 is 13.0."""
    found = re.search(r"#define\s+CUDA_VERSION\s+(\d+)", (headers / "cuda.h").read_text(encoding="utf-8"))
    return int(found[1]) if found else 0


def _header_folders() -> Iterator[Path]:
    if os.environ.get("CUDA_HOME"):
        yield Path(os.environ["CUDA_HOME"]) / "include"
    nvcc = toolchain.nvcc_path()
    home = toolchain.cuda_home(nvcc) if nvcc is not None else None
    if home is not None:
        yield home / "include"
    for package, pattern in (("nvidia", "*/include"), ("triton", "backends/nvidia/include")):
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec is not None else []:
            yield from sorted(Path(place).glob(pattern), reverse=True)


def _cuda_of_torch() -> str | Unavailable:
    """The CUDA version that torch was built for, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return Unavailable("torch is not installed")
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", text, re.MULTILINE)
    return found[1] if found else Unavailable("this torch is built without CUDA")


def _digest(headers: Path) -> str:
    text = hashlib.sha256(repr((FLAGS, BODIES, OPENED_BY_NAME, header_version(headers))).encode())
    for path in sorted(SOURCES.iterdir()):
        text.update(path.name.encode() + path.read_bytes())
    return text.hexdigest()[:16]


def generated_stubs() -> str:
    """C++ of the functions that stubs.txt lists."""
    lines = ["#include <cstdio>", "#include <cstdlib>", 'extern "C" {', "int fake_blas_launch(void*, const char*);"]
    body = ""
    for line in (SOURCES / "stubs.txt").read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("["):
            body = BODIES[line.strip("[]")]
        elif line:
            lines.append(body.format(name=line))
    return "\n".join([*lines, "}", ""])


def _compile(compiler: str, headers: Path, folder: Path) -> Path | Unavailable:
    """Into a folder aside, renamed when it is whole: two processes may do this at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
    try:
        (aside / "stubs.cpp").write_text(generated_stubs(), encoding="utf-8")
        running = []
        for source in [*sorted(SOURCES.glob("*.cpp")), aside / "stubs.cpp"]:
            command = [compiler, *FLAGS, f"-I{headers}", f"-I{SOURCES}", "-c", str(source)]
            command += ["-o", str(aside / f"{source.stem}.o")]
            running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        errors = [process.communicate(timeout=SECONDS)[1] for process in running if process is not None]
        if any(process.returncode for process in running):
            return Unavailable("it does not compile: " + "".join(errors)[-2000:])
        command = [compiler, "-shared", "-Wl,-soname,libcuda.so.1", *map(str, sorted(aside.glob("*.o")))]
        command += ["-o", str(aside / LIBRARY), "-ldl", "-lpthread"]
        linked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
        if linked.returncode:
            return Unavailable("it does not link: " + linked.stderr[-2000:])
        for name in OPENED_BY_NAME:
            (aside / name).symlink_to(LIBRARY)
        for part in [*aside.glob("*.o"), aside / "stubs.cpp"]:
            part.unlink()
        aside.rename(folder)
    except OSError as error:
        if not (folder / LIBRARY).exists():  # else another process was faster
            return Unavailable(f"it cannot be built: {error}")
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


if __name__ == "__main__":
    result = fake_cuda()
    print(result if isinstance(result, Path) else f"no fake CUDA here: {result.reason}")
    sys.exit(isinstance(result, Unavailable))
