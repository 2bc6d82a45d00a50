"""Multi-token prediction through the command line: warm-up, metrics, pictures, resume."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from mirai_ds.checkpoint import store
from tests.train.conftest import SMALL, numbers, small_train


@pytest.mark.exhaustive
def test_a_run(tmp_path: Path) -> None:
    kept = [o for o in SMALL if not o.startswith(("checkpoint.", "sampling.", "eval.classifier.", "foresight.warmup"))]
    overrides = [
        *kept, "foresight={method: mtp, num_heads: 3, warmup_epochs: 0.1}", "train.max_steps=10", "train.epochs=3",
        "checkpoint.every_steps=3", "checkpoint.keep_last=6", "eval.classifier.enabled=false", "sampling.at_end=false",
        "eval.loss.at_end=false",
    ]  # fmt: skip
    run, again = tmp_path / "run", tmp_path / "again"
    done = small_train(run, overrides=overrides)
    assert done.code == 0, done.out[-2000:] + done.err[-2000:]
    assert "alignment loss:" not in done.out  # no cosine, so no kernel for it
    names = [sorted(k for k in record if k.startswith("entropy/")) for record in numbers(run)]
    heads = ["entropy/head1_down0_right1", "entropy/head2_down1_right0"]
    assert names == [[]] * 5 + [heads] * 5  # 44 steps an epoch: steps 5 and on are aligned
    last = numbers(run)[-1]
    assert 0.5 < last[heads[0]] < math.log(17)
    total = last["loss/ntp"] + last[heads[0]] + last[heads[1]]
    assert last["loss/total"] == pytest.approx(total, rel=1e-5)
    assert (run / "loss.png").is_file()
    shutil.copytree(run, again)
    for step in (6, 9, 10):
        shutil.rmtree(store.folder_of(again, step))
    resumed = small_train(again, "--resume", "auto", overrides=overrides)  # from 3, asleep
    assert resumed.code == 0, resumed.out[-2000:] + resumed.err[-2000:]
    assert numbers(again) == numbers(run)
