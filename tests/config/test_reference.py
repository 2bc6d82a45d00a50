"""`mirai-ds config` and docs/configuration.md: every field is explained, by ours and by other people's names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from mirai_ds.cli.config import BEGIN, END, page
from mirai_ds.cli.main import main
from mirai_ds.config import RunConfig, load, recipe_names
from mirai_ds.config.errors import OTHER_NAMES
from mirai_ds.config.reference import SYMBOLS, entries, explained, find
from mirai_ds.runtime import markdown
from tests.one_line import one_line

DOCS = Path(__file__).resolve().parents[2] / "docs"
NAMES = [entry.name for entry in entries()]


def stored_names(value: object, path: str = "") -> set[str]:
    """Dotted names of what a run stores; sections that are None are theirs."""
    if not isinstance(value, dict):
        return {path}
    return set().union(*(stored_names(item, f"{path}.{key}".lstrip(".")) for key, item in value.items()))


def test_every_field_is_there_once_and_explained() -> None:
    config = load("mirai-i-b").model_dump(mode="json")  # a run with every section
    assert set(NAMES) == stored_names(config)
    assert len(set(NAMES)) == len(NAMES)
    for entry in entries():
        assert len(entry.meaning) >= 8 or entry.meaning == "AdamW's", entry.name
        assert not entry.meaning.endswith("."), entry.name
    assert set(SYMBOLS) <= set(NAMES)
    assert set(OTHER_NAMES.values()) <= set(NAMES)


def test_types_and_defaults_are_the_schema_s() -> None:
    told = {entry.name: (entry.type, entry.default) for entry in entries()}
    assert told["seed"] == ("whole number, at least 0, less than 2,147,483,648", "0")
    assert told["optimizer.betas"] == ("list of 2 numbers", "[0.9, 0.95]")
    assert told["foresight.offsets"] == ("list of lists of whole numbers", "")
    assert told["train.precision"] == ("fp32 | bf16 | bf16-autocast", "bf16-autocast")
    assert told["deepspeed"] == ("text or section", "zero2")
    assert told["eval.fid.metrics"] == ("list of fid | sfid | is | pr", "")
    assert told["ema.decay"] == ("number, at least 0, less than 1", "0.9999")
    plain = RunConfig().model_dump(mode="json")
    for name, (_, default) in told.items():
        value: object = plain
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if default and name != "data.held_out_fraction":
            assert yaml.safe_load(default) == value or name.startswith("foresight.encoder."), name


@pytest.mark.parametrize(
    ("name", "wanted"),
    {
        "foresight.layer": ["foresight.layer"], "lambda": ["foresight.weights"], "K": ["foresight.num_heads"],
        "tau": ["ema.decay"], "ema-decay": ["ema.decay"], "foresight.schedule": [
            f"foresight.schedule.{n}" for n in ("kind", "at_epochs", "multipliers", "start_epoch", "final")
        ],
        "seed": ["seed"], "score": ["eval.classifier.enabled", "eval.classifier.per_class"],
        "cfg_scale": ["sampling.cfg_scale"], "foresight.lambda": ["foresight.weights"],
    }.items(),
)  # fmt: skip
def test_a_name_leads_to_its_fields(name: str, wanted: list[str]) -> None:
    assert [entry.name for entry in find(name)] == wanted


def test_names_that_lead_nowhere() -> None:
    one_line(lambda: find("forsight"), "config 'forsight'", "did you mean 'foresight'?")
    one_line(lambda: find("zzz"), "config 'zzz'", "`mirai-ds config` lists all")


def test_an_explained_recipe_is_the_same_run(tmp_path: Path) -> None:
    """`recipes show NAME --resolved > mine.yaml`, of every recipe: each line with a key has its meaning."""
    path = tmp_path / "mine.yaml"
    for name in recipe_names():
        text = explained(load(name))
        path.write_text(text, encoding="utf-8")
        assert load(str(path)) == load(name), name
        said = re.findall(r"^ *([a-z_]+): ?[^#\n]*(#)?", text, re.MULTILINE)
        sections = {part for field in NAMES for part in field.split(".")[:-1]}
        assert {key for key, comment in said if not comment} <= sections, name


def test_on_the_command_line() -> None:
    run = CliRunner().invoke
    done = run(main, ["config", "tau"])
    assert done.output == (
        "ema.decay: number, at least 0, less than 1 [0.9999] (paper: tau)\n    of the weights' average, a step\n"
    )
    everything = run(main, ["config"])
    assert [line.split(":")[0] for line in everything.output.splitlines()[::2]] == NAMES
    wrong = run(main, ["config", "forsight"])
    assert (wrong.exit_code, wrong.output.count("\n")) == (2, 1)
    assert "# student block, 1-based" in run(main, ["recipes", "show", "mirai-e-b", "--resolved"]).output


def test_the_page_is_the_schema() -> None:
    """`python -m mirai_ds.cli.config --write` makes it so."""
    document = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert document == markdown.replaced(document, BEGIN, page(), END, "configuration.md")


def test_the_recipe_in_the_documentation_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "commands.md").read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "mine.yaml"
    path.write_text(re.sub(r"^   ", "", text, flags=re.MULTILINE), encoding="utf-8")
    config = load(str(path))
    assert (config.name, config.data.path, config.model.grid, config.ema.decay) == ("mine", "stores/mine", 8, 0.9999)
    assert (config.foresight.method, config.model.token_dropout, config.train.epochs) == ("mirai-e", 0.1, 80.0)
