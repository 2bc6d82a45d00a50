"""Floating-point operations of training, counted from matrix products that are really done (a multiply-add is two),
and as the paper counts them."""

from __future__ import annotations

from typing import NamedTuple

from mirai_ds.config import ForesightConfig, ModelConfig
from mirai_ds.config.sizes import block_parameters, heads_parameters, parameter_count


def student_slots(model: ModelConfig) -> int:
    """Slots of a training sequence: the class and x_1..x_{N-1}; PAR's learnable tokens beside them."""
    return model.slots


def block_linear(model: ModelConfig) -> int:
    """Weights in one block's matrices: attention 4 D^2, feed-forward 3 D h."""
    return block_parameters(model) - 2 * model.width


def forward_flops(model: ModelConfig, slots: int, blocks: float, logits: bool) -> float:
    """One forward pass of one sequence: linear layers, attention scores and values (full, not causal half), logits."""
    flops = blocks * (2.0 * block_linear(model) * slots + 4.0 * slots**2 * model.width)
    return flops + (2.0 * model.vocab_size * model.width * min(slots, model.block_size) if logits else 0.0)


def head_flops(model: ModelConfig, foresight: ForesightConfig, feature_dim: int, slots: int) -> float:
    """One forward pass of all heads over all slots; of mtp with the logits of each."""
    width, hidden = model.width, foresight.projector_dim
    one = 2.0 * (width * hidden + hidden**2 + hidden * feature_dim) * slots
    if foresight.head == "transformer":  # attention 4 D^2, MLP 8 D^2, a linear; scores and values full
        one = 2.0 * (12 * width**2 + width * feature_dim) * slots + 4.0 * slots**2 * width
    if foresight.predicts_tokens:
        one += 2.0 * model.vocab_size * width * slots
    return foresight.heads * one


def training_flops(model: ModelConfig, foresight: ForesightConfig, feature_dim: int, aligned: bool) -> float:
    """FLOPs of one training step for one image: forward and backward (3x forward) of GPT and heads, and the Mirai-E
    teacher's forward.  Recomputation is not counted (model FLOPs), nor is a Mirai-I encoder."""
    return sum(training_parts(model, foresight, feature_dim, aligned).values())


class ViT(NamedTuple):
    """A vision transformer as far as it is run.  tokens: patches and prefix tokens; image: side in pixels."""

    width: int
    depth: int
    hidden: int
    patch: int
    tokens: int
    patches: int
    image: int
    parameters: int


# timm's name -> width, depth, patch, prefix tokens, and whether it has a table of positions (DINOv3 rotates instead);
# the feed-forward is four times the width.
_VITS = {
    "vit_base_patch14_dinov2": (768, 12, 14, 1, True),
    "vit_large_patch14_dinov2": (1024, 24, 14, 1, True),
    "vit_base_patch16_dinov3": (768, 12, 16, 5, False),
    "vit_base_patch16_224.mae": (768, 12, 16, 1, True),
    "vit_large_patch16_224.mae": (1024, 24, 16, 1, True),
}


def known_encoder(foresight: ForesightConfig, model: ModelConfig) -> ViT | None:
    """The shape of a Mirai-I encoder of the paper on this grid; None for another encoder, or without one."""
    encoder = foresight.encoder if foresight.teacher == "encoder" else None
    if encoder is None or encoder.timm_name not in _VITS:
        return None
    width, blocks, patch, prefix, positions = _VITS[encoder.timm_name]
    depth = min(encoder.layer or blocks, blocks)
    patches = model.grid**2
    block = 12 * width**2 + 13 * width  # biases and two norms; layer scales are left out
    outside = (3 * patch**2 + 1 + prefix + (patches + 1) * positions + 2) * width
    return ViT(
        width, depth, 4 * width, patch, patches + prefix, patches, encoder.image_size or patch * model.grid,
        depth * block + outside,
    )  # fmt: skip


def encoder_parameters(timm_name: str) -> int:
    """Parameters of a whole encoder of the paper, with the table of positions it is published with."""
    width, blocks, patch, prefix, positions = _VITS[timm_name]
    image = 518 if patch == 14 else 224  # DINOv2's and MAE's; DINOv3 has no table
    outside = 3 * patch**2 + 1 + prefix + ((image // patch) ** 2 + 1) * positions + 2
    # Of a block: biases and norms; DINO scales its two branches, and DINOv3's queries, keys and values have no biases.
    vectors = 13 + 2 * ("dino" in timm_name) - 3 * ("dinov3" in timm_name)
    return blocks * (12 * width**2 + vectors * width) + outside * width


def encoder_flops(vit: ViT) -> float:
    """One forward pass for one image: patch embedding, linear layers, attention."""
    linear = 4 * vit.width**2 + 2 * vit.width * vit.hidden
    blocks = vit.depth * (2.0 * linear * vit.tokens + 4.0 * vit.tokens**2 * vit.width)
    return blocks + 2.0 * 3 * vit.patch**2 * vit.width * vit.patches


def training_parts(
    model: ModelConfig, foresight: ForesightConfig, feature_dim: int, aligned: bool, encoder: ViT | None = None
) -> dict[str, float]:
    """`training_flops` by what does them, per image; with `encoder` its forward pass too."""
    slots = student_slots(model)
    gpt = forward_flops(model, slots, model.depth, logits=True)
    parts = {"gpt forward": gpt, "gpt backward": 2.0 * gpt}
    if not aligned:
        return parts
    heads = head_flops(model, foresight, feature_dim, slots)
    parts |= {"heads forward": heads, "heads backward": 2.0 * heads}
    if foresight.teacher == "gpt" and foresight.teacher_layer is not None:
        seen = slots + (1 if foresight.teacher_sees_last_token else 0)
        parts["teacher forward"] = forward_flops(model, seen, foresight.teacher_layer, logits=False)
    if encoder is not None:
        parts["encoder forward"] = encoder_flops(encoder)
    return parts


def paper_parts(model: ModelConfig, foresight: ForesightConfig, feature_dim: int) -> dict[str, float]:
    """Table 13's way, per image: 6 N S with *all* N parameters, embedding tables too; heads likewise; Mirai-E's teacher
    2 P S + 4 S^2 D a block, P the block's matrices; no encoder.  S: slots, of PAR its learnable tokens too."""
    slots = student_slots(model)
    heads = heads_parameters(foresight, model.width, feature_dim)
    parts = {"gpt": 6.0 * parameter_count(model) * slots, "heads": 6.0 * heads * slots}
    if foresight.predicts_tokens:  # each head runs through the shared unembedding once more
        parts["heads"] += 6.0 * foresight.heads * model.vocab_size * model.width * slots
    if foresight.teacher == "gpt" and foresight.teacher_layer is not None:
        block = 2.0 * block_linear(model) * slots + 4.0 * slots**2 * model.width
        parts["teacher"] = foresight.teacher_layer * block
    return parts


def recomputed_flops(model: ModelConfig, blocks: float) -> float:
    """The second forward pass of `blocks` recomputed blocks, per image: work that model FLOPs leave out."""
    return forward_flops(model, student_slots(model), blocks, logits=False)
