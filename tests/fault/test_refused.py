"""A start that is refused, for whatever mistake, leaves the run's folder as it was; one that is accepted says what is
other than before."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from mirai_ds.checkpoint import store
from mirai_ds.checkpoint.weights import load_weights
from mirai_ds.train.run_folder import keep_settings
from tests.fault.faulty_ranks import run_ranks

SMALL = ["train.max_steps=8", "eval.loss.every_steps=null", "sampling.every_steps=null"]


@pytest.fixture(scope="module")
def run_of_8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("refused") / "run"
    ended = run_ranks(run, settings=SMALL, world=1)
    assert ended.outcome == "finished at step 8\n", ended.out[-3000:]
    return run


@pytest.fixture
def run(run_of_8: Path, tmp_path: Path) -> Path:
    """A copy: what a test does to it is its own."""
    shutil.copytree(run_of_8, tmp_path / "run")
    return tmp_path / "run"


def content(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


MISTAKES = [
    (["--resume", "auto"], ["model.rope_base=10"], r"model.rope_base = 10.0: .*step-00000008 was trained with 10000.0"),
    (["--resume", "auto"], ["model.dim=64"], "model.dim = 64"),
    (["--resume", "auto"], ["optimizer.lr=0.1", "foresight.method=none"], "foresight.method = 'none'"),
    (["--resume", "auto"], ["seed=3"], "seed = 3"),
    (["--resume", "auto"], ["train.global_batch_size=64"], "train.global_batch_size = 64"),
    (["--resume", "auto"], ["data.held_out_fraction=0.3"], "data.held_out_fraction = 0.3"),
    (["--resume", "auto", "--allow-change", "model.rope"], [], "--allow-change model.rope: no such field; did you"),
    (["--resume", "7"], [], "has checkpoints of steps [4, 8]"),
    # A hook of one's own that cannot be had, and a judge's weights that cannot be read: looked at before acceptance.
    (["--resume", "auto"], ["hooks=[log, stop, 'nowhere.here:Hook']"], "nowhere.here:Hook"),
    (["--resume", "auto"], ["eval.fid.at_end=true", "eval.fid.features_weights=none.pth"], "none.pth"),
    # To begin anew is no less a start: nothing is set aside for one that cannot go.
    (["--fresh"], ["train.global_batch_size=4096"], "train.global_batch_size = 4096"),
    (["--fresh"], ["train.init_from=none.pth"], "none.pth"),
    ([], [], "already holds a run"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "settings", "said"), MISTAKES)
def test_a_refused_start_changes_nothing(run: Path, options: list[str], settings: list[str], said: str) -> None:
    before, beside = content(run), sorted(path.name for path in run.parent.iterdir())
    ended = run_ranks(run, *options, settings=[*SMALL, "train.max_steps=12", *settings], world=1)
    assert ended.codes == [2], ended.out[-3000:]
    assert re.search(said if ".*" in said else re.escape(said), ended.out), ended.out[-2000:]
    assert "Traceback" not in ended.out
    assert ended.outcome.startswith("failed ")
    assert content(run) == before
    new = {path.name for path in run.parent.iterdir()} - set(beside)
    assert new <= {"run.rank0.log", "run.outcome"}  # the test's own


def test_a_refused_start_leaves_no_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = run_ranks(run, settings=[*SMALL, "train.init_from=none.pth"])
    assert ended.codes == [2, 2], ended.out[-3000:]
    assert not run.exists()


def test_a_resume_needs_no_initial_weights(run: Path) -> None:
    """They were read once; the file may be gone since."""
    ended = run_ranks(
        run, "--resume", "auto", world=1, settings=[*SMALL, "train.max_steps=9", "train.init_from=gone.pt"]
    )
    assert ended.outcome == "finished at step 9\n", ended.out[-3000:]


def test_settings_of_two_starts_within_a_second_are_both_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mirai_ds.train.run_folder.time.time", lambda: 1_790_000_000.5)
    for text in ("first", "second"):
        keep_settings(tmp_path, text)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "config.before-1790000000.yaml": "first", "config.before-1790000001.yaml": "second",
    }  # fmt: skip


def test_what_may_change_is_announced(run: Path) -> None:
    changes = ["train.max_steps=10", "optimizer.lr=1e-3", "foresight.weights=[1, 1, 1]", "logging.progress=false"]
    ended = run_ranks(run, "--resume", "auto", settings=[*SMALL, *changes], world=1)
    assert ended.outcome == "finished at step 10\n", ended.out[-3000:]
    told = [line.partition("changed since: ")[2] for line in ended.out.splitlines() if "changed since: " in line]
    assert told == [
        "foresight.weights: [2.0, 2.0, 2.0] -> [1.0, 1.0, 1.0]", "optimizer.lr: 0.002 -> 0.001",
        "train.max_steps: 8 -> 10",
    ]  # fmt: skip
    assert store.config_of(store.folder_of(run, 10), store.verify(store.folder_of(run, 10))).optimizer.lr == 1e-3
    assert store.config_of(store.folder_of(run, 8), store.verify(store.folder_of(run, 8))).optimizer.lr == 2e-3
    # The log of the start is whole, from before it was accepted on.
    log = (run / "log.txt").read_text()
    assert log.index("changed since: optimizer.lr") < log.index("resumed after step 8")


def test_what_a_killed_deletion_left_goes_with_the_next_start(run: Path) -> None:
    """Two checkpoints of two steps: nothing is superseded any more, which is when the saver would have removed it."""
    for name in ("step-00000002.deleted-4711", "step-00000012.partial-3"):
        shutil.copytree(store.folder_of(run, 4), run / "checkpoints" / name)
    assert len(store.half_done(run)) == 2
    ended = run_ranks(run, "--resume", "auto", settings=SMALL, world=1)
    assert ended.outcome == "finished at step 8\n", ended.out[-3000:]
    assert store.half_done(run) == []
    assert store.list_steps(run) == [4, 8]


def test_allow_change_is_for_those_who_mean_it(run: Path) -> None:
    settings = [*SMALL, "train.max_steps=9", "model.rope_base=500", "model.ffn_dropout=0.3"]
    ended = run_ranks(run, "--resume", "auto", "--allow-change", "model.rope_base", settings=settings, world=1)
    assert ended.codes == [2], ended.out[-3000:]
    assert "--allow-change model.ffn_dropout" in ended.out
    ended = run_ranks(run, "--resume", "auto", "--allow-change", "model", settings=settings, world=1)
    assert ended.outcome == "finished at step 9\n", ended.out[-3000:]
    assert "changed since: model.rope_base: 10000.0 -> 500.0" in ended.out
    # Whoever reads the run's weights takes the model that they were trained with.
    models = {step: load_weights(run, step=step).config.model for step in (8, 9)}
    assert {step: (model.rope_base, model.ffn_dropout) for step, model in models.items()} == {
        8: (10000.0, 0.1), 9: (500.0, 0.3),
    }  # fmt: skip


def test_fresh_sets_aside_what_is_accepted(run: Path) -> None:
    before = content(run)
    (run / "stop").touch()
    ended = run_ranks(run, "--fresh", settings=[*SMALL, "model.rope_base=500", "train.max_steps=2"])
    assert ended.outcome == "finished at step 2\n", ended.out[-3000:]
    aside: dict[str, Any] = content(run.with_name("run.old-1"))
    assert aside.pop("stop") == b""
    assert aside == before
    assert store.list_steps(run) == [2]
    assert sorted(path.name for path in (run / "incarnations").glob("*.json")) == ["00001.json"]


def test_checkpoints_of_an_earlier_version_are_of_the_runs_configuration(run: Path) -> None:
    """They hold no configuration of their own."""
    folder = store.folder_of(run, 8)
    info = json.loads((folder / "info.json").read_text())
    info.pop("config")
    old = store.info_of(info)
    assert old.config == {}
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("rope_base: 10000.0", "rope_base: 77.0"))
    assert store.config_of(folder, old).model.rope_base == 77.0
    assert store.config_of(folder, store.read_info(folder)).model.rope_base == 10000.0
