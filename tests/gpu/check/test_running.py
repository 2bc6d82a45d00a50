"""Slices run steps as processes: a step that fails, hangs or is asked to end stops no other, and nothing is lost."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.gpu.check import results as verdicts
from tests.gpu.check.facts import ROOT
from tests.gpu.check.native_rows import Row
from tests.gpu.check.results import LOG_BYTES, Results
from tests.gpu.check.running import Runner
from tests.gpu.check.slices import SLICE_SECONDS, SLICES, Slice, Step, chosen

ABOUT: Row = {"date": "2026-11-27", "card": "Card", "torch": "2.8.0", "commit": "0123abc", "fake": False}
ROW = '{"subject": "thing", "metric": "time", "value": 3, "unit": "ms"}'


def program(code: str) -> tuple[str, ...]:
    return ("{python}", "-c", code.replace("{", "{{").replace("}", "}}"))


def step(name: str, code: str, limit: float = 30, **others: str) -> Step:
    return Step(name, program(code), 1, limit, "lines", **others)  # type: ignore[arg-type]


GOOD = step("good", f"print('words'); print('{ROW}')")


def run(folder: Path, *steps: Step, about: Row = ABOUT, again: bool = False, seconds: float = 60) -> Results:
    results = Results(folder, about)
    results.good = Runner(results, again, seconds).run([Slice(1, "some", steps)])  # type: ignore[attr-defined]
    return results


def test_every_step_gets_its_verdict_and_the_others_go_on(tmp_path: Path) -> None:
    found = run(
        tmp_path, step("bad", f"print('{ROW}'); raise ValueError('no card')"),
        step("slow", "import time; time.sleep(60)", 1),
        step("absent", "", needs="no-such-program"), step("unasked", "", variable="MIRAI_NOT_SET"), GOOD,
    )  # fmt: skip
    told = {name: (s["verdict"], s["rows"]) for name, s in found.steps.items()}
    assert told == {
        "1 bad": ("failed", 1), "1 slow": ("killed", 0), "1 absent": ("skipped", 0), "1 unasked": ("skipped", 0),
        "1 good": ("passed", 1),
    }  # fmt: skip
    assert not found.good  # type: ignore[attr-defined]
    assert found.steps["1 bad"]["why"] == "exit code 1: ValueError: no card"
    assert found.steps["1 slow"]["why"] == "not done after 1 s"
    assert "no-such-program" in found.steps["1 absent"]["why"]


def test_what_comes_back(tmp_path: Path) -> None:
    """Four files: rows with their origin, a summary for people and one for programs, logs."""
    run(tmp_path, GOOD)
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "summary.txt", "rows.jsonl", "logs.tar"}
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert row["card"] == "Card"
    assert (row["subject"], row["metric"], row["value"], row["unit"]) == ("thing", "time", "3", "ms")
    assert row["slice"] == "1 some"
    assert row["command"].startswith("python -c ")
    assert row["fake"] is False
    summary = (tmp_path / "summary.txt").read_text(encoding="utf-8")
    assert summary.startswith("date 2026-11-27, card Card, torch 2.8.0, commit 0123abc\n")
    with tarfile.open(tmp_path / "logs.tar") as archive:
        member = archive.extractfile("1-good.log")
        assert member is not None
        assert b"words" in member.read()


def test_what_has_passed_is_not_run_again(tmp_path: Path) -> None:
    """Unless it is asked for, or the card or the commit is another; what failed is."""
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'a').write('x'); print('{ROW}')"
    broken = step("broken", code + "; raise SystemExit(3)")
    folder = tmp_path / "out"
    run(folder, step("counted", code))
    run(folder, step("counted", code))
    assert mark.read_text() == "x"
    run(folder, step("counted", code), again=True)
    run(folder, step("counted", code), about=ABOUT | {"commit": "4567def"})
    assert mark.read_text() == "xxx"
    assert len(Results(folder, ABOUT).rows()) == 1  # in place of the earlier ones
    run(folder, broken)
    run(folder, broken)
    assert mark.read_text() == "xxxxx"


def test_steps_of_a_group_run_side_by_side(tmp_path: Path) -> None:
    """Each waits for the other's file: one after the other they would not end."""

    def waiting(own: str, other: str) -> Step:
        code = (
            f"import pathlib, time; folder = pathlib.Path({str(tmp_path)!r}); (folder / '{own}').touch()\n"
            f"while not (folder / '{other}').exists(): time.sleep(0.01)"
        )
        return step(own, code, group="both")

    found = run(tmp_path / "out", waiting("a", "b"), waiting("b", "a"))
    assert [s["verdict"] for s in found.steps.values()] == [verdicts.PASSED] * 2


def test_a_slice_ends_in_time(tmp_path: Path) -> None:
    """A step gets what is left of the slice's time; one that cannot be begun says so, and is begun the next time."""
    hanging = step("hanging", "import time; time.sleep(1000)")
    found = run(tmp_path, hanging, GOOD, seconds=6)
    assert [s["verdict"] for s in found.steps.values()] == [verdicts.KILLED, verdicts.NOT_RUN]
    assert run(tmp_path, GOOD).steps["1 good"]["verdict"] == verdicts.PASSED


def test_what_a_step_started_ends_with_it(tmp_path: Path) -> None:
    """A benchmark whose workers live on would hold the GPU's memory."""
    note = tmp_path / "pid"
    child = "import time; time.sleep(120)"
    code = (
        "import subprocess, sys, pathlib, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}]); pathlib.Path({str(note)!r}).write_text(str(p.pid))\n"
        "time.sleep(120)"
    )
    run(tmp_path / "out", step("parent", code, 3))
    assert state_of(int(note.read_text())) in ("gone", "Z")


def state_of(pid: int) -> str:
    """The letter that the kernel shows for a process, Z for one that nobody has reaped yet; "gone" without one."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


def test_asked_to_end_it_ends_its_steps(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"import os, pathlib, time; pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(120)"
    main = (
        "from pathlib import Path\n"
        "from tests.gpu.check.test_running import run, step\n"
        f"run(Path({str(tmp_path / 'out')!r}), step('waiting', {code!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", main], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_long_logs_lose_their_middle(tmp_path: Path) -> None:
    run(tmp_path, step("loud", f"print('begin'); print('x' * {3 * LOG_BYTES}); print('end')"))
    with tarfile.open(tmp_path / "logs.tar") as archive:
        member = archive.extractfile("1-loud.log")
        assert member is not None
        text = member.read()
    assert len(text) < LOG_BYTES + 100
    assert b"begin" in text
    assert text.endswith(b"end\n")


def test_the_slices_fit_a_command_and_name_what_is_there() -> None:
    """Each slice is expected to end in time; tests and modules exist; a step's rows can be read."""
    assert [piece.number for piece in SLICES] == list(range(1, len(SLICES) + 1))
    for piece in SLICES:
        assert piece.estimate < SLICE_SECONDS, piece.name
        for one in piece.steps:
            assert one.limit <= SLICE_SECONDS
            assert one.estimate < one.limit
            files = [word for word in one.command if word.startswith("tests/") and "*" not in word]
            assert all((ROOT / name).is_file() for name in files)
            if "-m" in one.command:
                assert importlib.util.find_spec(one.command[one.command.index("-m") + 1]) is not None
    listed = {word for piece in SLICES for one in piece.steps for word in one.command}
    there = {f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
    assert there <= listed


@pytest.mark.parametrize(("text", "numbers"), [
    ("2", [2]), ("1-3", [1, 2, 3]), ("1,4-5", [1, 4, 5]), ("all", list(range(1, len(SLICES) + 1))),
    (None, list(range(1, len(SLICES) + 1))),
])  # fmt: skip
def test_slices_are_chosen_by_number(text: str | None, numbers: list[int]) -> None:
    assert [piece.number for piece in chosen(text)] == numbers


@pytest.mark.parametrize("text", ["0", "99", "x", "1-y", "3-99"])
def test_a_slice_that_is_not_there_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"there are 1 to {len(SLICES)}"):
        chosen(text)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.gpu.check", "--slice", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "sees no GPU" in done.stderr
    assert not (tmp_path / "out").exists()
