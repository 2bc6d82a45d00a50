"""What a run says, where, and who of the ranks says it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from mirai_ds.runtime.log import LOG, NAME, close_log, log_crash, log_into, start_log


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    LOG.handlers.clear()  # what other tests of this process have said is kept for a file as well
    yield
    close_log()
    LOG.handlers.clear()
    LOG.propagate = True


def say_all() -> None:
    LOG.info("step %d", 3)
    LOG.warning("slow")
    LOG.error("gone")


def test_rank_0_speaks_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_log(0)
    start_log(0)  # a second start in one process does not say all twice
    log_into(tmp_path, 0)
    say_all()
    said = capsys.readouterr()
    assert said.out == "mirai-ds: step 3\nmirai-ds: warning: slow\n"
    assert said.err == "mirai-ds: error: gone\n"
    lines = (tmp_path / NAME).read_text().splitlines()
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4}"
    for line, rest in zip(lines, ("INFO rank 0: step 3", "WARNING rank 0: slow", "ERROR rank 0: gone"), strict=True):
        assert re.fullmatch(f"{stamp} {rest}", line)


def test_of_other_ranks_only_errors_are_heard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_log(1)
    log_into(tmp_path, 1)
    say_all()
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "mirai-ds: error: gone\n")
    assert (tmp_path / NAME).read_text().endswith(" ERROR rank 1: gone\n")
    assert (tmp_path / NAME).read_text().count("\n") == 1


def test_what_was_said_before_there_was_a_file_comes_first(tmp_path: Path) -> None:
    """A start that is refused has no file; one that is accepted has it all, once."""
    start_log()
    LOG.info("launcher: none")
    log_into(tmp_path, 0)
    LOG.info("step 1")
    log_into(tmp_path, 0)
    assert [line.rpartition("0: ")[2] for line in (tmp_path / NAME).read_text().splitlines()] == [
        "launcher: none", "step 1",
    ]  # fmt: skip


def test_a_resume_goes_on_in_the_same_file(tmp_path: Path) -> None:
    start_log()
    for text in ("first", "second"):
        log_into(tmp_path, 0)
        LOG.info(text)
    assert [line.rpartition(": ")[2] for line in (tmp_path / NAME).read_text().splitlines()] == ["first", "second"]


def test_a_crash_leaves_its_stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_log()
    log_into(tmp_path, 2)
    try:
        raise ValueError("broken")
    except ValueError as error:
        log_crash(error)
    text = (tmp_path / NAME).read_text()
    assert "CRITICAL rank 2: crashed" in text
    assert 'raise ValueError("broken")' in text
    assert capsys.readouterr().err == ""


def test_a_disk_that_fails_costs_the_log_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_log()
    log_into(tmp_path / "missing", 0)
    LOG.info("still here")
    assert capsys.readouterr() == ("mirai-ds: still here\n", "")
