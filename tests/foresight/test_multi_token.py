"""Multi-token prediction against cross-entropies written out one token at a time (Mirai, Table 1)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mirai_ds.config import ForesightConfig, ModelConfig
from mirai_ds.foresight import MiraiObjective, TokenTeacher, index_table, offsets
from mirai_ds.model import initialise

torch.set_num_threads(1)

GRID = 4
MODEL = ModelConfig(size="custom", dim=16, n_layer=3, n_head=2, vocab_size=11, num_classes=4, block_size=GRID**2)
TOKENS = torch.randint(11, (3, GRID**2), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([3, 0, 1])


def mtp(**fields: Any) -> ForesightConfig:
    config = ForesightConfig(**{"method": "mtp", "projector_dim": 24, "warmup_epochs": 0.0, **fields})
    config.fill_from_model(MODEL)
    return config


def objective_of(config: ForesightConfig) -> MiraiObjective:
    objective = MiraiObjective(MODEL, config)
    initialise(objective, 0, std=0.3)
    with torch.no_grad():
        objective.gpt.output.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
    return objective


def written_out(objective: MiraiObjective, shifts: list[tuple[int, int]], flat: bool) -> list[float]:
    """Of each head: -log softmax of the token at the shifted cell, mean over images and cells that have one."""
    gpt = objective.gpt
    x = gpt.embed(TOKENS[:, :-1], LABELS, None)
    for block in gpt.layers:
        x = block(x, gpt.rope[: x.shape[1]])
    means = []
    for head, (down, right) in zip(objective.projectors, shifts, strict=True):
        logits = gpt.output(gpt.norm(head(x))).detach()
        found = []
        for b in range(len(TOKENS)):
            for cell in range(GRID**2):  # slot `cell` predicts the token of cell `cell`
                row, column = cell // GRID + down, cell % GRID + right
                later = cell + right if flat else row * GRID + column
                if later >= GRID**2 or (not flat and (row >= GRID or column >= GRID)):
                    continue
                scores = [float(v) for v in logits[b, cell]]
                found.append(math.log(sum(math.exp(v) for v in scores)) - scores[int(TOKENS[b, later])])
        means.append(sum(found) / len(found))
    return means


CASES: dict[str, tuple[dict[str, Any], list[tuple[int, int]]]] = {
    "1d-k3": ({"layout": "1d", "num_heads": 3}, [(0, 1), (0, 2)]),
    "1d-k4": ({"layout": "1d", "num_heads": 4}, [(0, 1), (0, 2), (0, 3)]),
    "2d-k3": ({"convention": "paper", "num_heads": 3}, [(0, 1), (1, 0)]),
    "2d-k4": ({"convention": "paper", "num_heads": 4}, [(0, 1), (1, 0), (1, 1)]),
    "mlp": ({"convention": "paper", "num_heads": 3, "head": "mlp"}, [(0, 1), (1, 0)]),
    "offsets": ({"convention": "paper", "offsets": [[0, 3], [2, 0]]}, [(0, 3), (2, 0)]),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_cross_entropy_written_out(name: str) -> None:
    fields, shifts = CASES[name]
    config = mtp(**fields, weights=[0.5 + k for k in range(len(shifts))])
    assert offsets(config) == shifts
    objective = objective_of(config)
    plain, metrics = objective(TOKENS, LABELS, None)
    total, found = objective(TOKENS, LABELS, None, TokenTeacher(16).features(TOKENS, LABELS, None), 0.25)
    wanted = written_out(objective, shifts, config.layout == "1d")
    assert found["entropy"].tolist() == pytest.approx(wanted, rel=1e-5)
    weighted = sum((0.5 + k) * e for k, e in enumerate(wanted)) / (
        1 if config.heads_reduction == "sum" else len(wanted)
    )
    assert float(found["alignment"]) == pytest.approx(weighted, rel=1e-5)
    assert float(total.detach()) == pytest.approx(float(metrics["ntp"]) + 0.25 * weighted, rel=1e-5)
    assert float(found["ntp"]) == float(plain.detach())


def test_nine_heads_are_the_papers_block() -> None:
    """K = 9 counts the next token: eight heads, in the conventions' orders of the 3x3 block."""
    block = {(r, c) for r in range(3) for c in range(3)} - {(0, 0)}
    for convention in ("official", "paper"):
        found = offsets(mtp(num_heads=9, convention=convention))
        assert (len(found), set(found)) == (8, block)
    assert offsets(mtp(num_heads=9, layout="1d")) == [(0, k) for k in range(1, 9)]


def test_the_authors_flat_shift_wraps_and_the_papers_does_not() -> None:
    wrap, mask = (index_table(mtp(convention=c, num_heads=2), GRID)[:, 0].tolist() for c in ("official", "paper"))
    assert wrap == [*range(1, 16), -1]
    assert mask == [-1 if cell % 4 == 3 else cell + 1 for cell in range(16)]


@pytest.mark.parametrize("layout", ["1d", "2d"])
def test_no_head_sees_what_it_predicts(layout: str) -> None:
    """Changing a token changes no prediction of slots at or before its own cell."""
    objective = objective_of(mtp(layout=layout, num_heads=3))
    other = TOKENS.clone()
    other[:, 6] = (other[:, 6] + 1) % 11

    def logits(tokens: Tensor) -> list[Tensor]:
        states = objective.gpt(tokens[:, :-1], LABELS, tap=(3,)).hidden[3]
        return [objective.gpt.head(head(states)) for head in objective.projectors]

    for before, after in zip(logits(TOKENS), logits(other), strict=True):
        changed = (before != after).any(-1).any(0).tolist()
        assert changed == [slot > 6 for slot in range(16)]  # slot 7 is the first that holds cell 6's token


def test_recomputed_logits_give_the_same_gradients() -> None:
    config, grads = mtp(num_heads=3), []
    for recompute in (False, True):
        objective = objective_of(config)
        objective.recompute_heads = recompute
        loss, _ = objective(TOKENS, LABELS, torch.arange(3), TOKENS, 1.0)
        loss.backward()
        grads.append({name: p.grad for name, p in objective.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None, name
        assert torch.equal(grad, grads[1][name]), name


def test_heads_sleep_without_a_target() -> None:
    objective = objective_of(mtp())
    loss, metrics = objective(TOKENS, LABELS, None)
    loss.backward()
    assert set(metrics) == {"ntp"}
    assert all(p.grad is None for p in objective.projectors.parameters())


def test_defaults() -> None:
    config = mtp()
    assert (config.heads, config.num_heads, config.layer, config.weights) == (2, 3, 3, [1.0, 1.0])
    assert (config.slots, config.head, config.head_attention, config.class_slot) == (
        "predict", "transformer", "causal", False,
    )  # fmt: skip
    assert ForesightConfig(method="mtp").warmup_epochs == 0.0
