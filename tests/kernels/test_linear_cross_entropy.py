"""The chunked next-token loss against plain PyTorch: values, both gradients, every chunk size, all dtypes.

Bounds.  float64: the order of sums only, 1e-12.  Low precision: the error against float64 must not exceed that of the
plain way in the same dtypes, but for the last digit of the bound itself (5 %).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mirai_ds.kernels.linear_cross_entropy import linear_cross_entropy, op
from mirai_ds.kernels.linear_cross_entropy.reference import linear_cross_entropy as plain

Found = tuple[Tensor, Tensor, Tensor]


def task(rows: int = 37, width: int = 24, codes: int = 51, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    states = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(codes, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, codes, (rows,), generator=generator)
    return [states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets]


def solve(function: Any, inputs: list[Tensor], factor: float = 1.0, **named: Any) -> Found:
    loss = function(*inputs, **named)
    return (loss.detach(), *torch.autograd.grad(loss * factor, inputs[:2]))


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("rows", [1, 2, 7, 36, 37, 1000, None])
@pytest.mark.parametrize("factor", [1.0, -0.3])
def test_equals_plain_pytorch_for_any_chunk(rows: int | None, factor: float) -> None:
    inputs = task()
    for found, wanted in zip(solve(linear_cross_entropy, inputs, factor, rows=rows), solve(plain, inputs, factor)):  # noqa: B905
        assert found.dtype == wanted.dtype
        assert distance(found, wanted) <= 1e-12


@pytest.mark.parametrize("codes", [2, 1024])
def test_gradients_by_finite_differences(codes: int) -> None:
    states, weight, targets = task(5, 3, codes)
    short = weight.detach()[:, :].clone().requires_grad_()
    torch.autograd.gradcheck(lambda s, w: linear_cross_entropy(s, w, targets, rows=2), (states, short), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [64, 100, None])
def test_error_is_at_most_that_of_pytorch(dtype: torch.dtype, rows: int | None) -> None:
    inputs = task(300, 64, 500, dtype)
    exact = solve(plain, [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs])
    ours, theirs = solve(linear_cross_entropy, inputs, rows=rows), solve(plain, inputs)
    for name, a, b, wanted in zip(("loss", "states", "weight"), ours, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        bound = max(distance(b, wanted), torch.finfo(torch.float32).eps if name == "loss" else 0.0)
        assert distance(a, wanted) <= 1.05 * bound, name


def scale(found: Tensor, wanted: Tensor) -> float:
    """By how much `found` is too long: its projection onto `wanted`, less one."""
    return float((found.double() * wanted.double()).sum() / wanted.double().square().sum()) - 1


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("rows", [576, 1536, 2048])
@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_in_bf16_are_as_long_as_in_fp64(rows: int, parts: int, autocast: bool) -> None:
    """An error of the scale would be one of lambda: 1 / (rows x parts) rounded to bf16 is up to 0.4 % off, and differs
    from layout to layout.  PyTorch's own scale is within 8e-4 here, the rounding of the softmax."""
    inputs = task(rows, 64, 512, torch.float32 if autocast else torch.bfloat16)
    exact = solve(plain, [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = solve(linear_cross_entropy, inputs, 1 / parts, rows=512)
    for found, wanted in zip(ours[1:], exact[1:], strict=True):
        assert abs(scale(found * parts, wanted)) < 8e-4


def test_under_autocast_products_are_bf16_and_gradients_of_the_inputs_dtype() -> None:
    inputs = task(300, 64, 500, torch.float32)
    exact = solve(plain, [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs])
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = solve(linear_cross_entropy, inputs, rows=128), solve(plain, inputs)
    assert [t.dtype for t in ours] == [torch.float32] * 3
    errors = [(distance(a, w), distance(b, w)) for a, b, w in zip(ours, theirs, exact, strict=True)]
    assert all(1e-6 < mine <= 1.05 * other for mine, other in errors[1:]), errors  # rounded, and no worse
    assert errors[0][0] <= 1.05 * errors[0][1] + 1e-7


def test_a_kept_graph_gives_the_same_twice() -> None:
    states, weight, targets = task()
    loss = linear_cross_entropy(states, weight, targets, rows=10)
    first = torch.autograd.grad(loss, (states, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (states, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_what_is_asked_for() -> None:
    states, weight, targets = task()
    wanted = solve(plain, [states, weight, targets])
    assert (
        distance(torch.autograd.grad(linear_cross_entropy(states, weight.detach(), targets), states)[0], wanted[1])
        <= 1e-12
    )
    assert (
        distance(torch.autograd.grad(linear_cross_entropy(states.detach(), weight, targets), weight)[0], wanted[2])
        <= 1e-12
    )


def test_without_gradients_none_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight, targets = task()
    wanted = plain(states, weight, targets)
    monkeypatch.setattr(torch, "mm", None)  # the product that makes the states' gradient
    with torch.no_grad():
        assert distance(linear_cross_entropy(states, weight, targets, rows=5), wanted) <= 1e-12


def test_values_that_are_not_finite_show_in_loss_and_gradients() -> None:
    states, weight, targets = task()
    with torch.no_grad():
        states[3, 1] = float("nan")
    loss, for_states, for_weight = solve(linear_cross_entropy, [states, weight, targets], rows=8)
    assert loss.isnan()
    assert for_states[3].isnan().all()
    assert for_weight.isnan().any()
    assert for_states[4:].isfinite().all()


def test_never_holds_more_logits_than_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    right = torch.log_softmax
    monkeypatch.setattr(torch, "log_softmax", lambda x, *a, **k: (seen.append(len(x)), right(x, *a, **k))[1])
    monkeypatch.setitem(op.CHUNK_BYTES, "cpu", 10 * 4 * 51)
    solve(linear_cross_entropy, task())
    assert seen == [10, 10, 10, 7]


def test_shapes_that_do_not_fit_are_named() -> None:
    states, weight, targets = task()
    with pytest.raises(ValueError, match=r"states \(37, 24\), weight \(51, 23\)"):
        linear_cross_entropy(states, weight[:, 1:], targets)
    with pytest.raises(ValueError, match=r"targets \(36,\)"):
        linear_cross_entropy(states, weight, targets[1:])
