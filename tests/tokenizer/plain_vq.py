"""LlamaGen's VQ tokenizer again, as functions of a dict of tensors: what the project's networks are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def shapes(
    ch: int = 128, mult: tuple[int, ...] = (1, 1, 2, 2, 4), z: int = 256, codes: int = 16384, dim: int = 8,
    encoder_blocks: int = 2, decoder_blocks: int = 3,
) -> Shapes:  # fmt: skip
    """Every entry of the state dict."""
    out: Shapes = {"quantize.embedding.weight": (codes, dim), "quantize.codebook_used": (65536,)}

    def conv(name: str, inside: int, outside: int, kernel: int) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = (outside, inside, kernel, kernel), (outside,)

    def norm(name: str, width: int) -> None:
        out[f"{name}.weight"] = out[f"{name}.bias"] = (width,)

    def res(name: str, inside: int, outside: int) -> None:
        norm(f"{name}.norm1", inside)
        conv(f"{name}.conv1", inside, outside, 3)
        norm(f"{name}.norm2", outside)
        conv(f"{name}.conv2", outside, outside, 3)
        if inside != outside:
            conv(f"{name}.nin_shortcut", inside, outside, 1)

    def attn(name: str, width: int) -> None:
        norm(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    last, top = len(mult) - 1, ch * mult[-1]
    for side, order, blocks in (
        ("encoder", range(last + 1), encoder_blocks),
        ("decoder", range(last, -1, -1), decoder_blocks),
    ):
        res(f"{side}.mid.0", top, top)
        attn(f"{side}.mid.1", top)
        res(f"{side}.mid.2", top, top)
        width = ch if side == "encoder" else top
        for i, level in enumerate(order):
            for j in range(blocks):
                res(f"{side}.conv_blocks.{i}.res.{j}", width, ch * mult[level])
                width = ch * mult[level]
                if level == last:
                    attn(f"{side}.conv_blocks.{i}.attn.{j}", width)
            if i < last:
                conv(
                    f"{side}.conv_blocks.{i}.{'downsample' if side == 'encoder' else 'upsample'}.conv", width, width, 3
                )
        norm(f"{side}.norm_out", width)
    conv("encoder.conv_in", 3, ch, 3)
    conv("encoder.conv_out", top, z, 3)
    conv("decoder.conv_in", z, top, 3)
    conv("decoder.conv_out", ch * mult[0], 3, 3)
    conv("quant_conv", z, dim, 1)
    conv("post_quant_conv", dim, z, 1)
    return out


def _conv(w: State, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
    kernel = w[f"{name}.weight"]
    padding = kernel.shape[-1] // 2 if padding is None else padding
    return F.conv2d(x, kernel, w[f"{name}.bias"], stride, padding)


def _norm(w: State, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)


def _res(w: State, name: str, x: Tensor) -> Tensor:
    h = _conv(w, f"{name}.conv1", F.silu(_norm(w, f"{name}.norm1", x)))
    h = _conv(w, f"{name}.conv2", F.silu(_norm(w, f"{name}.norm2", h)))
    return h + (_conv(w, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)


def _attn(w: State, name: str, x: Tensor) -> Tensor:
    b, c, height, width = x.shape
    h = _norm(w, f"{name}.norm", x)
    q, k, v = (_conv(w, f"{name}.{part}", h).reshape(b, c, -1) for part in "qkv")
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / c**0.5, -1)
    mixed = torch.einsum("bij,bcj->bci", weights, v).reshape(b, c, height, width)
    return x + _conv(w, f"{name}.proj_out", mixed)


def _middle(w: State, side: str, x: Tensor) -> Tensor:
    return _res(w, f"{side}.mid.2", _attn(w, f"{side}.mid.1", _res(w, f"{side}.mid.0", x)))


def _level(w: State, name: str, x: Tensor) -> Tensor:
    j = 0
    while f"{name}.res.{j}.conv1.weight" in w:
        x = _res(w, f"{name}.res.{j}", x)
        if f"{name}.attn.{j}.q.weight" in w:
            x = _attn(w, f"{name}.attn.{j}", x)
        j += 1
    return x


def latent(w: State, x: Tensor) -> Tensor:
    x, i = _conv(w, "encoder.conv_in", x), 0
    while f"encoder.conv_blocks.{i}.res.0.conv1.weight" in w:
        x = _level(w, f"encoder.conv_blocks.{i}", x)
        if f"encoder.conv_blocks.{i}.downsample.conv.weight" in w:
            b, c, height, width = x.shape
            padded = x.new_zeros(b, c, height + 1, width + 1)
            padded[:, :, :height, :width] = x
            x = _conv(w, f"encoder.conv_blocks.{i}.downsample.conv", padded, stride=2, padding=0)
        i += 1
    x = _conv(w, "encoder.conv_out", F.silu(_norm(w, "encoder.norm_out", _middle(w, "encoder", x))))
    return _conv(w, "quant_conv", x)


def directions(rows: Tensor) -> Tensor:
    """Rows (..., C) at length 1, in fp64."""
    rows = rows.double()
    return rows / rows.norm(dim=-1, keepdim=True)


def cosines(w: State, z: Tensor) -> Tensor:
    """Of latents (B, C, h, w) with all codes in fp64, (B, h * w, codes)."""
    return directions(z.flatten(2).transpose(1, 2)) @ directions(w["quantize.embedding.weight"]).T


def indices(w: State, z: Tensor) -> Tensor:
    """By the largest cosine in fp64, (B, h * w)."""
    return cosines(w, z).argmax(-1)


def assert_nearest(w: State, found: Tensor, of: Tensor, wanted: Tensor) -> None:
    """The codes `found` (B, h * w) for the latent `of` are the nearest to the latent `wanted`, both (B, C, h, w).

    Two computations of a latent differ by rounding, and then either of two codes is right that are as near to each
    other: a cosine changes by at most the distance of the two directions, once for the code found and once for the
    nearest.  8 steps of fp32 are for the distances themselves.
    """
    apart = (directions(of.flatten(2).transpose(1, 2)) - directions(wanted.flatten(2).transpose(1, 2))).norm(dim=-1)
    cosine = cosines(w, wanted)
    short = cosine.amax(-1) - cosine.gather(-1, found[..., None])[..., 0]
    assert (short <= 2 * apart + 8 * torch.finfo(torch.float32).eps).all(), f"short by {float(short.max()):.2e}"


def decode(w: State, tokens: Tensor, side: int) -> Tensor:
    rows = w["quantize.embedding.weight"][tokens]
    z = (rows / rows.norm(dim=-1, keepdim=True)).transpose(1, 2).reshape(len(tokens), -1, side, side)
    x = _conv(w, "decoder.conv_in", _conv(w, "post_quant_conv", z))
    x, i = _middle(w, "decoder", x), 0
    while f"decoder.conv_blocks.{i}.res.0.conv1.weight" in w:
        x = _level(w, f"decoder.conv_blocks.{i}", x)
        if f"decoder.conv_blocks.{i}.upsample.conv.weight" in w:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = _conv(w, f"decoder.conv_blocks.{i}.upsample.conv", x)
        i += 1
    return _conv(w, "decoder.conv_out", F.silu(_norm(w, "decoder.norm_out", x)))
