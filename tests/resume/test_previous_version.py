"""A run that an earlier version wrote, before files moved and names changed, goes on with this one.

`tests/fixtures/run_before_rooms`: six steps of a tiny Mirai-E on two ranks, at commit bd0cf52; the checkpoint after
step 3, and the metrics of all six.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mirai_ds.analysis.differences import Difference, of_configurations
from mirai_ds.analysis.inspect_run import inspect_run
from mirai_ds.checkpoint.store import verify
from mirai_ds.config import load
from mirai_ds.config.paths import absolute_paths
from mirai_ds.runs.configuration import read_run_config
from mirai_ds.runs.records import read_run
from tests.warm_start import warm_mirai_ds

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_before_rooms"
RENAMED = (
    ("evaluate", "eval.loss"),
    ("quality", "eval.fid"),
    ("score", "eval.classifier"),
    ("logging.tensorboard", "tracking"),
)


def curve(run: Path) -> dict[int, dict[str, Any]]:
    """All values of each step, but for what depends on the clock."""
    steps: dict[int, dict[str, Any]] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        values = {k: v for k, v in line.items() if not k.startswith(("speed/", "memory/", "checkpoint/"))}
        # What was called lambda is the schedule's multiplier; today lambda is each head's.
        if "foresight/lambda" in values:
            values["foresight/schedule"] = values.pop("foresight/lambda")
        values = {k: v for k, v in values.items() if not k.startswith("foresight/lambda/")}
        steps[line["step"]] = steps.get(line["step"], {}) | values
    return steps


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, continued as its user would: with its own configuration."""
    run = tmp_path_factory.mktemp("previous") / "run"
    shutil.copytree(FIXTURE, run)
    options = ("--run-dir", str(run), "--resume", "auto", "--ranks", "2")
    done = warm_mirai_ds("train", str(FIXTURE / "config.yaml"), *options, env={"OMP_NUM_THREADS": "1"})
    assert done.code == 0, done.out + done.err
    assert "resumed after step 3" in done.out
    said = [line for line in (done.out + done.err).splitlines() if "is now" in line]
    assert said == [f"mirai-ds: config: `{old}` is now `{new}`; the old name still works" for old, new in RENAMED]
    return run


def test_it_goes_on_where_it_was(resumed: Path) -> None:
    """The losses of steps 4 to 6 are those that the earlier version went on with."""
    now, then = curve(resumed), curve(FIXTURE)
    assert sorted(now) == sorted(then) == list(range(1, 7))
    for step in range(4, 7):
        assert now[step].keys() == then[step].keys()
        assert now[step] == pytest.approx(then[step], rel=1e-5, abs=1e-7), step
    assert verify(resumed / "checkpoints" / "step-00000006").applied_steps == 6


def test_its_attempts_are_counted_on(resumed: Path) -> None:
    assert sorted(path.name for path in (resumed / "incarnations").glob("*.json")) == ["00001.json", "00002.json"]
    now, then = read_run_config(resumed), read_run_config(FIXTURE)
    assert now == absolute_paths(then)
    assert (then.eval.fid.num_samples, then.eval.loss.at_end, then.eval.classifier.per_class) == (5000, True, 50)


def test_its_heads_sleep_during_a_warm_up(resumed: Path) -> None:
    """As they did before that was a choice; a new run of the same convention does as the authors' code."""
    assert read_run_config(FIXTURE).foresight.heads_in_warmup == "sleep"
    assert load(str(FIXTURE / "config.yaml")).foresight.heads_in_warmup == "sleep"
    assert load("digits-mirai-e").foresight.heads_in_warmup == "decay"
    assert "heads_in_warmup" not in (resumed / "log.txt").read_text()


def test_compare_finds_no_other_settings(resumed: Path) -> None:
    """A setting that came later has had one value all along: it must not be told as what explains two curves."""
    differences = of_configurations(read_run(FIXTURE), read_run(resumed))
    assert differences == [Difference("train.cuda_graph", "off", "auto", "none")]


def test_inspect_shows_it_under_the_names_of_today(capfd: pytest.CaptureFixture[str]) -> None:
    report = inspect_run(FIXTURE)
    assert report.config is not None
    assert report.raw["eval"]["classifier"] == {"enabled": False, "per_class": 50}
    assert not {old for old, _ in RENAMED} & report.raw.keys()
    assert capfd.readouterr() == ("", "")  # nobody wrote that file: there is nothing to mend
