"""A DeepSpeed whose step is another must be refused, not stepped without clipping or with NaN."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mirai_ds.engine.update import Update


class Zero:
    """As much of DeepSpeed's stage 2 as an update touches."""

    loss_scale = 1.0

    def __init__(self, gradient: torch.Tensor, asks: bool) -> None:
        self.averaged_gradients, self.dp_process_group, self.asks = {0: [gradient]}, None, asks

    def unscale_and_clip_grads(self, *_: Any) -> None:
        """Replaced."""

    def scaled_global_norm(self) -> torch.Tensor:
        """Replaced."""
        raise AssertionError

    def step(self) -> None:
        if self.asks:
            self.scaled_global_norm()


def is_invalid_grad_norm(norm: Any) -> bool:
    """Looked for in the module of the class above."""
    raise AssertionError


def made(zero: Any, fused: bool = True) -> Update:
    parameter = torch.nn.Parameter(torch.zeros(2))
    ds = SimpleNamespace(optimizer=zero, gradient_clipping=lambda: 1.0, step=zero.step)
    return Update(ds, 2, torch.optim.AdamW([parameter], fused=fused), torch.device("cpu"))


def test_norm_and_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
    gradient = torch.tensor([3.0, 4.0])
    update = made(Zero(gradient, asks=True))
    for factor, refusing in ((1.0, 0.0), (float("inf"), 1.0), (1.0, 1.0)):
        update.zero.averaged_gradients = {0: [gradient * factor]}
        update.step()
        assert update.norm == 5.0 * factor
        assert update.base.found_inf == refusing  # type: ignore[attr-defined]
    assert update.base.grad_scale == pytest.approx(5.0)  # type: ignore[attr-defined]
    assert update.confirm_updates() == 2
    update.step()
    assert update.base.found_inf == 0  # type: ignore[attr-defined]
    assert update.confirm_updates() == 0


def test_only_long_gradients_are_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW divides by `grad_scale`; the threshold is 1."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
    update = made(Zero(torch.ones(2), asks=True))
    for gradient, scale in (([30.0, 40.0], 50.0), ([0.6, 0.8], 1.0), ([0.03, 0.04], 1.0), ([0.0, 0.0], 1.0)):
        update.zero.averaged_gradients = {0: [torch.tensor(gradient)]}
        update.step()
        assert update.base.grad_scale == pytest.approx(scale, rel=1e-5)  # type: ignore[attr-defined]


def test_the_first_of_two_refused_updates_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """All from it on are to be made again, whatever comes between two looks."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
    update = made(Zero(torch.ones(2), asks=True))
    for factor in (1.0, float("nan"), 1.0, float("inf"), 1.0):
        update.zero.averaged_gradients = {0: [torch.ones(2) * factor]}
        update.step()
    assert update.confirm_updates() == 4


def test_a_step_that_asks_for_no_norm() -> None:
    with pytest.raises(RuntimeError, match="did not ask for the gradients' norm"):
        made(Zero(torch.ones(2), asks=False)).step()


def test_what_is_to_be_replaced_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Zero, "unscale_and_clip_grads")
    with pytest.raises(RuntimeError, match=r"Zero is not as expected .it has no unscale_and_clip_grads"):
        made(Zero(torch.ones(2), asks=True))


def test_norms_must_be_judged_by_the_function_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(globals(), "is_invalid_grad_norm")
    with pytest.raises(RuntimeError, match="judges norms by another function"):
        made(Zero(torch.ones(2), asks=True)).step()


def test_the_optimizer_must_be_able_to_refuse() -> None:
    with pytest.raises(TypeError, match="AdamW: needs found_inf and grad_scale; give fused=True"):
        made(Zero(torch.ones(2), asks=True), fused=False)
