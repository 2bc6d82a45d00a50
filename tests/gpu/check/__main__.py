"""`python -m tests.gpu.check`: run slices, write results."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.gpu.check import slices as listed
from tests.gpu.check.facts import where
from tests.gpu.check.results import Results
from tests.gpu.check.running import Runner, told_command


def listing(pieces: list[listed.Slice], commands: bool) -> str:
    """What there is, with estimates; commands too when asked."""
    lines = []
    for piece in pieces:
        lines.append(f"{piece.number:3}  {piece.name}, about {piece.estimate:.0f} s")
        for step in piece.steps:
            condition = f", with {step.needs or step.variable}" if step.needs or step.variable else ""
            beside = f", beside the others of {step.group!r}" if step.group else ""
            lines.append(f"       {step.name}: {step.estimate:.0f} s, at most {step.limit:.0f} s{beside}{condition}")
            if commands:
                lines.append(f"         $ {told_command(step)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """0: nothing failed; 1: something did; 2: a mistake, or no GPU."""
    parser = argparse.ArgumentParser(prog="make gpu-check", description=__doc__)
    parser.add_argument("--slice", dest="which", default=os.environ.get("SLICE"), help="2, 1-3 or 1,4-6; default all")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-check-results"))
    parser.add_argument("--again", action="store_true", help="also steps that have passed on this card at this commit")
    parser.add_argument("--list", action="store_true", help="show the slices and run nothing")
    parser.add_argument("--dry-run", action="store_true", help="show the commands too and run nothing")
    args = parser.parse_args(argv)
    try:
        pieces = listed.chosen(args.which)
    except ValueError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    if args.list or args.dry_run:
        print(listing(pieces, args.dry_run))
        return 0
    about = where()
    if not about["card"]:
        print(f"gpu-check: torch {about['torch']} sees no GPU here; --list shows what would run", file=sys.stderr)
        return 2
    results = Results(args.out, about)
    print(", ".join(f"{name} {value}" for name, value in about.items() if value not in ("", False)), flush=True)
    good = Runner(results, args.again).run(pieces)
    print(f"\n{results.table()}\n\nresults: {args.out}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
