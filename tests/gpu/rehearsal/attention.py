"""What CUDA's attention kernels compute, by the formulas: flash, memory-efficient and cuDNN, forward and backward.

Each function takes the arguments of the operator of its name, as CPU tensors, and returns its first outputs; the others
(log-sum-exp, seeds) are only handed from the forward to the backward pass, which here needs none of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor]


def _probabilities(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """softmax(q k^T scale + bias), (B, H, S, T) float32; rows that see nothing are 0."""
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        hidden = torch.where(bias, 0.0, float("-inf")) if bias.dtype == torch.bool else bias.float()
        scores = scores + hidden
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    sees_nothing = (scores == float("-inf")).all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill(sees_nothing, 0.0)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> tuple[Tensor]:
    _without_dropout(dropout)
    return (_probabilities(q.float(), k.float(), bias, causal, scale) @ v.float(),)


def _backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> Gradients:
    _without_dropout(dropout)
    g, q, k, v = g.float(), q.float(), k.float(), v.float()
    p = _probabilities(q, k, bias, causal, scale)
    toward_p = g @ v.transpose(-1, -2)
    toward_scores = p * (toward_p - (toward_p * p).sum(-1, keepdim=True))
    toward_scores = toward_scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    return toward_scores @ k, toward_scores.transpose(-1, -2) @ q, p.transpose(-1, -2) @ g


def _without_dropout(dropout: float) -> None:
    if dropout:
        raise NotImplementedError(f"attention with dropout {dropout} has random numbers that only a GPU draws")


def _flash(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, causal: bool = False, debug: bool = False, *,
    scale: float | None = None,
) -> tuple[Tensor]:  # fmt: skip
    return _forward(q, k, v, None, dropout, causal, scale)


def _efficient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, log_sums: bool, dropout: float = 0.0, causal: bool = False,
    *, scale: float | None = None,
) -> tuple[Tensor]:  # fmt: skip
    return _forward(q, k, v, bias, dropout, causal, scale)


def _cudnn(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, log_sums: bool, dropout: float = 0.0, causal: bool = False,
    debug: bool = False, *, scale: float | None = None,
) -> tuple[Tensor]:  # fmt: skip
    return _forward(q, k, v, bias, dropout, causal, scale)


def _flash_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, starts_q: Any, starts_k: Any,
    longest_q: int, longest_k: int, dropout: float, causal: bool, seed: Tensor, offset: Tensor, *,
    scale: float | None = None, **_: Any,
) -> Gradients:  # fmt: skip
    return _backward(g, q, k, v, None, dropout, causal, scale)


def _efficient_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, log_sums: Tensor, seed: Tensor,
    offset: Tensor, dropout: float, wanted: Any, causal: bool = False, *, scale: float | None = None,
) -> Gradients:  # fmt: skip
    return _backward(g, q, k, v, bias, dropout, causal, scale)


def _cudnn_backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sums: Tensor, seed: Tensor, offset: Tensor,
    bias: Tensor | None, starts_q: Any, starts_k: Any, longest_q: int, longest_k: int, dropout: float, causal: bool, *,
    scale: float | None = None,
) -> Gradients:  # fmt: skip
    return _backward(g, q, k, v, bias, dropout, causal, scale)


FORMULAS = {
    "_scaled_dot_product_flash_attention": _flash,
    "_scaled_dot_product_efficient_attention": _efficient,
    "_scaled_dot_product_cudnn_attention": _cudnn,
    "_scaled_dot_product_flash_attention_backward": _flash_backward,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
}
