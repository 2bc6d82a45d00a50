"""Precision and recall of samples by nearest-neighbour balls (Kynkaanniemi et al. 2019), exactly and as ADM computes.

A set's manifold is the union of balls around its features, each up to the 3rd nearest neighbour.  Precision is the
share of samples in the reference's manifold, recall the share of reference images in the samples'.
Source: openai/guided-diffusion, evaluations/evaluator.py (commit 22e0df8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mirai_ds.config import UserError
from mirai_ds.runtime.precision import float32_products

NEIGHBOUR = 3
Arithmetic = Literal["adm", "exact"]
# Rows and columns of features whose distances are in memory at once.  ADM's is part of its arithmetic: a block of
# 10,000 x 10,000 is redone in fp32 as a whole.
BLOCKS: dict[Arithmetic, int] = {"adm": 10_000, "exact": 4096}


class PrecisionRecall(NamedTuple):
    """Shares; `fp32_blocks` of `blocks` left the range of fp16 (ADM's arithmetic only)."""

    precision: float
    recall: float
    fp32_blocks: int
    blocks: int


def precision_recall(
    reference: Tensor, samples: Tensor, arithmetic: Arithmetic, block: int | None = None
) -> PrecisionRecall:
    """reference (m, d) and samples (n, d) fp32, on one device.  Memory beside them: some blocks of distances.

    exact: fp64, independent of `block` (but for distances equal to the last digit).  adm: see `adm_distances`.
    Raises UserError for fewer than four rows and for values that are not finite.
    """
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= NEIGHBOUR:
            raise UserError(f"{name}: {len(features)} images; precision and recall need at least {NEIGHBOUR + 1}")
        if not bool(torch.isfinite(features).all()):
            raise UserError(f"{name}: the features hold NaN or infinity; precision and recall cannot be computed")
    blocks = _Blocks(arithmetic, block or BLOCKS[arithmetic])
    with torch.inference_mode(), float32_products("ieee"):
        reference_radii, sample_radii = blocks.radii(reference), blocks.radii(samples)
        reference_inside = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
        samples_inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
        for rows, columns, distances in blocks.of(reference, samples):
            samples_inside[columns] |= (distances <= reference_radii[rows, None]).any(dim=0)
            reference_inside[rows] |= (distances <= sample_radii[None, columns]).any(dim=1)
    precision, recall = (int(inside.sum()) / len(inside) for inside in (samples_inside, reference_inside))
    return PrecisionRecall(precision, recall, blocks.redone, blocks.done)


def exact_distances(u: Tensor, v: Tensor) -> Tensor:
    """Squared distances (m, n) fp64 of u (m, d) and v (n, d)."""
    return _squared_distances(u.double(), v.double())


def adm_distances(u: Tensor, v: Tensor) -> tuple[Tensor, bool]:
    """Squared distances (m, n) fp32 of u (m, d) and v (n, d) fp32 in ADM's half precision, and whether in fp32.

    Features, squares, their sums, 2 u v, and each addition are rounded to fp16; sums within are fp32.  (TensorFlow's
    own order within a half-precision sum is not pinned: counts differ by a few in 1000.)  Unless all are finite the
    block is redone in fp32.  As in ADM this is asked after the clamp at 0, which 2 u v = infinity alone passes.
    """
    a, b = u.half(), v.half()
    squares_a, squares_b = ((x * x).float().sum(dim=1).half() for x in (a, b))
    products = (a.float() @ b.float().T).half()
    distances = (squares_a[:, None] - 2 * products).add_(squares_b[None, :]).clamp_(min=0)
    if bool(torch.isfinite(distances).all()):
        return distances.float(), False
    return _squared_distances(u.float(), v.float()), True


def _squared_distances(u: Tensor, v: Tensor) -> Tensor:
    products = u @ v.T
    return products.mul_(-2).add_((u * u).sum(dim=1)[:, None]).add_((v * v).sum(dim=1)[None, :]).clamp_(min=0)


class _Blocks:
    """Computes distances block by block and counts the blocks that were done and redone."""

    def __init__(self, arithmetic: Arithmetic, size: int) -> None:
        self.distances: Callable[[Tensor, Tensor], Tensor] = exact_distances if arithmetic == "exact" else self._adm
        self.size, self.done, self.redone = size, 0, 0

    def _adm(self, u: Tensor, v: Tensor) -> Tensor:
        distances, redone = adm_distances(u, v)
        self.redone += redone
        return distances

    def of(self, u: Tensor, v: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows, columns, distances) of every block, all columns of some rows before the next rows."""
        for row in range(0, len(u), self.size):
            for column in range(0, len(v), self.size):
                rows, columns = slice(row, row + self.size), slice(column, column + self.size)
                self.done += 1
                yield rows, columns, self.distances(u[rows], v[columns])

    def radii(self, features: Tensor) -> Tensor:
        """(n,) squared distance of each row to its 3rd nearest neighbour: the 4th smallest, itself included."""
        count = NEIGHBOUR + 1
        blocks: list[Tensor] = []
        for _, columns, distances in self.of(features, features):
            nearest = distances.topk(min(count, distances.shape[1]), dim=1, largest=False).values
            if columns.start:
                nearest = torch.cat([blocks.pop(), nearest], dim=1)
                nearest = nearest.topk(min(count, nearest.shape[1]), dim=1, largest=False).values
            blocks.append(nearest)
        return torch.cat([nearest.amax(dim=1) for nearest in blocks])
