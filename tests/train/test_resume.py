"""Resume through the command line: the same numbers, no zig-zag, torn checkpoints skipped aloud."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mirai_ds.checkpoint import store
from mirai_ds.checkpoint.format import StateReader
from mirai_ds.config import UserError
from tests.train.conftest import numbers, records, small_train


def test_resumed_losses_are_bitwise_the_uninterrupted_ones(finished: Path, tmp_path: Path) -> None:
    """From step 11, the last of warm-up, to 33: the heads wake up in the resumed process."""
    run = tmp_path / "resumed"
    shutil.copytree(finished, run)
    for step in (33, 44, 55, 66):
        shutil.rmtree(store.folder_of(run, step))
    torn = store.folder_of(run, 22)
    with (torn / "state-rank00001.safetensors").open("r+b") as file:  # one flipped bit in the newest checkpoint left
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    shorter = ["train.max_steps=33", "eval.classifier.enabled=false"]
    done = small_train(run, "--resume", "auto", *[part for o in shorter for part in ("--set", o)])
    assert done.code == 0, done.out[-2000:] + done.err[-2000:]
    assert "skipped" in done.out
    assert "state-rank00001.safetensors" in done.out
    assert "resumed after step 11" in done.out
    assert numbers(run, first=11) == [r for r in numbers(finished, first=11) if r["step"] <= 33]
    assert [r["step"] for r in records(run) if "loss/ntp" in r] == list(range(1, 34))
    ours, theirs = (StateReader(store.folder_of(r, 33)) for r in (run, finished))
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
        for name in theirs.shapes:
            assert (ours.read(kind, name) == theirs.read(kind, name)).all(), f"{kind}/{name}"
    assert ours.steps == theirs.steps
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    steps = [e.step for e in events.Scalars("loss/ntp")]
    assert steps == sorted(set(steps))


def test_resume_on_another_layout(finished: Path, tmp_path: Path) -> None:
    """The same global batches on one rank with ZeRO-3: losses equal up to rounding, the end of the run reached."""
    run = tmp_path / "elastic"
    shutil.copytree(finished, run)
    for step in (33, 44, 55, 66):
        shutil.rmtree(store.folder_of(run, step))
    done = small_train(run, "--resume", "auto", "--ranks", "1", "--deepspeed", "zero3", "--set", "train.max_steps=30")
    assert done.code == 0, done.out[-2000:] + done.err[-2000:]
    ours = {r["step"]: r["loss/ntp"] for r in numbers(run, 22) if "loss/ntp" in r}
    theirs = {r["step"]: r["loss/ntp"] for r in numbers(finished, 22) if "loss/ntp" in r}
    assert sorted(ours) == list(range(23, 31))
    assert max(abs(ours[s] - theirs[s]) for s in ours) <= 1e-5


def test_only_a_started_run_is_protected(tmp_path: Path) -> None:
    """A start that failed on a mistake leaves its configuration behind and may be repeated; a run's data may not."""
    assert not store.holds_a_run(tmp_path / "none")
    for name in store.START_FILES:
        (tmp_path / name).touch()
    store.check_run_folder(tmp_path, None)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="--resume auto"):
        store.check_run_folder(tmp_path, None)
    store.check_run_folder(tmp_path, None, fresh=True)
