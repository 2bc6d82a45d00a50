"""docs/reproducing.md: its commands are commands, and its numbers of steps are the recipes'."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mirai_ds.cli.main import main
from mirai_ds.paper.catalogue import rows_of, run_steps
from mirai_ds.tokenizer import vq_model

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reproducing.md"
TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = [shlex.split(line, comments=True)[1:] for line in re.findall(r"^    (mirai-ds .*)$", TEXT, re.MULTILINE)]


def test_every_job_of_the_page_renders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `submit` line with --dry-run: its options, the template's and those behind `--` are understood."""
    monkeypatch.chdir(tmp_path)
    jobs = [args for args in COMMANDS if args[0] == "submit"]
    assert len(jobs) == 9
    for args in jobs:
        done = CliRunner().invoke(main, [args[0], "--dry-run", "--no-check", *args[1:]])
        assert done.exit_code == 0, (args, done.output)
        assert "#SBATCH" in done.output


def test_every_other_command_of_the_page_is_one() -> None:
    """Names and options as the command line has them."""
    others = [args for args in COMMANDS if args[0] != "submit"]
    assert {args[0] for args in others} == {"verify", "evaluate", "reproduce", "inspect", "plan", "table", "report"}
    for name, *args in others:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        command.make_context(name, list(args))


def test_steps_and_guidance_are_the_recipe_s() -> None:
    drawn = [args for args in COMMANDS if args[0] == "submit" and "sample_evaluate" in args]
    asked = [(args[1], int(args[args.index("--step") + 1]), args[args.index("--out") + 1]) for args in drawn]
    marks = [row for row in rows_of("fig7") if row.recipe == "mirai-e-b"]
    assert asked == [("runs/mirai-e-b", row.steps, f"epoch-{row.epochs:03.0f}.npz") for row in marks]
    assert all(args[args.index("--cfg") + 1] == "2.0" for args in drawn)
    assert f"{run_steps('mirai-e-b'):,} steps" in TEXT


def test_the_tokenizer_s_size() -> None:
    import torch

    with torch.device("meta"):
        count = sum(p.numel() for p in vq_model.VQModel(vq_model.VQ16).parameters())
    assert f"{count:,} fp32 numbers" in TEXT
