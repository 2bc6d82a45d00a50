"""Precision and recall against an independent rewrite, in fp64 and in ADM's half precision with its fallback."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mirai_ds.eval.metrics import manifold
from mirai_ds.eval.metrics.manifold import Arithmetic, adm_distances, exact_distances, precision_recall
from tests.one_line import one_line

Array = np.ndarray[Any, Any]


def gaussian(rows: int, seed: int, width: int = 12, scale: float = 1.0, shift: float = 0.0) -> Array:
    return (np.random.default_rng(seed).standard_normal((rows, width)) * scale + shift).astype(np.float32)


def integers(rows: int, seed: int, shift: int = 0) -> Array:
    """Whole numbers up to 60: fp32 sums of their products are exact in any order, halves are not (norms of 14,000)."""
    return np.random.default_rng(seed).integers(-50, 51, (rows, 12)).astype(np.float32) + np.float32(shift)


def plain_half(u: Array, v: Array) -> Array | None:
    """One distance at a time, each step in float16; None when one is not finite."""
    out = np.zeros((len(u), len(v)), np.float32)
    with np.errstate(all="ignore"):
        for i, a in enumerate(u.astype(np.float16)):
            for j, b in enumerate(v.astype(np.float16)):
                norm_a = np.float16((a * a).sum(dtype=np.float32))
                norm_b = np.float16((b * b).sum(dtype=np.float32))
                product = np.float16(np.float32(a.astype(np.float32) @ b.astype(np.float32)))
                distance = np.float16(np.float16(norm_a - np.float16(np.float16(2) * product)) + norm_b)
                if distance < 0:
                    distance = np.float16(0)
                out[i, j] = distance
    return out if np.isfinite(out).all() else None


def plain(reference: Array, samples: Array, block: int | None = None) -> tuple[float, float]:
    """All distances at once: fp64 by differences, or half precision with fp32 for a block that is not finite."""

    def distances(u: Array, v: Array) -> Array:
        out = np.zeros((len(u), len(v)))
        if block is None:
            for i, a in enumerate(u.astype(np.float64)):
                out[i] = ((a - v.astype(np.float64)) ** 2).sum(axis=1)
            return out
        for i in range(0, len(u), block):
            for j in range(0, len(v), block):
                a, b = u[i : i + block], v[j : j + block]
                half = plain_half(a, b)
                if half is None:
                    half = (a * a).sum(1)[:, None] - 2 * a @ b.T + (b * b).sum(1)[None]
                out[i : i + block, j : j + block] = np.maximum(half, 0)
        return out

    reference_radii = np.sort(distances(reference, reference), axis=1)[:, 3]
    sample_radii = np.sort(distances(samples, samples), axis=1)[:, 3]
    between = distances(reference, samples)
    inside = (between <= reference_radii[:, None]).any(axis=0), (between <= sample_radii[None]).any(axis=1)
    return float(inside[0].mean()), float(inside[1].mean())


def both(reference: Array, samples: Array, arithmetic: Arithmetic, block: int | None = None) -> Any:
    return precision_recall(torch.from_numpy(reference), torch.from_numpy(samples), arithmetic, block)


def test_exact_is_the_definition() -> None:
    reference, samples = gaussian(80, 0), gaussian(110, 1, shift=0.4, scale=1.3)
    found = both(reference, samples, "exact")
    assert found[:2] == plain(reference, samples)
    assert 0.1 < found.precision < 0.9
    assert 0.1 < found.recall < 0.95
    assert found.precision != found.recall
    swapped = both(samples, reference, "exact")
    assert (swapped.precision, swapped.recall) == (found.recall, found.precision)


@pytest.mark.parametrize("arithmetic", ["exact", "adm"])
def test_balls_are_closed(arithmetic: Arithmetic) -> None:
    """0, 1, 2, 3: the ball of 0 reaches to -3, which is inside, and not to -4.  Whole numbers: exact in both."""
    line, others = (np.array(v, np.float32)[:, None] for v in ([0, 1, 2, 3], [-3, -4, 100, 101]))
    assert both(line, others, arithmetic)[:2] == (0.25, 1.0)
    assert both(others, line, arithmetic)[:2] == (1.0, 0.25)


@pytest.mark.parametrize("arithmetic", ["exact", "adm"])
@pytest.mark.parametrize("block", [2, 3, 7, 64, 80, 109])
def test_blocks_do_not_show(arithmetic: Arithmetic, block: int) -> None:
    """Also blocks narrower than the four neighbours that a radius needs."""
    reference, samples = integers(80, 0), integers(110, 1, shift=9)
    whole = both(reference, samples, arithmetic, 1000)
    found = both(reference, samples, arithmetic, block)
    assert found[:2] == whole[:2]
    up = [-(-rows // block) for rows in (80, 110)]
    assert (whole.blocks, found.blocks) == (3, up[0] ** 2 + up[1] ** 2 + up[0] * up[1])


def test_half_precision_is_adms() -> None:
    """The rewrite rounds at every step to half; halves of 14,000 are 8 apart."""
    reference, samples = integers(60, 2), integers(70, 3, shift=9)
    found, redone = adm_distances(torch.from_numpy(reference), torch.from_numpy(samples))
    assert not redone
    np.testing.assert_array_equal(found.numpy(), plain_half(reference, samples))
    exact = exact_distances(torch.from_numpy(reference), torch.from_numpy(samples)).numpy()
    assert np.abs(found.numpy() - exact).max() >= 16  # so half precision shows
    result = both(reference, samples, "adm")
    assert result[:2] == plain(reference, samples, block=1000)
    assert result.fp32_blocks == 0


def test_a_block_out_of_range_is_redone_in_fp32() -> None:
    """One row of norm 277 (76,800 > 65,504, the largest half) makes its blocks fp32 and leaves the others alone."""
    reference, samples = integers(60, 2), integers(70, 3, shift=9)
    reference[5] = 80
    u, v = torch.from_numpy(reference), torch.from_numpy(samples)
    found, redone = adm_distances(u, v)
    assert redone
    np.testing.assert_array_equal(found.numpy(), exact_distances(u, v).numpy())
    result = both(reference, samples, "adm", 20)  # 3 x 3 blocks of reference, 4 x 4 of samples, 3 x 4 between
    assert (result.blocks, result.fp32_blocks) == (37, 5 + 0 + 4)
    assert result[:2] == plain(reference, samples, block=20)
    assert both(reference, samples, "adm", 1000).fp32_blocks == 2  # radii of the reference, and between


def test_what_adm_takes_for_finite() -> None:
    """2uv alone out of range is minus infinity, clamped to 0 before ADM asks: close rows of norm 200 count as equal.

    Norms of Inception's features stay far below; this pins what the number means where they do not.
    """
    row = np.full((1, 4), 100.0, np.float32)
    found, redone = adm_distances(torch.from_numpy(row), torch.from_numpy(row * 1.2))
    assert (float(found), redone) == (0.0, False)
    assert float(exact_distances(torch.from_numpy(row), torch.from_numpy(row * 1.2))) == pytest.approx(1600, rel=1e-6)


def test_block_of_adm_is_ten_thousand() -> None:
    assert manifold.BLOCKS["adm"] == 10_000


def test_too_few_and_not_finite() -> None:
    rows = gaussian(10, 0)
    one_line(lambda: both(rows[:3], rows, "exact"), "reference: 3 images", "at least 4")
    one_line(lambda: both(rows, rows[:2], "exact"), "samples: 2 images")
    spoiled = rows.copy()
    spoiled[3, 3] = np.nan
    one_line(lambda: both(rows, spoiled, "adm"), "samples", "NaN")
