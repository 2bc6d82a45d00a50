"""Floating-point operations of training, counted from matrix products that are really done (a multiply-add is two)."""

from __future__ import annotations

from mirai_ds.config import ForesightConfig, ModelConfig


def forward_flops(model: ModelConfig, slots: int, blocks: int, logits: bool) -> float:
    """One forward pass of one sequence: linear layers, attention scores and values (full, not causal half), logits."""
    linear = 4 * model.width**2 + 3 * model.width * model.ffn_hidden
    flops = blocks * (2.0 * linear * slots + 4.0 * slots**2 * model.width)
    return flops + (2.0 * model.vocab_size * model.width * slots if logits else 0.0)


def head_flops(model: ModelConfig, foresight: ForesightConfig, feature_dim: int, slots: int) -> float:
    """One forward pass of all heads over all slots; of mtp with the logits of each."""
    width, hidden = model.width, foresight.projector_dim
    one = 2.0 * (width * hidden + hidden**2 + hidden * feature_dim) * slots
    if foresight.head == "transformer":  # attention 4 D^2, MLP 8 D^2, a linear; scores and values full
        one = 2.0 * (12 * width**2 + width * feature_dim) * slots + 4.0 * slots**2 * width
    if foresight.method == "mtp":
        one += 2.0 * model.vocab_size * width * slots
    return foresight.heads * one


def training_flops(model: ModelConfig, foresight: ForesightConfig, feature_dim: int, aligned: bool) -> float:
    """FLOPs of one training step for one image: forward and backward (3x forward) of GPT and heads, and the Mirai-E
    teacher's forward.  Recomputation is not counted (model FLOPs), nor is a Mirai-I encoder."""
    slots = model.block_size
    flops = 3.0 * forward_flops(model, slots, model.depth, logits=True)
    if aligned:
        flops += 3.0 * head_flops(model, foresight, feature_dim, slots)
        if foresight.method == "mirai-e" and foresight.teacher_layer is not None:
            seen = slots + (1 if foresight.teacher_sees_last_token else 0)
            flops += forward_flops(model, seen, foresight.teacher_layer, logits=False)
    return flops
