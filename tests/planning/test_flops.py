"""Model FLOPs of a training step of GPT-B at 256 tokens against PyTorch's own counter, on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mirai_ds.config import ForesightConfig, ModelConfig
from mirai_ds.foresight import MiraiObjective
from mirai_ds.model import GPTTrunk
from mirai_ds.planning.flops import training_flops

GPT_B = ModelConfig(token_dropout=0, resid_dropout=0, ffn_dropout=0)


def foresight(method: str) -> ForesightConfig:
    config = ForesightConfig(method=method)  # type: ignore[arg-type]
    config.fill_from_model(GPT_B)
    return config


def counted(work: Callable[[], Any]) -> int:
    """Attention as plain products: the counter does not know the fused one."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@cache
def of_the_baseline() -> int:
    with torch.device("meta"):
        objective = MiraiObjective(GPT_B, foresight("none"), None)
        tokens, labels = torch.zeros((1, 256), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    return counted(lambda: objective(tokens, labels, None, None, 1.0)[0].backward())


@cache
def of_the_heads(method: str) -> int:
    """Forward and backward; what they are given has a gradient, as the student's states have."""
    with torch.device("meta"):
        heads = MiraiObjective(GPT_B, foresight(method), 768).projectors
        states = torch.zeros(1, 256, 768, requires_grad=True)
    return sum(counted(lambda head=head: head(states).sum().backward()) for head in heads)  # type: ignore[misc]


def test_baseline() -> None:
    assert training_flops(GPT_B, foresight("none"), 0, aligned=False) == of_the_baseline()
    assert of_the_baseline() == pytest.approx(1.570e11, rel=1e-3)


def test_mirai_i_adds_one_head_and_no_encoder() -> None:
    found = training_flops(GPT_B, foresight("mirai-i"), 768, aligned=True)
    assert found == of_the_baseline() + of_the_heads("mirai-i")
    assert of_the_heads("mirai-i") == pytest.approx(1.1282e10, rel=1e-3)


def test_mirai_e_adds_three_heads_and_eight_teacher_blocks() -> None:
    config = foresight("mirai-e")
    with torch.device("meta"), torch.no_grad():
        trunk = GPTTrunk(GPT_B, 8)
        tokens, labels = torch.zeros((1, 255), dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        teacher = counted(lambda: trunk.features(tokens, labels))
    found = training_flops(GPT_B, config, 768, aligned=True)
    assert found == of_the_baseline() + of_the_heads("mirai-e") + teacher
    assert of_the_heads("mirai-e") == 3 * of_the_heads("mirai-i")


def test_warm_up_costs_what_the_baseline_costs() -> None:
    assert training_flops(GPT_B, foresight("mirai-e"), 768, aligned=False) == of_the_baseline()
