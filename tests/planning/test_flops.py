"""Model FLOPs of a training step against hand arithmetic for LlamaGen-B at 256 tokens."""

from __future__ import annotations

import pytest

from mirai_ds.config import ForesightConfig, ModelConfig
from mirai_ds.planning.flops import training_flops

BLOCK, TABLE, SLOTS, WIDTH = 7_077_888, 16384 * 768, 256, 768
BASE = 6 * (12 * BLOCK + TABLE) * SLOTS + 12 * 12 * SLOTS**2 * WIDTH
HEAD = 6 * (768 * 2048 + 2048 * 2048 + 2048 * 768) * SLOTS


def foresight(method: str) -> ForesightConfig:
    config = ForesightConfig(method=method)  # type: ignore[arg-type]
    config.fill_from_model(ModelConfig())
    return config


def test_baseline() -> None:
    assert training_flops(ModelConfig(), foresight("none"), 0, aligned=False) == BASE
    assert pytest.approx(1.570e11, rel=1e-3) == BASE


def test_mirai_i_adds_one_head_and_no_encoder() -> None:
    assert training_flops(ModelConfig(), foresight("mirai-i"), 768, aligned=True) == BASE + HEAD
    assert pytest.approx(1.1282e10, rel=1e-3) == HEAD  # the biases in 7,344,896 parameters make no product


def test_mirai_e_adds_three_heads_and_eight_teacher_blocks() -> None:
    teacher = 8 * (2 * BLOCK * SLOTS + 4 * SLOTS**2 * WIDTH)
    assert training_flops(ModelConfig(), foresight("mirai-e"), 768, aligned=True) == BASE + 3 * HEAD + teacher


def test_warm_up_costs_what_the_baseline_costs() -> None:
    assert training_flops(ModelConfig(), foresight("mirai-e"), 768, aligned=False) == BASE
