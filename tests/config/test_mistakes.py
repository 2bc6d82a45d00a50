"""Every typical mistake is one line that names the field, the value and the fix, without pydantic's words."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mirai_ds.config.deepspeed_file import packaged_names, resolve
from mirai_ds.config.errors import UserError
from mirai_ds.config.load import build, load
from tests.config import mistakes_in_deepspeed_files as in_deepspeed
from tests.config import mistakes_in_recipes

JARGON = re.compile(
    r"input should|validation error|type=|https?://|pydantic|valid (integer|string|number|boolean)|<class", re.I
)


def one_line(error: UserError, parts: tuple[str, ...]) -> None:
    """The message is one readable line that holds all of `parts`."""
    message = str(error)
    assert "\n" not in message
    assert len(message) < 500
    assert not JARGON.search(message), message
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"


def test_mistakes_in_recipes(tmp_path: Path) -> None:
    """200 of them; all that are not told as they should be are named."""
    path, failed = tmp_path / "recipe.yaml", {}
    for name, (text, parts, overrides) in mistakes_in_recipes.ALL.items():
        path.write_text(text, encoding="utf-8")
        try:
            with pytest.raises(UserError) as caught:
                load(str(path), overrides)
            one_line(caught.value, parts)
        except (Exception, pytest.fail.Exception) as problem:  # another error than ours, or none
            failed[name] = str(problem)
    assert failed == {}
    assert len(mistakes_in_recipes.ALL) > 200


@pytest.mark.parametrize("name", mistakes_in_recipes.YAML)
def test_yaml_mistakes_name_the_file_or_the_argument(name: str, tmp_path: Path) -> None:
    text, _, overrides = mistakes_in_recipes.YAML[name]
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"^--set '" if overrides and "name=a" not in overrides[0] else "recipe.yaml"):
        load(str(path), overrides)


def test_several_mistakes_are_several_lines(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: -1\noptimizer: {lr: fast}\nmodle: {}\n")
    with pytest.raises(UserError) as caught:
        load(str(path))
    assert str(caught.value).split("\n") == [
        f"{path}: seed = -1: must be at least 0",
        f"{path}: optimizer.lr = 'fast': must be a number, e.g. 0.0001",
        f"{path}: modle: unknown key; did you mean 'model'?",
    ]


SOURCES = {
    "misspelt": ("digits-basline", ("recipe 'digits-basline'", "no such recipe", "did you mean 'digits-baseline'?")),
    "nothing-near": ("zzzzzz", ("recipe 'zzzzzz'", "mirai-ds recipes list", "digits-baseline")),
    "upper-case": ("Digits-Baseline", ("recipe 'Digits-Baseline'", "did you mean 'digits-baseline'?")),
    "no-file": ("folder/none.yaml", ("folder/none.yaml: no such recipe file", "recipes list", "digits-baseline")),
    "no-file-without-suffix": ("folder/none", ("folder/none: no such recipe file", "give a .yaml file")),
    "wrong-suffix": ("recipe.txt", ("recipe.txt: a recipe file must end in .yaml; rename it",)),
    "wrong-suffix-in-folder": ("./recipe.txt", ("./recipe.txt: a recipe file must end in .yaml; rename it",)),
    "folder": ("folder.yaml", ("folder.yaml: no such recipe file", "give a .yaml file")),
    "latin-1": ("latin.yaml", ("latin.yaml: cannot be read", "a recipe is UTF-8 text")),
}


@pytest.mark.parametrize("name", SOURCES)
def test_mistaken_source(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.txt").write_text("seed: 1")
    Path("latin.yaml").write_bytes(b"name: \xe4")
    Path("folder.yaml").mkdir()
    source, parts = SOURCES[name]
    with pytest.raises(UserError) as caught:
        load(source)
    one_line(caught.value, parts)


def test_bases_that_go_round(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.yaml").write_text("base: inner/b.yaml")
    (tmp_path / "inner" / "b.yaml").write_text("base: ../inner/../a.yaml")
    with pytest.raises(UserError) as caught:
        load(str(tmp_path / "a.yaml"))
    one_line(caught.value, ("goes round in a circle", "a.yaml -> ", "b.yaml -> ", "remove one `base:`"))


def test_deepspeed_names_are_all_different() -> None:
    groups = ("UNKNOWN", "ELSEWHERE", "CONTRADICTIONS", "VALUES", "TEXT")
    assert sum(len(getattr(in_deepspeed, group)) for group in groups) == len(in_deepspeed.ALL)


@pytest.mark.parametrize("name", in_deepspeed.ALL)
def test_mistake_in_a_deepspeed_file(name: str, tmp_path: Path) -> None:
    file, parts, precision, world = in_deepspeed.ALL[name]
    path = tmp_path / "file.json"
    text = file if isinstance(file, str) else json.dumps(file)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    config = build({"deepspeed": text if text in packaged_names() else str(path), "train": {"precision": precision}})
    with pytest.raises(UserError) as caught:
        resolve(config, world)
    one_line(caught.value, parts)


@pytest.mark.parametrize("name", in_deepspeed.PLACES)
def test_mistaken_place_of_a_deepspeed_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.json").mkdir()
    source, parts = in_deepspeed.PLACES[name]
    with pytest.raises(UserError) as caught:
        resolve(build({"deepspeed": source}), 1)
    one_line(caught.value, parts)


BATCHES = {
    "ranks": ({"global_batch_size": 10}, 4, ("train.global_batch_size = 10", "the 4 ranks; use 8 or 12")),
    "micro": (
        {"global_batch_size": 12, "micro_batch_size": 4},
        2,
        ("train.micro_batch_size = 4", "the 6 samples that each of 2 ranks", "use e.g. 3"),
    ),
    "micro-above": (
        {"global_batch_size": 12, "micro_batch_size": 12},
        4,
        ("train.micro_batch_size = 12", "3 samples", "use e.g. 3"),
    ),
    "accumulation": (
        {"global_batch_size": 12, "grad_accum_steps": 4},
        2,
        ("train.grad_accum_steps = 4", "6 samples", "use e.g. 3"),
    ),
    "both": (
        {"global_batch_size": 16, "micro_batch_size": 2, "grad_accum_steps": 2},
        2,
        ("train.global_batch_size = 16", "2 * 2 * 2 = 8", "leave micro_batch_size or grad_accum_steps out"),
    ),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batch_arithmetic(name: str) -> None:
    train, world, parts = BATCHES[name]
    with pytest.raises(UserError) as caught:
        resolve(build({"train": train}), world)
    one_line(caught.value, parts)
