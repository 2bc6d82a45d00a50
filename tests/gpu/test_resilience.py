"""Interrupted runs on a GPU: the same promises as in tests/fault, one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mirai_ds.checkpoint import store
from mirai_ds.checkpoint.format import StateReader
from tests.train.conftest import mirai_ds

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible"),
]
SETTINGS = [
    "train.max_steps=16", "train.global_batch_size=32", "foresight.warmup_epochs=0.1", "logging.every_steps=1",
    "checkpoint.every_steps=4", "checkpoint.keep_last=9", "eval.loss.every_steps=8", "sampling.at_end=false",
    "eval.classifier.enabled=false", "train.precision=bf16-autocast",
]  # fmt: skip


def train(run: Path, *extra: str) -> str:
    settings = [part for o in SETTINGS for part in ("--set", o)]
    done = mirai_ds("train", "digits-mirai-e", *settings, "--run-dir", str(run), "--ranks", "1", *extra, timeout=280)
    assert done.code == 0, done.out[-2000:] + done.err[-3000:]
    return done.out


def curve(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith(("speed/", "memory/"))} for r in lines]


def same_state(a: Path, b: Path, step: int) -> None:
    ours, theirs = (StateReader(store.folder_of(run, step)) for run in (a, b))
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
        for name in theirs.shapes:
            assert torch.equal(ours.read(kind, name), theirs.read(kind, name)), f"{kind}/{name}"


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_resume_and_background_saves_change_no_bit(tmp_path: Path, stage: str) -> None:
    """Copies of the state are taken through pinned memory while the next step waits; a resume repeats the rest."""
    whole, other = tmp_path / "whole", tmp_path / "other"
    train(whole, "--deepspeed", stage)
    train(other, "--deepspeed", stage, "--set", "checkpoint.background=true", "--set", "train.max_steps=9")
    assert store.list_steps(other) == [4, 8, 9]
    same_state(other, whole, 8)
    out = train(other, "--deepspeed", stage, "--resume", "auto")
    assert "resumed after step 9" in out
    assert curve(other)[-1] == curve(whole)[-1]
    same_state(other, whole, 16)
