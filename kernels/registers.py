"""What the CUDA compiler made of each kernel: `python -m mirai_ds.kernels.registers`, on any machine with nvcc.

Registers beyond what the device has go to local memory, which is device memory: a kernel that spills pays for every row
with the traffic it was written to avoid.  Exit 1 when one does.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

from mirai_ds.kernels import build

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>[^']+)' for '(?P<arch>sm_\d+)'\n(?:(?!Compiling).*\n)*?"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r"(?:(?!Compiling).*\n)*?.*?Used (?P<registers>\d+) registers"
)


@dataclass(frozen=True)
class KernelUse:
    """One compiled kernel: bytes a thread of stack and spilled registers, and how many registers it has."""

    name: str
    arch: str
    registers: int
    stack: int
    spilled: int


def read_log(text: str) -> list[KernelUse]:
    """Every kernel in what `ptxas -v` said.  Raises ValueError when it lists kernels that cannot be read."""
    uses = [
        KernelUse(m["name"], m["arch"], int(m["registers"]), int(m["stack"]), int(m["stores"]) + int(m["loads"]))
        for m in _ENTRY.finditer(text)
    ]
    if len(uses) != text.count("Compiling entry function") or not uses:
        raise ValueError(f"{len(uses)} of {text.count('Compiling entry function')} kernels could be read from the log")
    return uses


def short_names(uses: list[KernelUse]) -> list[str]:
    """Names as written in the source, where the machine has c++filt."""
    mangled = "\n".join(use.name for use in uses)
    if shutil.which("c++filt"):
        mangled = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout
    names = [re.sub(r"^void |mirai::|\(anonymous namespace\)::|\(int\)", "", n) for n in mangled.splitlines()]
    return [n.split("(", 1)[0] for n in names]


def main() -> int:
    """Print the table; 1 when a kernel uses local memory, 2 when nothing could be compiled."""
    try:
        library = build.library("cuda")
    except build.BuildError as error:
        build.say_on_stderr(f"error: {error}")
        return 2
    uses = read_log((library.parent / "build.log").read_text(encoding="utf-8"))
    architectures = sorted({use.arch for use in uses})
    table: dict[str, dict[str, KernelUse]] = {}
    for name, use in zip(short_names(uses), uses, strict=True):
        table.setdefault(name, {})[use.arch] = use
    print(f"{'registers a thread':60}" + "".join(f"{arch:>8}" for arch in architectures))
    for name in sorted(table):
        print(
            f"{name:60}" + "".join(f"{table[name][a].registers if a in table[name] else '-':>8}" for a in architectures)
        )
    bad = [use for use in uses if use.stack or use.spilled]
    for name, use in zip(short_names(bad), bad, strict=True):
        print(f"LOCAL MEMORY {name} {use.arch}: stack {use.stack} bytes, spilled {use.spilled} bytes")
    print(f"{len(uses)} kernels for {', '.join(architectures)}: {len(bad)} use local memory or spill")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
