"""Runs Python on a fake GPU.

python -m tests.gpu.rehearsal -- pytest -m gpu tests/gpu
python -m tests.gpu.rehearsal --gpus 2 -- -m mirai_ds train digits-mirai-e --ranks 2
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.gpu.rehearsal.build import Unavailable, fake_cuda
from tests.gpu.rehearsal.environment import fake_environment


def main(argv: list[str]) -> int:
    """Returns the exit code of what was run; 3 where there can be no fake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gpus", type=int, default=1, help="devices that exist (CUDA_VISIBLE_DEVICES chooses among them)"
    )
    parser.add_argument("--capability", type=int, choices=(80, 90), default=90, help="an A100 or an H100")
    parser.add_argument("--memory-gb", type=float, default=80, help="of each device")
    parser.add_argument(
        "--values", default="all", help="all, none, or elements above which an operator is not computed"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- PYTHON_ARGUMENTS")
    args = parser.parse_args(argv)
    given = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    if given[:1] == ["pytest"]:
        given = ["-m", *given]
    built = fake_cuda()
    if isinstance(built, Unavailable):
        print(f"no fake GPU here: {built.reason}", file=sys.stderr)
        return 3
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    with fake_environment(
        Path(built), gpus=args.gpus, capability=args.capability, memory_gb=args.memory_gb, values=args.values
    ) as env:
        if chosen is not None:
            env["CUDA_VISIBLE_DEVICES"] = chosen
        return subprocess.run([sys.executable, *given], env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
