"""Tables and marked parts of Markdown pages."""

from __future__ import annotations

from collections.abc import Iterable

from mirai_ds.config.errors import UserError


def table(header: str, rows: Iterable[str], align: str = "") -> str:
    """A table of lines `a | b | c`.  align: a letter a column, r stands to the right; what is not given is l."""
    marks = ["---:" if side == "r" else "---" for side in align.ljust(header.count("|") + 1, "l")]
    return "\n".join([f"| {header} |", f"|{'|'.join(marks)}|", *(f"| {row} |" for row in rows)])


def replaced(page: str, begin: str, content: str, end: str, name: object) -> str:
    """`page` with what stands between the lines `begin` and `end` replaced.  Raises UserError where they are not."""
    head, opened, rest = page.partition(begin + "\n")
    _, closed, tail = rest.partition(end)
    if not opened or not closed:
        raise UserError(f"{name}: lacks the line {begin!r} and {end!r} after it, between which a part is written")
    return f"{head}{begin}\n{content}\n{end}{tail}"
