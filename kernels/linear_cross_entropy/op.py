"""Cross-entropy of linear logits without ever holding all logits: their gradients are made in the forward pass.

A loss is a scalar, so its gradients are known up to a factor as soon as a chunk's logits are: rows of logits are made,
turned into their gradient on the spot, multiplied into both gradients and dropped.  As many matrix products as the
plain way, a fraction of its memory.  Newer PyTorch has torch.nn.functional.linear_cross_entropy for it; in 2.14 that
computes in fp32 under autocast (docs/performance.md), and 2.8 has none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits alive at a time, in bytes of float32.  On a CPU smaller ones were slower; on a GPU none has been measured.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}


def linear_cross_entropy(states: Tensor, weight: Tensor, targets: Tensor, rows: int | None = None) -> Tensor:
    """Mean cross-entropy of the logits `states @ weight.T`.

    states (R, D), weight (V, D): float32, bfloat16 or float64, under autocast in its dtype; targets (R,) int64.
    rows: of logits at a time; default as many as `CHUNK_BYTES` hold.
    Returns a scalar, float32 (float64 of float64).  Logits, their softmax and the sum are float32; the products are of
    the inputs' dtype, the gradient of `weight` is summed over chunks in float32.  First derivatives only.
    Raises ValueError on shapes that do not fit.
    """
    fits = states.dim() == weight.dim() == 2 and states.shape[1] == weight.shape[1]
    if not fits or targets.shape != states.shape[:1]:
        raise ValueError(
            f"states {tuple(states.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}: expected "
            "(R, D), (V, D), (R,)"
        )
    if rows is None:
        rows = CHUNK_BYTES.get(states.device.type, CHUNK_BYTES["cpu"]) // (4 * len(weight))
    kind = states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    loss: Tensor = _Chunked.apply(states, weight, targets, max(1, rows), dtype, torch.is_grad_enabled())
    return loss


def _gradient(logits: Tensor, wanted: Tensor, picked: Tensor, dtype: torch.dtype) -> Tensor:
    """Softmax less one where wanted, in `dtype`; overwrites the log-softmax `logits` (R, V).  wanted, picked (R, 1)."""
    if not logits.is_cuda:
        return logits.exp_().scatter_(1, wanted, picked.exp() - 1).to(dtype)
    # Deterministic torch scatters by sorting on a GPU, and in its older releases (2.8) the host waits for that.
    is_wanted = torch.arange(logits.shape[1], device=logits.device) == wanted
    return torch.add(logits.exp_(), is_wanted, alpha=-1, out=torch.empty_like(logits, dtype=dtype))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, targets: Tensor, rows: int, dtype: torch.dtype, grad_enabled: bool
    ) -> Tensor:
        """Loss, and both gradients but for the factor 1/R times the gradient of the loss."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for_states, for_weight = (needed and grad_enabled for needed in ctx.needs_input_grad[:2])
        loss = states.new_zeros((), dtype=wide)
        with torch.autocast(states.device.type, enabled=False):
            matrix = weight.to(dtype)
            grad_states = states.new_empty(states.shape, dtype=dtype) if for_states else None
            grad_weight: Tensor | None = None
            for start in range(0, len(states), rows):
                x, wanted = states[start : start + rows].to(dtype), targets[start : start + rows, None]
                # Not log_softmax's own dtype=: bf16 logits would stay beside their fp32 copy until it is done.
                logits = torch.log_softmax(F.linear(x, matrix).to(wide), -1)
                picked = logits.gather(1, wanted)
                loss -= picked.sum()
                if not (for_states or for_weight):
                    continue
                grad = _gradient(logits, wanted, picked, dtype)
                if grad_states is not None:
                    torch.mm(grad, matrix, out=grad_states[start : start + rows])
                if for_weight:
                    part = grad.T @ x
                    grad_weight = part.to(wide) if grad_weight is None else grad_weight.add_(part)
                del logits, grad
        ctx.rows, ctx.dtypes = len(states), (states.dtype, weight.dtype)
        ctx.save_for_backward(grad_states, grad_weight)
        return loss / len(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """The factor.  Nothing is changed in place, so that a kept graph can be asked twice."""
        factor = upstream / ctx.rows  # of the loss's dtype: in bf16 1/576 is 0.23 % too large, and with it the loss
        grads = [
            None if grad is None else (grad.to(factor.dtype) * factor).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return grads[0], grads[1], None, None, None, None
