"""`make bundle`: the project and what it needs for a machine without a network, as one tar.

It holds the tracked and new files of this checkout, wheels of the releases in requirements-lock.txt, the project's own
wheel, compiled kernels, and a script:

    tar xf mirai-bundle.tar && bash mirai-bundle/install.sh VENV
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.offline.lock import read_lock
from tests.offline.packing import add_project, add_script, build, build_project, download, listed

NAME = "mirai-bundle"
# Published as sources only.
SOURCES_ONLY = ("deepspeed",)
# torch and what it brings along: 3 GB, and many machines have them.
_OF_TORCH = re.compile(r"torch|torchvision|triton|nvidia-.*|cuda-.*")
PARTS = {
    "libraries": "wheels of the other packages",
    "torch": "torch, torchvision and CUDA's libraries, about 3 GB",
    "kernels": "kernels compiled here, for the torch of this environment",
}


def pins(parts: list[str]) -> list[str]:
    """Of the lock, those that `parts` ask for, as pip reads them."""
    wanted = {True: "torch" in parts, False: "libraries" in parts}
    return [f"{name}=={version}" for name, version in read_lock().items() if wanted[bool(_OF_TORCH.fullmatch(name))]]


def collect(into: Path, python: str, parts: list[str]) -> list[Path]:
    """The wheels."""
    chosen = pins(parts)
    published = [pin for pin in chosen if pin.partition("==")[0] not in SOURCES_ONLY]
    if published:
        download(published, into, python)
    for pin in set(chosen) - set(published):
        build(pin, into)
    build_project(into)
    return sorted(into.glob("*.whl"))


def compile_kernels(into: Path) -> list[Path]:
    """Folders of libraries for the torch of this environment: of every x86-64 processor, and of GPUs where nvcc is."""
    from mirai_ds.kernels import toolchain

    command = [sys.executable, "-m", "mirai_ds.kernels.build", "--into", str(into)]
    for unit in ("default", "avx2", "avx512"):
        subprocess.run([*command, "cpu"], check=True, env={**os.environ, "ATEN_CPU_CAPABILITY": unit})
    if toolchain.nvcc_path() is not None:
        subprocess.run([*command, "cuda"], check=True)
    return sorted(into.iterdir())


def pack(out: Path, python: str, wheels: list[Path], libraries: list[Path]) -> None:
    """Write the tar."""
    script = Path(__file__).with_name("install.sh").read_text(encoding="utf-8").replace("@PYTHON@", python)
    with tarfile.open(out, "w") as archive:
        add_project(archive, f"{NAME}/project")
        for wheel in wheels:
            archive.add(wheel, f"{NAME}/wheels/{wheel.name}")
        for library in libraries:
            archive.add(library, f"{NAME}/kernels/{library.name}")
        add_script(archive, f"{NAME}/install.sh", script)


def main(argv: list[str] | None = None) -> int:
    """Collect, pack, say what it holds."""
    parser = argparse.ArgumentParser(prog="make bundle", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--python", default="3.11", help="of the other machine (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="; ".join(f"{k}: {v}" for k, v in PARTS.items())
                        + " (default: all)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("dist") / f"{NAME}.tar")
    args = parser.parse_args(argv)
    parts = [part for part in args.parts.split(",") if part]
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"--parts {unknown[0]}: use some of {', '.join(PARTS)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wheels = collect(Path(folder) / "wheels", args.python, parts)
        libraries = compile_kernels(Path(folder) / "kernels") if "kernels" in parts else []
        pack(args.out, args.python, wheels, libraries)
        print("\n".join(["wheels:", *listed(wheels), "kernels:", *(f"  {path.name}" for path in libraries)]))
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB for Python {args.python} on Linux (x86-64)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
