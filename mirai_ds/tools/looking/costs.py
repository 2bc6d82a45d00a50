"""FLOPs of recipes as the paper counts them and as they are done; `mirai-ds flops`."""

from __future__ import annotations

from mirai_ds.config import ForesightConfig, ModelConfig
from mirai_ds.observe.flops import ViT, known_encoder


def encoder_shape(foresight: ForesightConfig, model: ModelConfig) -> ViT | None:
    """The encoder of a Mirai-I run, by formula where it is one of the paper's, else as timm describes it."""
    if foresight.method != "mirai-i" or foresight.encoder is None:
        return None
    return known_encoder(foresight, model) or _described_by_timm(foresight, model)


def _described_by_timm(foresight: ForesightConfig, model: ModelConfig) -> ViT:
    from mirai_ds.foresight.encoders import encoder_plan

    encoder = foresight.encoder
    assert encoder is not None
    plan, image = encoder_plan(encoder, model.grid)
    depth = encoder.layer or len(plan.blocks)  # type: ignore[arg-type]
    first = plan.blocks[0]  # type: ignore[index]
    above = sum(p.numel() for block in plan.blocks[depth:] for p in block.parameters())  # type: ignore[index]
    patches = model.grid**2
    kernel = plan.patch_embed.proj.weight  # type: ignore[union-attr]
    return ViT(
        int(plan.num_features), depth, int(first.mlp.fc1.out_features), int(kernel.shape[-1]),  # type: ignore[arg-type]
        patches + int(plan.num_prefix_tokens), patches, image,  # type: ignore[arg-type]
        sum(p.numel() for p in plan.parameters()) - above,
    )  # fmt: skip
