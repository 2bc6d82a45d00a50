"""The two verbs on a run that was really trained, and on the same run resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mirai_ds.analysis.compare import compare_runs
from mirai_ds.analysis.inspect_run import inspect_run
from mirai_ds.checkpoint import store
from tests.analysis.fake import cli
from tests.train.conftest import small_train

TINY = [
    "model.dim=32", "model.n_layer=3", "model.n_head=2", "train.max_steps=8", "foresight.warmup_epochs=0",
    "foresight.projector_dim=32", "logging.every_steps=1", "checkpoint.every_steps=4", "eval.loss.every_steps=4",
    "eval.classifier.enabled=false", "sampling.at_end=false", "launch.cpu_ranks=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with checkpoints after 4 and 8."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    done = small_train(run, overrides=TINY)
    assert done.code == 0, done.err[-3000:]
    return run


def test_inspect(trained: Path) -> None:
    report = inspect_run(trained, verify=True)
    assert report.config is not None
    assert [(c.step, c.damage, c.layout) for c in report.checkpoints] == [(4, "", "1 x ZeRO-2"), (8, "", "1 x ZeRO-2")]
    assert (report.latest, report.leftovers, report.notes) == ("step-00000008", [], [])
    folder, info, skipped = store.find(trained, "auto")
    assert (report.resume.step, list(report.resume.skipped)) == (info.step, skipped) == (8, [])
    assert report.checkpoints[-1].path == folder
    assert [(s.ranks, s.resume) for s in report.starts] == [(1, None)]
    assert report.curve.steps == list(range(9))
    last = json.loads((trained / "report.json").read_text())
    found = json.loads(cli("inspect", trained, "--json").stdout)
    for name in ("held_out/ntp_raw", "held_out/ntp_ema", "loss/ntp"):
        assert found["last"][name] == {"step": 8, "value": last[name]["last"]}


def test_a_resumed_run_is_the_same_curve(trained: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    shutil.rmtree(store.folder_of(again, 8))
    assert inspect_run(again, verify=True).resume.step == 4
    done = small_train(again, "--resume", "auto", overrides=TINY)
    assert done.code == 0, done.err[-3000:]
    result = compare_runs(trained, again)
    assert (result.verdict, result.steps, result.only_a_steps, result.only_b_steps) == (
        "identical", list(range(9)), [], [],
    )  # fmt: skip
    names = {m.name for m in result.metrics}
    assert {"loss/ntp", "loss/alignment", "optimizer/grad_norm", "held_out/ntp_ema"} <= names
    assert not any(name.startswith(("speed/", "memory/")) for name in names)
    assert [s.resume for s in inspect_run(again).starts] == [None, "auto"]
    said = cli("compare", trained, again)
    assert said.exit_code == 0
    assert said.stdout.splitlines()[-1] == f"same curve, to the last digit ({len(names)} metrics, 9 steps)"
