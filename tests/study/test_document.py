"""Rows to files and back, and the document that is made from them alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from mirai_ds.cli.main import main
from mirai_ds.study.document import END, PARTS, marker, write_document
from mirai_ds.study.rows import CURVES, FACTS, RUNS, read_rows, write_rows
from tests.one_line import one_line
from tests.study.rows_by_hand import rows_by_hand

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(rows_by_hand(), tmp_path)
    parts = "\n\n".join(f"{marker(part, 'digits')}\nold\n{END}" for part in PARTS)
    (tmp_path / "study.md").write_text(f"# A study\n\n{parts}\n\nWords.\n", encoding="utf-8")
    return tmp_path


def test_rows_survive_their_files(folder: Path) -> None:
    assert read_rows(folder) == rows_by_hand()


def test_document_from_rows(folder: Path) -> None:
    assert write_document(folder) == [f"{part} digits" for part in PARTS]
    text = (folder / "study.md").read_text(encoding="utf-8")
    # 1.2, 1.325, 1.45: mean 1.325, half width 4.302653 * 0.125 / sqrt(3) = 0.3105
    assert "| baseline | 1.3350 ± 0.3105 | 1.3250 ± 0.3105 |" in text
    # Every seed's difference is -0.2 (the interval has no width), at equal compute +0.3.  The baseline's last value
    # comes after 36 of the arm's 40 steps: 2 / 1.8 = 1.11.
    row = next(line for line in text.splitlines() if line.startswith("| Mirai-E, official | **-0.2"))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells[0] == "**-0.2000 ± 0.0000**"
    assert cells[1] == "**+0.3000 ± 0.0000**"
    # Half-way, after 1 epoch, the arm has 2.0; the baseline falls from 2.2 to 1.2 in the second: 1.2 epochs.
    assert cells[6:10] == ["1.20 ± 0.00", "1.11 ± 0.00", "> 2 (3 of 3)", "2.00"]
    assert cells[10:] == ["1.40"]
    assert text.startswith("# A study\n")
    assert text.endswith("Words.\n")
    assert (folder / "study-digits-curves.png").stat().st_size > 10_000


def test_check_writes_nothing(folder: Path) -> None:
    before = (folder / "study.md").read_bytes()
    found = CliRunner().invoke(main, ["study", "write", str(folder), "--check"])
    assert found.exit_code == 1
    assert found.output.splitlines()[0] == "changed: facts digits"
    assert (folder / "study.md").read_bytes() == before
    assert CliRunner().invoke(main, ["study", "write", str(folder)]).exit_code == 0
    found = CliRunner().invoke(main, ["study", "write", str(folder), "--check"])
    assert (found.exit_code, found.output) == (0, "nothing changed\n")


def test_committed_document_is_what_its_rows_give() -> None:
    assert write_document(ROOT / "docs", check=True) == []


def test_new_rows_replace_those_of_their_study() -> None:
    rows = rows_by_hand()
    assert rows.replaced(rows, "digits") == rows
    assert len(rows.replaced(rows, "fashion").runs) == 2 * len(rows.runs)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda f: (f / RUNS).unlink(), f"{RUNS}: No such file or directory; `mirai-ds study rows` writes it"),
        (lambda f: (f / FACTS).write_text("{"), f"{FACTS}: cannot be read"),
        (lambda f: (f / CURVES).write_text("study,arm\na,b\n"), f"{CURVES}, line 2: columns must be study, arm, seed"),
        (lambda f: (f / CURVES).write_text((f / CURVES).read_text().replace("3.01", "three", 1)), "could not convert"),
        (lambda f: (f / "study.md").write_text("# no marks\n"), "lacks the line '<!-- mirai-ds study write: facts"),
        (lambda f: (f / "study.md").unlink(), "study.md: No such file"),
    ],
)  # fmt: skip
def test_mistakes(folder: Path, break_it: Callable[[Path], object], said: str) -> None:
    break_it(folder)
    one_line(lambda: write_document(folder), said)
    assert CliRunner().invoke(main, ["study", "write", str(folder)]).exit_code == 2
