"""The compiled alignment loss against float64: every shape, dtype, layout and border rule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mirai_ds.config import ForesightConfig
from mirai_ds.kernels.foresight_cosine import foresight_cosine
from tests.kernels.cases import (
    BF16,
    DEVICES,
    F16,
    F32,
    Case,
    assert_as_exact_as_torch,
    evaluate,
    grid_case,
    random_case,
)

pytestmark = pytest.mark.parametrize("device", DEVICES)
DTYPES = [
    (F32, F32),
    (BF16, BF16),
    (F16, F16),
    (BF16, F32),
    (F32, BF16),
    (F16, F32),
    (F32, F16),
    (BF16, F16),
    (F16, BF16),
]


@pytest.mark.parametrize("width", [1, 7, 8, 12, 31, 65, 256, 264, 772, 768, 1024, 1280, 1536, 2050, 3200])
@pytest.mark.parametrize(("states", "target"), DTYPES[:4], ids=str)
def test_every_width(device: str, width: int, states: torch.dtype, target: torch.dtype) -> None:
    assert_as_exact_as_torch(random_case(2, 9, 11, 3, width, states, target).to(device), device)


@pytest.mark.parametrize(("states", "target"), DTYPES, ids=str)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_every_dtype_and_layout(
    device: str, states: torch.dtype, target: torch.dtype, stacked: bool, reduction: str
) -> None:
    case = random_case(3, 10, 12, 4, 72, states, target, reduction).to(device)
    assert_as_exact_as_torch(case.stacked() if stacked else case, device)


@pytest.mark.parametrize("heads", range(1, 10))
@pytest.mark.parametrize(("batch", "slots", "rows"), [(1, 1, 1), (1, 5, 1), (5, 1, 3), (2, 16, 17)])
def test_every_number_of_heads(device: str, heads: int, batch: int, slots: int, rows: int) -> None:
    assert_as_exact_as_torch(random_case(batch, slots, rows, heads, 96, seed=heads).to(device), device)


@pytest.mark.parametrize("grid", [4, 7, 16, 24])
@pytest.mark.parametrize("border", ["mask", "wrap", "clamp", "nearest"])
@pytest.mark.parametrize("method", ["mirai-e", "mirai-i"])
@pytest.mark.parametrize("normalizer", ["valid", "constant"])
def test_every_border_rule(device: str, grid: int, border: str, method: str, normalizer: str) -> None:
    config = ForesightConfig(method=method, num_heads=3, border=border, normalizer=normalizer)  # type: ignore[arg-type]
    for states in (F32, BF16):
        assert_as_exact_as_torch(grid_case(config, grid, 2, 48, states).to(device), device)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*[st.integers(1, top) for top in (3, 12, 12, 9, 80)]),
    dtypes=st.sampled_from(DTYPES),
    stacked=st.booleans(),
    reduction=st.sampled_from(["sum", "mean"]),
    upstream=st.sampled_from([1.0, 0.25, -3.0, 1e-4]),
    guessed=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape(
    device: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], stacked: bool, reduction: str,
    upstream: float, guessed: bool, seed: int,
) -> None:  # fmt: skip
    batch, slots, rows, heads, width = shape
    case = random_case(batch, slots, rows, heads, width, dtypes[0], dtypes[1], reduction, seed).to(device)
    if width == 1:  # d cos / d x is 0 there, and both sides return the rounding error of 1 - 1
        upstream = 1.0
    assert_as_exact_as_torch(case.stacked() if stacked else case, device, upstream, upstream if guessed else 1.0)


def test_rows_anywhere_in_memory(device: str) -> None:
    """Transposed, sliced, strided, misaligned: the same numbers give the same bits."""
    case = random_case(3, 8, 11, 2, 64, BF16).to(device)
    wanted = evaluate(case, device)
    for wide in (
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: torch.cat([t, t], -1)[..., :64],
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: torch.cat([t[..., :8], t], -1)[..., 8:],
    ):
        moved = replace(case, projected=[wide(p) for p in case.projected], target=wide(case.target))
        assert not moved.projected[0].is_contiguous()
        for mine, theirs in zip(evaluate(moved, device), wanted, strict=True):
            assert torch.equal(mine, theirs)
    odd = replace(case, projected=[torch.cat([p[..., :1], p], -1)[..., 1:] for p in case.projected])
    assert_as_exact_as_torch(odd, device)  # 2 bytes off the 16-byte grid: another path on CUDA


def test_slots_without_a_target_do_not_matter(device: str) -> None:
    case = random_case(2, 12, 11, 3, 24).to(device)
    loss, cosine, gradient = evaluate(case, device)
    free = case.index < 0
    assert bool(free.any())
    broken = [p.clone() for p in case.projected]
    for k, states in enumerate(broken):
        states[:, free[:, k]] = math.nan
    again = evaluate(replace(case, projected=broken), device)
    assert torch.equal(again[0], loss)
    assert torch.equal(again[1], cosine)
    assert torch.equal(again[2], gradient)
    assert float(gradient[:, free].abs().max()) == 0
    assert float(gradient[:, ~free].abs().amin(0).amin(0).max()) > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["projected", "target"])
@pytest.mark.parametrize("column", [3, 40])  # within a vector, and in the tail
def test_what_is_not_finite_is_not_hidden(device: str, value: float, where: str, column: int) -> None:
    case = random_case(2, 5, 5, 2, 41)
    case.index[:] = torch.arange(5)[:, None]
    broken = (case.projected[1] if where == "projected" else case.target).clone()
    broken[1, 3, column] = value
    if where == "projected":
        case = replace(case, projected=[case.projected[0], broken])
    else:
        case = replace(case, target=broken)
    loss, cosine, gradient = evaluate(case.to(device), device)
    assert math.isnan(float(loss))
    assert math.isnan(float(cosine[1]))
    assert math.isnan(float(cosine[0])) == (where == "target")
    bad = torch.isnan(gradient).any(-1)
    heads = [1] if where == "projected" else [0, 1]
    assert bad.nonzero().tolist() == [[1, 3, k] for k in heads]


def test_zero_and_tiny_vectors(device: str) -> None:
    """Norms below 1e-12 are clamped and carry no gradient, as F.normalize has it."""
    case = random_case(2, 6, 6, 1, 16)
    case.index[:, 0] = torch.arange(6)
    states, target = case.projected[0], case.target
    states[0, 0], states[0, 1], states[0, 2] = 0.0, states[0, 1] * 1e-14, states[0, 2] * 1e-11
    target[0, 3], target[0, 4], states[1, 5], target[1, 5] = 0.0, target[0, 4] * 1e-14, 0.0, 0.0
    case = case.to(device)
    loss, cosine, gradient = evaluate(case, device)
    exact = evaluate(case.double(), "plain")
    assert float(loss) == pytest.approx(float(exact[0]), rel=1e-5)
    assert cosine.tolist() == pytest.approx(exact[1].tolist(), rel=1e-5)
    scale = exact[2].abs().amax(-1, keepdim=True)
    assert float(scale[0, 0]) > 1e8  # the clamp's slope: 1e12 times the direction of the target
    assert bool(torch.isfinite(gradient).all())
    assert float(((gradient.double() - exact[2]).abs() / scale.clamp(min=1e-30)).max()) < 1e-5
    assert float(gradient[0, 3].abs().max()) == 0


def test_the_same_bits_every_time(device: str) -> None:
    case = random_case(4, 200, 201, 3, 768, BF16).to(device)
    first = evaluate(case, device)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            for mine, theirs in zip(evaluate(case, device), first, strict=True):
                assert torch.equal(mine, theirs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("width", [768, 1000])
@pytest.mark.parametrize("states", [F32, BF16])
def test_a_gradient_larger_than_the_cache(device: str, width: int, states: torch.dtype) -> None:
    """Large gradients are written past the cache: the same bits as those of one image at a time."""
    case = random_case(32, 128, 128, 2, width, states).to(device)
    _, _, together = evaluate(case, device)
    assert states != F32 or together.numel() * 4 >= 16 << 20  # kBeyondCache in cpu.cpp
    for image in (0, 17, 31):
        projected = [p[image : image + 1] for p in case.projected]
        alone = replace(case, projected=projected, target=case.target[image : image + 1], counts=case.counts * 32)
        assert torch.equal(evaluate(alone, device)[2][0], together[image])


def test_a_wrong_index_stops_before_anything_is_read(device: str) -> None:
    case: Case = random_case(2, 9, 11, 3, 16).to(device)
    for bad in (11, -2, 2**31 - 1, -(2**31)):
        index = case.index.clone()
        index[2, 1] = bad
        with pytest.raises(IndexError, match=rf"index reaches {bad}, target has 11 rows"):
            foresight_cosine(case.projected, case.target, index, case.weights, case.counts, kernel=device)
