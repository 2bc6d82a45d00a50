"""`python -m tests.mutations`: plant each fault of `faults.yaml`, say what catches it, exit 1 if one is missed."""

from __future__ import annotations

import argparse
import signal
import sys

from tests.mutations.planting import LIMIT_SECONDS, Fault, StaleListError, Verdict, check, innocent, judge, read_list


def main() -> None:
    """See the module.  Exit code 2 where the list is stale or the tests fail without a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults")
    parser.add_argument("--list", action="store_true", help="name the faults and what they would do; plant none")
    parser.add_argument("--all", action="store_true", help="the whole fast suite for what the expected tests miss")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, metavar="SECONDS", help="of one run of pytest")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the ends of blocks: no copy, no process is left
    try:
        faults = chosen(arguments.only)
        check(faults)
    except StaleListError as error:
        sys.exit(_told(f"tests/mutations/faults.yaml:\n{error}"))
    if arguments.list:
        for fault in faults:
            print(f"{fault.name} ({fault.file}): {fault.wrong}")
        return
    try:
        verdicts = plant_all(faults, arguments.all, arguments.limit)
    except RuntimeError as error:
        sys.exit(_told(str(error)))
    caught = [verdict for verdict in verdicts if verdict.caught]
    missed = [verdict.fault.name for verdict in verdicts if not verdict.caught]
    print(f"\n{len(caught)} of {len(verdicts)} faults caught; each test that caught one passes without a fault")
    print(f"missed: {', '.join(missed)}" if missed else "none missed")
    sys.exit(bool(missed))


def plant_all(faults: list[Fault], everything: bool, limit: float) -> list[Verdict]:
    """One after the other, each told when it is done; then the control.  Raises RuntimeError where that fails."""
    verdicts = []
    for number, fault in enumerate(faults, start=1):
        verdicts.append(judge(fault, everything, limit))
        print(f"{number}/{len(faults)} {line(verdicts[-1])}", flush=True)
    tests = [verdict.what for verdict in verdicts if verdict.caught]
    if failed := innocent(tests, limit) if tests else "":
        raise RuntimeError(f"without any fault there fails {failed}: what it caught means nothing")
    return verdicts


def chosen(names: list[str] | None) -> list[Fault]:
    """The faults of these names, all without any.  Raises StaleListError for a name that is none."""
    faults = read_list()
    unknown = set(names or ()) - {fault.name for fault in faults}
    if unknown:
        raise StaleListError(f"{', '.join(sorted(unknown))}: no such fault; see --list")
    return [fault for fault in faults if not names or fault.name in names]


def line(verdict: Verdict) -> str:
    """Of the table."""
    return f"{verdict.fault.name:50s} {verdict.seconds:5.0f} s  {verdict.what}"


def _told(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
