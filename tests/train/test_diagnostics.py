"""`logging.diagnostics`, a ramp and heads that learn alone, in runs as a user starts them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from tests.train.conftest import numbers, small_train

# 45 steps an epoch of 32 of 1,437 digits less the last: phases of three steps each.
PER_EPOCH = 44
SETTINGS = [
    "model.dim=32", "model.n_layer=3", "model.n_head=2", "foresight.projector_dim=32", "train.max_steps=12",
    "train.epochs=4", "train.global_batch_size=32", "optimizer.warmup_steps=2", "optimizer.lr=2e-3", "ema.decay=0.9",
    "logging.every_steps=1", "eval.loss.every_steps=null", "eval.classifier.enabled=false", "sampling.at_end=false",
    f"foresight.warmup_epochs={6 / PER_EPOCH}", f"foresight.head_warmup_epochs={3 / PER_EPOCH}",
    f"foresight.ramp_epochs={3 / PER_EPOCH}", "train.micro_batch_size=8", "optimizer.grad_clip=0.5",
    "checkpoint.every_steps=5", "checkpoint.keep_last=3", "eval.loss.at_end=false",
]  # fmt: skip


def run(folder: Path, *more: str) -> Path:
    done = small_train(folder, "--ranks", "1", *more, overrides=SETTINGS)
    assert done.code == 0, done.out[-2000:] + done.err[-3000:]
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("diagnostics") / "measured", "--set", "logging.diagnostics=true")


def test_measuring_changes_no_number(measured: Path, tmp_path: Path) -> None:
    plain, told = numbers(run(tmp_path / "plain")), numbers(measured)
    added = {name for line in told for name in line} - {name for line in plain for name in line}
    heads = ["head1_down0_right0", "head2_down0_right1", "head3_down1_right0"]
    assert added == {
        "foresight/gradient_ntp", "foresight/gradient_alignment", "foresight/gradient_cosine", "optimizer/clip_factor",
        *(f"centred_cosine/{head}" for head in heads),
    }  # fmt: skip
    assert [{name: value for name, value in line.items() if name not in added} for line in told] == plain


def test_the_phases_of_the_alignment(measured: Path) -> None:
    """Asleep, heads alone, a ramp from zero, all of it: three steps each; a step's line says what it did."""
    lines = [line for line in numbers(measured) if "loss/total" in line]
    assert len(lines) == 12
    schedule = [line["foresight/schedule"] for line in lines]
    assert schedule == pytest.approx([0, 0, 0, 1, 1, 1, 0, 1 / 3, 2 / 3, 1, 1, 1], abs=1e-6)
    assert [("loss/alignment" in line) for line in lines] == [False] * 3 + [True] * 9
    assert [line["foresight/gradient_alignment"] > 0 for line in lines[3:]] == [False] * 4 + [True] * 5
    assert all(line["foresight/gradient_ntp"] > 0 for line in lines[3:])
    assert all(-1 <= line["foresight/gradient_cosine"] <= 1 for line in lines[7:])
    first, second = (line["cosine/head1_down0_right0"] for line in (lines[3], lines[6]))
    assert second > first  # three steps of the heads by themselves
    for line in lines:
        total = line["loss/ntp"] + line["foresight/schedule"] * line.get("loss/alignment", 0.0)
        assert line["loss/total"] == pytest.approx(total, rel=1e-5)
        factor = min(1.0, 0.5 / (line["optimizer/grad_norm"] + 1e-6))
        assert math.isclose(line["optimizer/clip_factor"], factor, rel_tol=1e-6)


def test_a_resume_inside_a_phase_goes_on_as_it_was(measured: Path, tmp_path: Path) -> None:
    """Stopped at step 5, where heads learn alone; then at once to the end."""
    folder = run(tmp_path / "resumed", "--set", "logging.diagnostics=true", "--set", "train.max_steps=5")
    run(folder, "--set", "logging.diagnostics=true", "--resume", "auto")
    assert numbers(folder) == numbers(measured)
