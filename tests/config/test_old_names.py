"""Sections and hooks under the names of an earlier version: the same values, one note each, never both at once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from mirai_ds.analysis.differences import of_configurations
from mirai_ds.config import RunConfig, build, load, old_names
from mirai_ds.config.run_config import HOOK_NAMES
from mirai_ds.runs.configuration import read_run_config
from mirai_ds.runs.records import Curve, RunRecords, read_config
from tests.one_line import one_line

OLD = """
evaluate: {every_steps: 5, weights: [ema]}
quality: {at_end: true, features_weights: net.pth, num_samples: 7}
score: {enabled: true, per_class: 3}
"""
NEW = """
eval:
  loss: {every_steps: 5, weights: [ema]}
  fid: {at_end: true, features_weights: net.pth, num_samples: 7}
  classifier: {enabled: true, per_class: 3}
"""
OLD_HOOKS = "[log, spike, evaluate, sample, quality, checkpoint, stop, report]"
NOTES = [
    f"mirai-ds: config: `{old}` is now `{new}`; the old name still works"
    for old, new in (("evaluate", "eval.loss"), ("quality", "eval.fid"), ("score", "eval.classifier"))
]


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was said yet, on rank 0, before a log is started."""
    monkeypatch.setattr(old_names, "_SAID", set())
    log = logging.getLogger("mirai_ds")
    monkeypatch.setattr(log, "handlers", [])
    monkeypatch.setattr(log, "propagate", True)  # pytest listens in by a handler at loggers that do not
    for name in ("RANK", "SLURM_PROCID", "MIRAI_DS_PARENT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(("old", "wanted"), [("false", []), ("true", ["tensorboard"])])
def test_the_switch_of_tensorboard(
    old: str, wanted: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert load(recipe(tmp_path, f"logging: {{tensorboard: {old}, every_steps: 7}}")).tracking == wanted
    assert load("digits-baseline", [f"logging.tensorboard={old}"]).tracking == wanted
    assert load(recipe(tmp_path, f"logging: {{tensorboard: {old}}}")).logging.every_steps == 100
    note = "`logging.tensorboard` is now `tracking`; the old name still works"
    assert capfd.readouterr().err.count(note) == 1
    other = "[csv]" if old == "true" else "[tensorboard]"
    both = recipe(tmp_path, f"logging: {{tensorboard: {old}}}\ntracking: {other}")
    one_line(lambda: load(both), "`logging.tensorboard` and `tracking` are given")


def recipe(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def measured(config: RunConfig) -> tuple[object, ...]:
    e = config.eval
    return (e.loss.every_steps, e.loss.weights, e.loss.batch_size, e.fid.num_samples, e.fid.features_weights,
            e.classifier.enabled, e.classifier.per_class)  # fmt: skip


def test_a_recipe(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    old = load(recipe(tmp_path, OLD))
    assert measured(old) == (5, ["ema"], 64, 7, "net.pth", True, 3)
    assert capfd.readouterr() == ("", "".join(f"{note}\n" for note in NOTES))
    assert old == load(recipe(tmp_path, NEW)) == load(recipe(tmp_path, OLD))
    assert capfd.readouterr() == ("", "")  # each note once a process; the new names have none


@pytest.mark.parametrize(
    ("below", "above"), [(OLD, "eval: {loss: {every_steps: 9}}"), (NEW, "evaluate: {every_steps: 9}")]
)
def test_a_base_of_the_other_version(below: str, above: str, tmp_path: Path) -> None:
    recipe(tmp_path, below, "low.yaml")
    config = load(recipe(tmp_path, f"base: low.yaml\n{above}"))
    assert measured(config) == (9, ["ema"], 64, 7, "net.pth", True, 3)


@pytest.mark.parametrize("text", [OLD, NEW])
def test_overrides(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = recipe(tmp_path, text)
    capfd.readouterr()
    config = load(path, ["score.enabled=false", "evaluate.every_steps=null", "eval.loss.batch_size=8"])
    assert measured(config) == (None, ["ema"], 8, 7, "net.pth", False, 3)
    assert sorted(capfd.readouterr().err.splitlines()) == (NOTES if text == OLD else [NOTES[0], NOTES[2]])
    assert load(path, ["quality={num_samples: 9}"]).eval.fid.num_samples == 9
    both = load(path, ["evaluate.every_steps=1", "eval.loss.every_steps=2"])
    assert both.eval.loss.every_steps == 2  # the last one counts, as of one name given twice
    one_line(lambda: load(path, ["score.enabled=maybe"]), "eval.classifier.enabled = 'maybe': must be true or false")


def test_hooks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for config in (load(recipe(tmp_path, f"hooks: {OLD_HOOKS}")), load("digits-baseline", [f"hooks={OLD_HOOKS}"])):
        assert config.hooks == list(HOOK_NAMES)
    assert capfd.readouterr().err.splitlines() == [
        f"mirai-ds: config: hook `{name}` is now `eval-{kind}`; the old name still works"
        for name, kind in (("evaluate", "loss"), ("quality", "fid"))
    ]
    some = load("digits-baseline", ["hooks=[log, own.module:evaluate, evaluate, stop]"])
    assert some.hooks == ["log", "own.module:evaluate", "eval-loss", "stop"]


def test_both_names(tmp_path: Path) -> None:
    for text, said in (
        ("score: {enabled: true}\neval: {classifier: {}}", "recipe.yaml: `score` and `eval.classifier` are given"),
        ("evaluate: {at_end: true}\neval:", "recipe.yaml: `evaluate` and `eval` are given"),
        ("hooks: [log, evaluate, eval-loss, stop]", "recipe.yaml: hooks: `evaluate` and `eval-loss` are given"),
    ):
        one_line(lambda text=text: load(recipe(tmp_path, text)), said)
    one_line(lambda: load("digits-baseline", ["hooks=[log, quality, eval-fid, stop]"]), "`quality` and `eval-fid`")
    beside = build({"evaluate": {"every_steps": 3}, "eval": {"fid": {"num_samples": 5}}})
    assert (beside.eval.loss.every_steps, beside.eval.fid.num_samples) == (3, 5)


def test_stored_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What an earlier version stored is no other configuration, and has no note: nobody wrote that file."""
    new = load(recipe(tmp_path, NEW)).model_dump(mode="json")
    names = {"loss": "evaluate", "fid": "quality", "classifier": "score"}
    old = {key: value for key, value in new.items() if key != "eval"}
    old |= {names[kind]: section for kind, section in new["eval"].items()} | {"hooks": yaml.safe_load(OLD_HOOKS)}
    runs = []
    for name, stored in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        recipe(tmp_path / name, yaml.safe_dump(stored, sort_keys=False), "config.yaml")
        assert measured(read_run_config(tmp_path / name)) == (5, ["ema"], 64, 7, "net.pth", True, 3)
        runs.append(RunRecords(tmp_path / name, Curve(), read_config(tmp_path / name)[0], None, []))
    assert runs[0].config == runs[1].config == new
    assert of_configurations(*runs) == []
    assert capfd.readouterr() == ("", "")


def test_two_names_in_a_stored_run_are_a_reason(tmp_path: Path) -> None:
    recipe(tmp_path, "score: {}\neval: {classifier: {}}\n", "config.yaml")
    assert read_config(tmp_path)[0] is None
    assert "`score` and `eval.classifier` are given" in read_config(tmp_path)[1]


def test_who_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 0, through the log where there is one; not the ranks whose parent has said it."""
    path = recipe(tmp_path, "score: {enabled: true}")
    for name, value in (("RANK", "1"), ("SLURM_PROCID", "3"), ("MIRAI_DS_PARENT", "1")):
        with monkeypatch.context() as environment:
            environment.setenv(name, value)
            assert load(path).eval.classifier.enabled
        assert capfd.readouterr() == ("", "")
    heard: list[str] = []
    log = logging.getLogger("mirai_ds")
    monkeypatch.setattr(log, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(log, "info", lambda text, *values: heard.append(text % values))
    assert load(path).eval.classifier.enabled
    assert heard == [NOTES[2].removeprefix("mirai-ds: ")]
    assert capfd.readouterr() == ("", "")
