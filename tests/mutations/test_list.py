"""The list of faults fits the sources, and what plants them reads pytest rightly; planting is done by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations import planting
from tests.mutations.__main__ import chosen, main
from tests.mutations.planting import Fault, StaleListError, check, culprit, judge, read_list

ROOMS = {
    "engine": ("mirai_ds/engine", "mirai_ds/train", "mirai_ds/config"),
    "foresight": ("mirai_ds/foresight", "kernels/foresight_cosine"),
    "data": ("mirai_ds/data",),
    "checkpoint": ("mirai_ds/checkpoint", "mirai_ds/runtime", "mirai_ds/engine/state.py", "mirai_ds/train/checkpoints"),
    "sampling": ("mirai_ds/model",),
    "evaluation": ("mirai_ds/eval",),
}


def fault(root: Path, old: str = "a < b", tests: tuple[str, ...] = ("tests/test_it.py",)) -> Fault:
    """In a small tree whose one test fails where `b` is not above `a`."""
    (root / "tests").mkdir(exist_ok=True)
    (root / "code.py").write_text("def above(a, b):\n    return a < b\n")
    (root / "tests" / "test_it.py").write_text("from code import above\ndef test_it():\n    assert above(1, 2)\n")
    return Fault("turned", "code.py", old, "a > b", "nothing is above anything", tests)


def test_every_entry_applies_and_names_tests_that_are_there() -> None:
    faults = read_list()
    check(faults)
    assert len(faults) >= 40
    for room, files in ROOMS.items():
        assert sum(fault.file.startswith(files) for fault in faults) >= 5, room


def test_an_entry_that_does_not_fit_is_named(tmp_path: Path) -> None:
    good = fault(tmp_path)
    check([good], tmp_path)
    assert "a > b" in good.mutated(tmp_path)
    stale = [fault(tmp_path, "a <= b"), fault(tmp_path, "a"), fault(tmp_path, tests=("tests/gone.py",))]
    with pytest.raises(StaleListError) as caught:
        check(stale, tmp_path)
    assert str(caught.value).splitlines() == [
        "turned: its old text stands 0 times in code.py, not once",
        "turned: its old text stands 3 times in code.py, not once",
        "turned: there is no tests/gone.py",
    ]
    with pytest.raises(StaleListError, match="no-such-fault: no such fault; see --list"):
        chosen(["no-such-fault"])


def test_the_tests_that_pytest_names() -> None:
    said = "FAILED tests/a/test_b.py::test_c[1 - 2] - assert 1 == 2\nERROR tests/d.py::test_e - ValueError\n"
    assert culprit(said) == "tests/a/test_b.py::test_c[1 - 2]"
    assert culprit(said.splitlines()[1]) == "tests/d.py::test_e"
    assert culprit("3 passed in 0.1s\n") == ""


@pytest.mark.parametrize(
    ("code", "said", "caught", "what"),
    [(1, "FAILED tests/x.py::test_y - assert\n", True, "tests/x.py::test_y"), (0, "1 passed", False, "MISSED"),
     (None, "", False, "HUNG: no test's own deadline ended it in 0 s")],
)  # fmt: skip
def test_verdicts(code: int | None, said: str, caught: bool, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is in the copy when tests run there, and the checkout stays as it was."""
    one = read_list()[0]
    before, ran = (planting.ROOT / one.file).read_text(), []

    def run(copy: Path, tests: tuple[str, ...], limit: float) -> tuple[int | None, str]:
        assert (copy / one.file).read_text() == one.mutated(planting.ROOT) != before
        assert (copy / "mirai_ds" / "kernels").is_symlink()
        ran.append((tests, limit))
        return code, said

    monkeypatch.setattr(planting, "run_tests", run)
    monkeypatch.setattr(planting, "assert_imports", lambda copy: None)
    monkeypatch.setattr(planting.time, "monotonic", lambda: 0.0)
    verdict = judge(one, everything=True, limit=7)
    assert (verdict.caught, verdict.what) == (caught, what)
    assert ran == [(one.tests, 7), ((), 7 * planting.WHOLE_SUITE)][: 2 if code == 0 else 1]
    assert (planting.ROOT / one.file).read_text() == before


def test_tests_that_cannot_run_are_no_catch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planting, "run_tests", lambda *_: (2, "ERROR tests/x.py - SyntaxError"))
    monkeypatch.setattr(planting, "assert_imports", lambda copy: None)
    with pytest.raises(RuntimeError, match="pytest ended with 2"):
        judge(read_list()[0])


def test_processes_import_the_copy() -> None:
    with planting.copied() as copy:
        planting.assert_imports(copy)


def test_a_stale_list_ends_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["mutations", "--only", "nothing-like-it", "--list"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "nothing-like-it: no such fault" in capsys.readouterr().err
