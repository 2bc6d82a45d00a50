"""`make gpu-bundle`: what a GPU machine lacks that has torch, but neither DeepSpeed nor a network, as one tar.

It holds the tracked and the new files of this checkout, wheels for the other machine's Python, the compiled CUDA
library where one fits the other machine's torch, and a script:

    tar xf mirai-gpu-bundle.tar && bash mirai-gpu-bundle/run-gpu-check.sh SLICES [FOLDER]
"""

from __future__ import annotations

import argparse
import re
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from tests.gpu.check.facts import commit
from tests.offline.packing import ROOT, add_project, add_script, build, download, listed, project_files

NAME = "mirai-gpu-bundle"
LIMIT = 60 * 2**20  # bytes: what may travel to such a machine is 64 MiB
DEEPSPEED = "deepspeed==0.19.8"
# DeepSpeed's own needs and this project's that such a machine lacks; torch, numpy, timm and pytest it has.
PURE = ("pydantic", "annotated-types", "typing-inspection", "typing-extensions", "hjson", "psutil", "einops", "rich",
        "py-cpuinfo", "torch-fidelity", "markdown-it-py", "mdurl", "pygments")  # fmt: skip
SCRIPT = """#!/usr/bin/env bash
# run-gpu-check.sh SLICES [FOLDER]: unpacks the wheels, links what an installation would, runs slices of the check.
# PYTHON names the interpreter (default python3); $OUT or FOLDER is where results go.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
site=$here/site
if [ ! -d "$site" ]; then
    "$python" - "$here/wheels" "$site.new" <<'EOF'
import pathlib, sys, zipfile
wheels, site = map(pathlib.Path, sys.argv[1:])
for wheel in sorted(wheels.glob("*.whl")):
    zipfile.ZipFile(wheel).extractall(site)
for extra in site.glob("*.data/purelib"):
    for path in extra.iterdir():
        path.rename(site / path.name)
EOF
    mv "$site.new" "$site"
fi
cd "$here/project"
for room in kernels ds_configs jobs; do
    [ -e "mirai_ds/$room" ] || ln -s "../$room" "mirai_ds/$room"
done
# Behind what the machine has: its own packages come first.
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
export PYTHONPATH="$here/project:$packages:$site${PYTHONPATH:+:$PYTHONPATH}"
export COMMIT=${COMMIT:-@COMMIT@}
export OUT=${2:-${OUT:-$here/gpu-check-results}}
exec "$python" -m tests.gpu.check --slice "${1:-all}"
"""


def collect_wheels(into: Path, python: str) -> list[Path]:
    """DeepSpeed as a pure wheel, the others as they are published for `python` on Linux."""
    build(DEEPSPEED, into)
    download(PURE, into, python)
    download([f"pydantic-core=={core_version(next(into.glob('pydantic-2*.whl')))}"], into, python)
    return sorted(into.glob("*.whl"))


def core_version(wheel: Path) -> str:
    """The one release of pydantic-core that this pydantic works with."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        found = re.search(r"^Requires-Dist: pydantic-core==([\w.]+)", archive.read(name).decode(), re.MULTILINE)
    if found is None:
        raise ValueError(f"{wheel.name} does not say which pydantic-core it needs")
    return found[1]


def cuda_library(wanted: str) -> tuple[Path | None, str]:
    """The compiled CUDA library's folder if it fits the torch that is wanted, and what to say about it."""
    import torch

    from mirai_ds.kernels import build

    if not torch.__version__.startswith(wanted):
        return (
            None,
            f"none: compiled here for torch {torch.__version__}, wanted is {wanted}: the first use compiles it there, "
            "if nvcc is there",
        )
    found = build.find("cuda")
    return (found.parent, f"for torch {torch.__version__}") if found else (None, "none: it was not compiled here")


def pack(out: Path, wheels: list[Path], library: Path | None) -> None:
    """Write the tar."""
    with tarfile.open(out, "w") as archive:
        add_project(archive, f"{NAME}/project")
        for wheel in wheels:
            archive.add(wheel, f"{NAME}/wheels/{wheel.name}")
        if library is not None:
            archive.add(library, f"{NAME}/project/kernels/prebuilt/{library.name}")
        add_script(archive, f"{NAME}/run-gpu-check.sh", SCRIPT.replace("@COMMIT@", commit()))


def main(argv: list[str] | None = None) -> int:
    """Collect, pack, say what it holds; 1 where it is too large to travel."""
    parser = argparse.ArgumentParser(prog="make gpu-bundle", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--python", default="3.12", help="of the other machine (default: %(default)s)")
    parser.add_argument("--torch", default="2.11", help="of the other machine, its beginning (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("gpu-bundle") / f"{NAME}.tar")
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    library, told = cuda_library(args.torch)
    with tempfile.TemporaryDirectory() as folder:
        wheels = collect_wheels(Path(folder), args.python)
        pack(args.out, wheels, library)
        names = listed(wheels)
    files = project_files()
    size = args.out.stat().st_size
    source = sum((ROOT / name).stat().st_size for name in files) / 2**20
    print("\n".join([
        "wheels:", *names, f"project: {len(files)} files, {source:.1f} MiB, commit {commit()}",
        f"CUDA library: {told}", f"{args.out}: {size / 2**20:.1f} MiB of at most {LIMIT / 2**20:.0f}",
    ]))  # fmt: skip
    if size > LIMIT:
        print("error: too large to travel", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
