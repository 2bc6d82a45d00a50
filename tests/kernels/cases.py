"""Inputs of the alignment loss, and how wrong a result may be: at most twice what PyTorch, computing the same from the
same numbers in the same dtypes, is away from float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mirai_ds.config import ForesightConfig
from mirai_ds.foresight import index_table, slot_counts
from mirai_ds.kernels.foresight_cosine import foresight_cosine
from mirai_ds.kernels.foresight_cosine.reference import foresight_cosine as reference

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is visible"),
        ],
    ),
]


@dataclass(frozen=True)
class Case:
    """Arguments of one call."""

    projected: list[Tensor]  # K of (B, S, C)
    target: Tensor
    index: Tensor
    weights: Tensor
    counts: Tensor
    reduction: str = "sum"

    def to(self, device: str) -> Case:
        """The same numbers on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("target", "index", "weights", "counts")}
        return replace(self, projected=[p.to(device) for p in self.projected], **moved)

    def stacked(self) -> Case:
        """One (B, S, K, C) tensor in place of K."""
        return replace(self, projected=[torch.stack(self.projected, 2)])

    def double(self) -> Case:
        """The same numbers in float64."""
        return replace(self, projected=[p.double() for p in self.projected], target=self.target.double())

    @property
    def rest(self) -> tuple[Any, ...]:
        """Everything after `projected`."""
        return self.target, self.index, self.weights, self.counts, self.reduction


def random_case(
    batch: int, slots: int, rows: int, heads: int, width: int, states: torch.dtype = F32, target: torch.dtype = F32,
    reduction: str = "sum", seed: int = 0,
) -> Case:  # fmt: skip
    """Normal numbers; about one slot in eight has no target, but no head is without any."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, rows, (slots, heads), generator=generator, dtype=torch.int32)
    index[torch.rand(slots, heads, generator=generator) < 1 / 8] = -1
    index[0] = rows - 1
    projected = [torch.randn(batch, slots, width, generator=generator).to(states) for _ in range(heads)]
    features = (torch.randn(batch, rows, width, generator=generator) + 0.3).to(target)
    weights = torch.rand(heads, generator=generator) * 2 + 0.1
    return Case(projected, features, index, weights, (index >= 0).sum(0).float(), reduction)


def grid_case(config: ForesightConfig, grid: int, batch: int, width: int, states: torch.dtype) -> Case:
    """The table that training uses, with features of a teacher that is close to the student."""
    generator = torch.Generator().manual_seed(grid)
    table = index_table(config, grid)
    rows = int(table.max()) + 1
    target = torch.randn(batch, rows, width, generator=generator)
    projected = []
    for k in range(config.heads):
        near = target[:, table[:, k].clamp(min=0)]
        projected.append((near + torch.randn(near.shape, generator=generator)).to(states))
    weights = torch.tensor(config.weights)
    return Case(projected, target, table.int(), weights, slot_counts(config, table), config.heads_reduction or "sum")


def evaluate(case: Case, kernel: str, upstream: float = 1.0, expected: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cosine, gradient of every state) when the loss receives `upstream` and the op was told `expected`."""
    leaves = [p.detach().requires_grad_() for p in case.projected]
    given: Any = leaves[0] if leaves[0].dim() == 4 else leaves
    if kernel == "plain":
        loss, cosine = reference(given, *case.rest)
    else:
        loss, cosine = foresight_cosine(given, *case.rest, kernel=kernel, upstream=expected)
    gradients = torch.autograd.grad(loss * upstream, leaves)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
    stacked = gradients[0] if leaves[0].dim() == 4 else torch.stack(gradients, 2)
    return loss.detach(), cosine, stacked


def steepest(case: Case) -> float:
    """The longest gradient a cosine could give to any row: weight / (count * batch * |state|)."""
    share = 1 / len(case.weights) if case.reduction == "mean" else 1.0
    heads = case.projected[0].unbind(2) if case.projected[0].dim() == 4 else case.projected
    return max(
        float(share * w / (c * p.shape[0]) / p.double().norm(dim=-1).min())
        for p, w, c in zip(heads, case.weights, case.counts, strict=True)
    )


def assert_close_to_exact(case: Case, ours: tuple[Tensor, Tensor, Tensor], upstream: float = 1.0) -> None:
    """Loss, cosines and gradients against float64: at most twice PyTorch's error, or a rounding of the result."""
    exact = evaluate(case.double(), "plain", upstream)
    plain = evaluate(case, "plain", upstream)
    for name, truth, theirs, mine in zip(("loss", "cosine", "gradient"), exact, plain, ours, strict=True):
        # Cosines are sums of terms up to 1, a gradient is the difference of vectors of length |scale| / |state|.
        terms = 1.0 if name != "gradient" else abs(upstream) * steepest(case)
        # What PyTorch may escape by luck, and nobody can by skill: the rounding of the largest number and of the terms
        # that cancel (two coefficients and a product), and the step between the smallest numbers.
        kind = torch.finfo(mine.dtype)
        rounding = kind.eps / 2 * float(truth.abs().max()) + torch.finfo(F32).eps * terms
        rounding += kind.smallest_normal * kind.eps
        allowed = 2 * max(float((theirs.double() - truth).abs().max()), rounding)
        error = float((mine.double() - truth).abs().max())
        assert error <= allowed, f"{name}: {error:.2e} from float64, PyTorch {allowed / 2:.2e}"


def assert_as_exact_as_torch(case: Case, kernel: str, upstream: float = 1.0, expected: float = 1.0) -> None:
    """`kernel`'s results for a loss that receives `upstream`."""
    assert_close_to_exact(case, evaluate(case, kernel, upstream, expected), upstream)
