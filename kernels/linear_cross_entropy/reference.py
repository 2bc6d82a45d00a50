"""The next-token loss in plain PyTorch: what the chunked version must equal."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of linear logits, all of them at once in float32 (float64 for float64 inputs).

    states (R, D) and weight (V, D), any floating dtype; targets (R,) int64 in 0..V-1 -> scalar.
    """
    logits = F.linear(states, weight)
    return F.cross_entropy(logits if logits.dtype.itemsize == 8 else logits.float(), targets)
