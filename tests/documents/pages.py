"""The commands that the pages name: in blocks, and within sentences."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "jobs" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
RUN = "<!-- run -->"  # before a block: its commands are executed by the tests
PROGRAMS = ("mirai-ds", "make", "python", "python3", "deepspeed", "torchrun", "srun", "mpirun")
FILTERS = ("tail", "head", "grep", "less", "tee", "wc")  # after a pipe; any other word there is a verb of a synopsis
_SHELL = ("", "bash", "sh", "console")  # languages of fenced blocks that hold commands


@dataclass(frozen=True)
class Command:
    """One command of a page: where it stands, its line, whether it is a whole one (of a block, and no synopsis) and is
    to be run."""

    where: str
    text: str
    whole: bool = True
    run: bool = False


def blocks(page: Path) -> Iterator[tuple[int, bool, list[str]]]:
    """(number of the first line, whether it is marked to be run, lines) of every block that may hold commands."""
    found: list[str] = []
    marked = fenced = False
    language, first = "", 0
    for number, line in enumerate([*page.read_text(encoding="utf-8").splitlines(), ""], start=1):
        fence = re.match(r"\s*```(\w*)", line)
        inside = fenced if fenced else bool(re.match(r" {4,}\S", line))
        if fence is None and inside:
            first = first or number
            found.append(line.strip() if not fenced else line)
            continue
        if found:
            if language in _SHELL:
                yield first, marked, found
            found, first, marked, language = [], 0, False, ""
        if fence is not None:
            fenced = not fenced
            language = fence[1] if fenced else ""
        elif line.strip():
            marked = line.strip() == RUN
    return


def joined(lines: list[str]) -> list[str]:
    """Lines that end with a backslash, together with those they go on in."""
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [line.strip() for line in whole.split("\n")]


def commands(page: Path) -> list[Command]:
    """Every command of a page, those of one line apart."""
    name = str(page.relative_to(ROOT))
    found = []
    for first, run, lines in blocks(page):
        for text in joined(lines):
            whole = re.search(r"\.\.\.|\||\[", text) is None
            found += [Command(f"{name}:{first}", part, whole, run) for part in parts(text)]
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", line):
            found += [Command(f"{name}:{number}", part, False) for part in parts(span)]
    return found


def parts(text: str) -> list[str]:
    """The commands of a line that are this project's: one after `;`, `&&` or a pipe each, and of a synopsis such as
    `mirai-ds map RUN | flops RECIPE` both."""
    text, quoted = hidden(re.sub(r"\s#\s.*$", "", text))
    text = re.sub(r"\s>\s*\S+\s*$", "", text)
    text = re.sub(r"^([A-Z_]+=\S* +)+", "", text)
    found: list[str] = []
    for part in re.split(r"\s(?:\||&&|;)\s|;\s", text):
        words = part.split()
        if words and words[0] in PROGRAMS and len(words) > 1:
            found.append(shown(part, quoted))
        elif words and found and found[0].startswith("mirai-ds ") and " | " in text and words[0] not in FILTERS:
            found.append(f"mirai-ds {shown(part, quoted)}")
    return found


def hidden(text: str) -> tuple[str, list[str]]:
    """The text with a mark in the place of each quoted part, and these parts."""
    quoted = re.findall(r"'[^']*'|\"[^\"]*\"", text)
    for number, piece in enumerate(quoted):
        text = text.replace(piece, f"\0{number}\0", 1)
    return text, quoted


def shown(text: str, quoted: list[str]) -> str:
    """The text of which `hidden` has hidden the quoted parts."""
    return re.sub("\0(\\d+)\0", lambda match: quoted[int(match[1])], text)


def words_of(text: str) -> list[list[str]]:
    """A command's words without the marks of a synopsis: `[--set a.b=c ...]`, `codes|images`, `RUN...`.

    Of alternatives every one of a verb's, else the first.  Raises ValueError for open quotes.
    """
    text, quoted = hidden(text)
    text = re.sub(r"\[(?=[A-Z-])|(?<=[\w.)])\](?=\s|$)|\.\.\.(?=\s|\]|$)|\]", " ", text)
    words = shlex.split(shown(text, quoted), comments=True)
    several: list[list[str]] = [[]]
    for place, word in enumerate(words):
        options = word.split("|") if "|" in word and not word.startswith("-") else [word]
        options = options if place <= 2 else options[:1]
        several = [[*before, option] for before in several for option in options if option]
    return several
