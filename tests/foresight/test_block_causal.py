"""Attention within blocks of patches: what a feature may not see does not reach it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mirai_ds.config import EncoderConfig
from mirai_ds.foresight import encoders as module
from mirai_ds.foresight.encoders import attention_mask, encoder_plan, patch_features, restrict_attention
from tests.foresight.test_encoders import (
    LABELS,
    TOKENS,
    fails,
    make_encoder,
    meta,
    normalised,
    random_images,
    teacher_of,
)


def test_the_mask_by_value() -> None:
    """Five patches in blocks of two behind two prefix tokens."""
    rows = ["1100000", "1100000", "1111000", "1111000", "1111110", "1111110", "1111111"]
    wanted = torch.tensor([[character == "1" for character in row] for row in rows])
    assert torch.equal(attention_mask(5, 2, 2), wanted)
    assert torch.equal(attention_mask(6, 0, 1), torch.ones(6, 6).tril().bool())
    assert bool(attention_mask(6, 0, 6).all())


# name -> timm model, options: a class token; registers too; none; EVA with rotary positions and registers
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "class": ("test_vit", {}),
    "registers": ("test_vit", {"reg_tokens": 4}),
    "none": ("test_vit", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "eva": ("vit_small_patch16_dinov3", {"embed_dim": 64, "depth": 4, "num_heads": 2}),
}


def kind_of(kind: str, fused: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
    name, options = KINDS[kind]
    model = make_encoder(name, img_size=64, **options).to(dtype)
    for block in model.blocks:  # type: ignore[union-attr]
        block.attn.fused_attn = fused  # type: ignore[union-attr]
    return model


def inputs_with_one_patch_changed() -> tuple[Tensor, Tensor]:
    """(16, 3, 64, 64) twice: the same image, and with patch p of image p made another."""
    base = normalised(random_images(64)).repeat(16, 1, 1, 1)
    changed = base.clone()
    for p in range(16):
        row, column = 16 * (p // 4), 16 * (p % 4)
        changed[p, :, row : row + 16, column : column + 16] += 1.0
    return base, changed


def seen_by(model: nn.Module, config: EncoderConfig) -> Tensor:
    """(16, 16) bool: [i, j] whether patch i's feature changes with patch j's pixels, bit for bit."""
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        before, after = (patch_features(model, config, x.to(dtype)) for x in inputs_with_one_patch_changed())
    return (before != after).any(-1).T


def allowed(block: int) -> Tensor:
    return torch.tensor([[j // block <= i // block for j in range(16)] for i in range(16)])


@pytest.mark.parametrize("layer", [None, 3])
@pytest.mark.parametrize(("dtype", "fused"), [("fp32", True), ("fp32", False), ("bf16", True), ("bf16", False)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_sees_exactly_its_and_earlier_blocks(kind: str, dtype: str, fused: bool, layer: int | None) -> None:
    for block in (1, 3, 8):
        model = kind_of(kind, fused, torch.float32 if dtype == "fp32" else torch.bfloat16)
        config = meta(block_causal=block, layer=layer)
        restrict_attention(model, 16, config)
        found = seen_by(model, config)
        assert not bool((found & ~allowed(block)).any()), "a later patch shows"
        assert dtype == "bf16" or torch.equal(found, allowed(block))  # bf16 may round a far patch's part away
        assert bool(found.diagonal().all())


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_tokens_would_leak(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above would notice: were prefix tokens to read patches, every patch would see every other."""

    def leaking(patches: int, prefix: int, block: int) -> Tensor:
        mask = attention_mask(patches, prefix, block)
        mask[:prefix] = True
        return mask

    monkeypatch.setattr(module, "attention_mask", leaking)
    model, config = kind_of(kind), meta(block_causal=2)
    restrict_attention(model, 16, config)
    assert torch.equal(seen_by(model, config), allowed(2) if kind == "none" else allowed(16))


def masked_by_hand(model: Any, x: Tensor, block: int) -> Tensor:
    """timm's parts with the mask handed to each block; the loop over blocks is all that is ours."""
    x, rope = model._pos_embed(model.patch_embed(x)), {}
    if isinstance(x, tuple):  # EVA
        x, rope = x[0], {"rope": x[1]}
    x, prefix = model.norm_pre(x), model.num_prefix_tokens
    mask = torch.zeros(prefix + 16, prefix + 16)
    mask[prefix:, prefix:][~allowed(block)] = -torch.inf
    mask[:prefix, prefix:] = -torch.inf
    for layer in model.blocks:
        x = layer(x, attn_mask=mask, **rope)
    return model.norm(x)[:, prefix:]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_restricted_features_by_hand(kind: str, fused: bool) -> None:
    model, x = kind_of(kind, fused), normalised(random_images(64, 2))
    with torch.no_grad():
        free, wanted = patch_features(model, meta(), x), masked_by_hand(model, x, 4)
        restrict_attention(model, 16, meta(block_causal=4))
        found = patch_features(model, meta(block_causal=4), x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert float((found - free).abs().max()) > 0.01


@pytest.mark.parametrize("block", [16, 17, 1000])
def test_a_block_of_all_patches_is_no_restriction(saved: Path, block: int) -> None:
    images = random_images(64, 2)
    free = teacher_of(saved).features(TOKENS, LABELS, images)
    assert torch.equal(teacher_of(saved, block_causal=block).features(TOKENS, LABELS, images), free)
    almost = teacher_of(saved, block_causal=15).features(TOKENS, LABELS, images)
    assert float((almost - free).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_restricted_teacher(saved: Path, dtype: str) -> None:
    """From a file: the image's last rows change nothing above them."""
    teacher = teacher_of(saved, block_causal=4, layer=5, dtype=dtype)
    images = random_images(64)
    other = images.clone()
    other[:, :, 48:] = 255 - other[:, :, 48:]
    before, after = (teacher.features(TOKENS, LABELS, pixels) for pixels in (images, other))
    assert torch.equal(before[:, :12], after[:, :12])
    assert bool((before[:, 12:] != after[:, 12:]).any(-1).all())


def test_attention_without_a_mask() -> None:
    for name in ("vit_relpos_small_patch16_224", "beit_base_patch16_224"):
        fails(lambda name=name: encoder_plan(meta(name=name, block_causal=1), 4), "block_causal", name, "takes no mask")
        encoder_plan(meta(name=name), 4)
