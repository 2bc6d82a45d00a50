"""No page names a command that is none: each is run where that is cheap, else read by the command line's own parser."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mirai_ds.cli.main import main
from mirai_ds.train.__main__ import main as rank
from tests.documents.pages import PAGES, ROOT, Command, blocks, commands, parts, words_of

EVERYTHING = [command for page in PAGES for command in commands(page)]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*")
TRAINERS = ("deepspeed", "torchrun", "srun", "mpirun")


def parse(words: list[str], whole: bool) -> None:
    """Read what follows `mirai-ds` as it would; raises UsageError.  Of a command within a sentence words may be left
    out; words in capitals stand for what a user gives, numbers too."""
    command: click.Command = main
    names = ["mirai-ds"]
    while isinstance(command, click.Group):
        if not words or words[0].startswith("-"):
            command.make_context(" ".join(names), words or ["--help"], resilient_parsing=True)
            return
        name, *words = words
        found = command.get_command(click.Context(command), name)
        if found is None:
            raise click.UsageError(f"no command {name!r} in {' '.join(names)}")
        command, names = found, [*names, name]
    context = read(command, " ".join(names), words, whole)
    if context is not None and names[1:] == ["submit"]:
        verb = {
            "extract": ["extract", context.params["recipe"]],
            "sample_evaluate": ["sample", context.params["recipe"]],
        }
        more = verb.get(context.params["template"])
        if more is not None and context.params["arguments"]:
            parse([*more, *context.params["arguments"]], whole)


def read(command: click.Command, name: str, words: list[str], whole: bool) -> click.Context | None:
    """The context; None where something is left out that may be."""
    try:
        return command.make_context(name, list(words))
    except (click.MissingParameter, click.BadOptionUsage) as error:
        if whole or isinstance(error, click.NoSuchOption):
            raise
    except click.BadParameter as error:
        if isinstance(error.param, click.Parameter) and isinstance(error.param.type, click.Path):
            return None  # a file that the page makes up
        numbers = ["1" if PLACEHOLDER.fullmatch(word) else word for word in words]
        if numbers == words:
            raise
        return read(command, name, numbers, whole)
    except click.exceptions.Exit:  # --help
        pass
    return None


def check(words: list[str], whole: bool) -> None:
    """Raises UsageError for a command of this project that is none."""
    program, *rest = words
    if program == "mirai-ds":
        parse(rest, whole)
    elif program == "make":
        for word in rest:
            if "=" not in word and word not in TARGETS:
                raise click.UsageError(f"no target {word!r} in the Makefile")
    elif program in TRAINERS:
        if "mirai-ds" in rest:
            parse(rest[rest.index("mirai-ds") + 1 :], whole)
        elif "mirai_ds.train" in rest:
            read(rank, "train", rest[rest.index("mirai_ds.train") + 1 :], whole)
    elif rest[:1] == ["-m"] and len(rest) > 1 and rest[1].startswith(("mirai_ds", "tests")):
        if rest[1] == "mirai_ds":
            parse(rest[2:], whole)
        elif runnable(rest[1]) is None:
            raise click.UsageError(f"no module {rest[1]!r} to run")


def runnable(module: str) -> Path | None:
    """The file that `python -m module` runs."""
    try:
        found = importlib.util.find_spec(f"{module}.__main__") or importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = importlib.util.find_spec(module) if importlib.util.find_spec(module.rpartition(".")[0]) else None
    if found is None or found.origin is None:
        return None
    text = Path(found.origin).read_text(encoding="utf-8")
    return Path(found.origin) if "__main__" in found.name or '__name__ == "__main__"' in text else None


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_every_command_of_a_page_is_one(page: Path) -> None:
    wrong = []
    for command in (one for one in EVERYTHING if one.where.startswith(f"{page.relative_to(ROOT)}:")):
        try:
            for words in words_of(command.text):
                check(words, command.whole)
        except (click.UsageError, ValueError) as error:
            what = error.format_message() if isinstance(error, click.UsageError) else str(error)
            wrong.append(f"{command.where}: {command.text}: {what}")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("page", [p for p in PAGES if any(run for _, run, _ in blocks(p))], ids=lambda page: page.stem)
def test_what_is_marked_is_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block after the other in one folder, beside the page's files, each named by its first line."""
    for block in re.findall(r"```yaml\n(# \S+\.yaml\n.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        (tmp_path / block.splitlines()[0].removeprefix("# ")).write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    ran = [command for command in commands(page) if command.run]
    assert ran
    for command in ran:
        words = shlex.split(command.text, comments=True)
        assert words[0] == "mirai-ds", command
        done = CliRunner().invoke(main, words[1:], catch_exceptions=False)
        assert done.exit_code == 0, f"{command.where}: {command.text}\n{done.output}"


def test_the_pages_commands_are_found() -> None:
    """Of the blocks and the sentences; a page whose commands were overlooked would pass."""
    counts = {name: sum(name in one.where and one.whole for one in EVERYTHING) for name in ("README.md", "slurm.md")}
    assert counts["README.md"] >= 10
    assert counts["slurm.md"] >= 10
    assert Command("CONTRIBUTING.md:3", "make test", False) in EVERYTHING
    assert len(EVERYTHING) > 200


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (
            "mirai-ds map RUN [RUN2] | flops RECIPE | plan RECIPE  # looking",
            ["mirai-ds map RUN [RUN2]", "mirai-ds flops RECIPE", "mirai-ds plan RECIPE"],
        ),
        ("OMP_NUM_THREADS=1 make test && ls; mirai-ds doctor", ["make test", "mirai-ds doctor"]),
        ("mirai-ds recipes list | tail -3", ["mirai-ds recipes list"]),
        ("cat RUN/outcome", []),
    ],
)  # fmt: skip
def test_a_line_s_commands(line: str, found: list[str]) -> None:
    assert [part.strip() for part in parts(line)] == found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "mirai-ds train R [--set a.b=c ...] [--resume auto|if-present|STEP]",
            [["mirai-ds", "train", "R", "--set", "a.b=c", "--resume", "auto"]],
        ),
        ("mirai-ds extract codes|images ...", [["mirai-ds", "extract", "codes"], ["mirai-ds", "extract", "images"]]),
        ("mirai-ds train m --set 'hooks=[log, stop]'", [["mirai-ds", "train", "m", "--set", "hooks=[log, stop]"]]),
        ("mirai-ds report RUN...", [["mirai-ds", "report", "RUN"]]),
    ],
)  # fmt: skip
def test_a_synopsis_is_read(text: str, words: list[list[str]]) -> None:
    assert words_of(text) == words


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("mirai-ds trian x", "no command 'trian'"),
        ("mirai-ds train x --fersh", "No such option"),
        ("mirai-ds submit x --template extarct", "is not one of"),
        ("mirai-ds submit codes --template extract -- --imges x", "No such option"),
        ("mirai-ds sample", "Missing argument"),
        ("mirai-ds study rnu", "no command 'rnu'"),
        ("make tset", "no target 'tset'"),
        ("python -m mirai_ds.plannnig", "no module"),
        ("python -m mirai_ds.config.load", "no module"),  # is one, but nothing that runs
        ("torchrun -m mirai_ds.train x --fersh", "No such option"),
    ],
)
def test_a_command_that_is_none_is_found(text: str, problem: str) -> None:
    (words,) = words_of(text)
    with pytest.raises(click.UsageError) as caught:
        check(words, whole=True)
    assert problem.lower() in caught.value.format_message().lower()
