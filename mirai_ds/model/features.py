"""What a network has in mind at each token: hidden states by raster cell."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mirai_ds.model.gpt import GPT

Slots = Literal["input", "predict", "all"]
_BATCH = 64


@torch.no_grad()
def token_features(gpt: GPT, tokens: Tensor, labels: Tensor, layer: int, slots: Slots = "input") -> Tensor:
    """tokens (n, N), labels (n,) -> float32 on CPU: the residual stream after block `layer` (1-based), without dropout.

    slots: (n, N, D) of the slot that holds (`input`) or predicts (`predict`) each token, tokens in raster order also of
    PAR; `all`: (n, S, D) of the sequence's slots as they lie, the class first.
    """
    device, parts = gpt.norm.weight.device, []
    order = gpt.order.positions()
    chosen = {"input": [order.input_slot[q] for q in order.number], "predict": list(order.number)}.get(slots)
    for chunk, label in zip(tokens.split(_BATCH), labels.split(_BATCH), strict=True):
        x = gpt.embed(chunk.to(device), label.to(device), None)
        _, hidden = gpt.blocks(x, None, (layer,))
        states = hidden[layer] if chosen is None else hidden[layer][:, chosen]
        parts.append(states.float().cpu())
    return torch.cat(parts)
