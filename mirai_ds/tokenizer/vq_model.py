"""LlamaGen's VQ networks: pixels to codes and back, with its state-dict keys.

Structure and keys: FoundationVision/LlamaGen (commit ce98ec4), tokenizer_image/vq_model.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32  # of every GroupNorm
USAGE = 65536  # length of the training statistic `quantize.codebook_used`: no output depends on it
DISTANCE_ENTRIES = 32 * 2**20  # of a (rows, codes) fp32 matrix: two of 128 MB are alive at a time


@dataclass(frozen=True)
class VQConfig:
    """Sizes of a VQ tokenizer.

    multipliers: width of each resolution level over `channels`, highest resolution first; every level but the last
    halves the image.  encoder_blocks, decoder_blocks: residual blocks a level.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    z_channels: int = 256
    codebook_size: int = 16384
    code_dim: int = 8
    encoder_blocks: int = 2
    decoder_blocks: int = 3

    @property
    def downsampling(self) -> int:
        """Pixels that a code spans on a side."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def widths(self) -> list[int]:
        """Channels of each level, highest resolution first."""
        return [self.channels * multiplier for multiplier in self.multipliers]


VQ16 = VQConfig()
VQ8 = VQConfig(multipliers=(1, 2, 2, 4))


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, eps=1e-6)


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _conv3(inside: int, outside: int) -> nn.Conv2d:
    return nn.Conv2d(inside, outside, 3, padding=1)


class _Residual(nn.Module):
    """Adds two rounds of (norm, swish, 3x3 convolution) to the input."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inside), _conv3(inside, outside)
        self.norm2, self.conv2 = _norm(outside), _conv3(outside, outside)
        if inside != outside:
            self.nin_shortcut = nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_swish(self.norm1(x)))
        h = self.conv2(_swish(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class _Attention(nn.Module):
    """Adds one attention head over all positions to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # (B, C, positions)
        weights = (q.transpose(1, 2) @ k * q.shape[1] ** -0.5).softmax(dim=2)  # of every query over the keys
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(h))


class _Downsample(nn.Module):
    """Half the resolution; the zero padding is on the right and at the bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    """Repeats every pixel twice in both directions, then convolves with 3x3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention at the lowest; then the step to the next."""

    def __init__(self, inside: int, outside: int, blocks: int, attention: bool, step: str) -> None:
        super().__init__()
        self.res = nn.ModuleList(_Residual(outside if i else inside, outside) for i in range(blocks))
        self.attn = nn.ModuleList(_Attention(outside) for _ in range(blocks if attention else 0))
        if step == "down":
            self.downsample = _Downsample(outside)
        if step == "up":
            self.upsample = _Upsample(outside)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for step in ("downsample", "upsample"):
            x = getattr(self, step)(x) if hasattr(self, step) else x
        return x


def _middle(width: int) -> nn.ModuleList:
    return nn.ModuleList([_Residual(width, width), _Attention(width), _Residual(width, width)])


class _Encoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = _conv3(3, config.channels)
        self.conv_blocks = nn.ModuleList(
            _Level(([config.channels, *widths])[i], w, config.encoder_blocks, i == last, "" if i == last else "down")
            for i, w in enumerate(widths)
        )
        self.mid = _middle(widths[-1])
        self.norm_out, self.conv_out = _norm(widths[-1]), _conv3(widths[-1], config.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in (*self.conv_blocks, *self.mid):
            x = part(x)
        return self.conv_out(_swish(self.norm_out(x)))


class _Decoder(nn.Module):
    """Its levels are numbered from the lowest resolution up."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths, last = config.widths[::-1], len(config.widths) - 1
        self.conv_in = _conv3(config.z_channels, widths[0])
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList(
            _Level(([widths[0], *widths])[i], w, config.decoder_blocks, i == 0, "" if i == last else "up")
            for i, w in enumerate(widths)
        )
        self.norm_out, self.conv_out = _norm(widths[-1]), _conv3(widths[-1], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in (*self.mid, *self.conv_blocks):
            x = part(x)
        return self.conv_out(_swish(self.norm_out(x)))


class _Quantizer(nn.Module):
    """The codebook; vectors and codes are compared at length 1."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, width)
        self.register_buffer("codebook_used", torch.zeros(USAGE))

    def codes(self) -> Tensor:
        return F.normalize(self.embedding.weight, dim=-1)


class VQModel(nn.Module):
    """Encoder, codebook and decoder.  VQ16 has 71,883,403 parameters, VQ8 70,109,835."""

    def __init__(self, config: VQConfig = VQ16) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = _Encoder(config), _Decoder(config)
        self.quantize = _Quantizer(config.codebook_size, config.code_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)

    def latent(self, x: Tensor) -> Tensor:
        """(B, code_dim, H / d, W / d) of images (B, 3, H, W) in [-1, 1], d = downsampling."""
        return self.quant_conv(self.encoder(x))

    def indices(self, latent: Tensor) -> Tensor:
        """The nearest code of each position, (B, h * w) int64 in raster order, of a latent (B, code_dim, h, w).

        In fp32 whatever the latent's type, by the reference's formula |z|^2 + |e|^2 - 2 z.e, because other formulas
        round differently and flip ties.  Equal distances: the lowest index.
        """
        with torch.autocast(latent.device.type, enabled=False):
            z = F.normalize(latent.float().permute(0, 2, 3, 1).flatten(0, 2), dim=-1)
            codes = self.quantize.codes().float()
            length = codes.square().sum(1)
            rows = max(1, DISTANCE_ENTRIES // len(codes))
            nearest = [
                (part.square().sum(1, keepdim=True) + length).sub_((part @ codes.T).mul_(2)).argmin(1)
                for part in z.split(rows)
            ]
        return torch.cat(nearest).view(len(latent), latent.shape[2] * latent.shape[3])

    def decode_codes(self, tokens: Tensor) -> Tensor:
        """Images (B, 3, H, W), nominally in [-1, 1] and not clamped, of tokens (B, g * g) int64 in raster order."""
        side = math.isqrt(tokens.shape[1])
        vectors = self.quantize.codes()[tokens].transpose(1, 2).unflatten(2, (side, side))
        return self.decoder(self.post_quant_conv(vectors))
