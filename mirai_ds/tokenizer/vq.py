"""LlamaGen's VQ tokenizer from its weights file: uint8 images to codes and back.

Layouts of the file: FoundationVision/LlamaGen (commit ce98ec4); released as vq_ds16_c2i.pt and vq_ds8_c2i.pt.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mirai_ds.config import UserError
from mirai_ds.config.errors import shown
from mirai_ds.runtime.precision import float32_products
from mirai_ds.runtime.weight_files import read_weight_file
from mirai_ds.tokenizer.vq_model import GROUPS, USAGE, VQ16, VQConfig, VQModel

Array = np.ndarray[Any, Any]
PRECISIONS = ("fp32", "tf32", "bf16")

# Where the weights lie.  LlamaGen's extraction takes "model" also where "ema" lies beside it, so codes need "model".
WRAPPERS = ("model", "state_dict")
STATISTIC = "quantize.codebook_used"  # of the training; no code and no pixel depends on it
# Pixels of one pass through the networks: about 35 bytes x channels each are alive at once.
PASS_PIXELS = {"cpu": 4 * 256**2, "cuda": 64 * 256**2}


class VQTokenizer:
    """Images to codes and back by LlamaGen's networks.

    name: "VQ-16" or "VQ-<downsampling>".  vocab_size: codes.  downsampling: pixels a code spans on a side.
    channels: 3.  digest: sha256 over all weights as stored, whatever the file around them.
    """

    channels = 3

    def __init__(self, model: VQModel, digest: str, device: str = "cpu", precision: str = "fp32") -> None:
        """Use `VQTokenizer.load`.  model: its weights already on `device`, fp32."""
        self.model = model.eval().requires_grad_(False)
        self.digest, self.device, self.precision = digest, torch.device(device), precision
        self.downsampling, self.vocab_size = model.config.downsampling, model.config.codebook_size
        self.name = f"VQ-{self.downsampling}"
        # By division on the CPU, as LlamaGen does: a CUDA device multiplies by the reciprocal, off by a rounding.
        self._values = ((torch.arange(256, dtype=torch.float32) / 255 - 0.5) / 0.5).to(self.device)

    @classmethod
    def load(cls, path: Path, device: str = "cpu", precision: str = "fp32") -> VQTokenizer:
        """The tokenizer in `{"model": ...}`, `{"state_dict": ...}`, a bare state dict or a .safetensors file.

        The sizes are those of the tensors.  precision: fp32 (TF32 off), tf32 (what LlamaGen's own extraction ran with)
        or bf16 (autocast); codes are compared in fp32 always.  Raises UserError when the file cannot be read or is not
        exactly such a network's state dict; only the statistic `quantize.codebook_used` may be absent.
        """
        _check_place(device, precision)
        weights = _select(read_weight_file(Path(path)), path)
        config = infer_config(weights, path)
        _check(weights, config, path)
        weights.setdefault(STATISTIC, torch.zeros(USAGE))
        digest = weights_digest(weights)
        with torch.device("meta"):
            model = VQModel(config)
        placed = {key: value.to(device, torch.float32, copy=True) for key, value in weights.items()}
        model.load_state_dict(placed, assign=True)
        return cls(model, digest, device, precision)

    @classmethod
    def random(
        cls, config: VQConfig = VQ16, device: str = "cpu", precision: str = "fp32", seed: int = 0
    ) -> VQTokenizer:
        """One with random weights: a stand-in for measuring.  Leaves the global random state as it was."""
        _check_place(device, precision)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = VQModel(config)
        return cls(model.to(device), weights_digest(model.state_dict()), device, precision)

    def grid(self, image_size: int) -> int:
        """Codes on a side of an image of `image_size` pixels.  Raises UserError when that is not a whole number."""
        if image_size < 1 or image_size % self.downsampling:
            raise UserError(
                f"image size {image_size}: must be a multiple of {self.downsampling}, which {self.name} needs"
            )
        return image_size // self.downsampling

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, g * g) int64 codes on CPU in raster order, of uint8 images (B, H, W, 3) on CPU, H = W = g * downsampling.

        Pixels become (x / 255 - 0.5) / 0.5 as in LlamaGen's extraction.  Raises UserError when they do not fit.
        """
        if (
            pixels.dtype != torch.uint8
            or pixels.ndim != 4
            or pixels.shape[3] != 3
            or pixels.shape[1] != pixels.shape[2]
        ):
            given = f"{pixels.dtype} {tuple(pixels.shape)}"
            raise UserError(f"{self.name} encodes square images, uint8 (B, H, W, 3), not {given}")
        cells = self.grid(pixels.shape[1]) ** 2
        codes = [torch.empty(0, cells, dtype=torch.int64)]
        with float32_products("tf32" if self.precision == "tf32" else "ieee"):
            for part in pixels.split(self._images_a_pass(pixels.shape[1])):
                x = self._values[part.to(self.device).int()].permute(0, 3, 1, 2).contiguous()
                with self._networks():
                    latent = self.model.latent(x)
                with float32_products("ieee"):
                    codes.append(self.model.indices(latent).cpu())
        return torch.cat(codes)

    @torch.inference_mode()
    def decode(self, tokens: Tensor, size: int | None = None) -> Array:
        """uint8 images (B, H, W, 3) of int64 codes (B, g * g) on any device: trunc(clamp(127.5 x + 128, 0, 255)).

        size: pixels a side, resized to as LlamaGen's sampler does: bicubic, no antialias, before the clamp.  Raises
        UserError when they are no square grid or not codes of this tokenizer.
        """
        side = math.isqrt(tokens.shape[1]) if tokens.ndim == 2 else 0
        if tokens.is_floating_point() or not side or side * side != tokens.shape[1]:
            given = f"{tokens.dtype} {tuple(tokens.shape)}"
            raise UserError(f"{self.name} decodes square grids of codes, int64 (B, g * g), not {given}")
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            spread = f"{int(tokens.min())}..{int(tokens.max())}"
            raise UserError(
                f"codes span {spread}, {self.name} has 0..{self.vocab_size - 1}: they are another tokenizer's"
            )
        whole = side * self.downsampling
        out = whole if size is None else size
        images = np.empty((len(tokens), out, out, 3), np.uint8)
        step = self._images_a_pass(whole)
        with float32_products("tf32" if self.precision == "tf32" else "ieee"):
            for start in range(0, len(tokens), step):
                with self._networks():
                    x = self.model.decode_codes(tokens[start : start + step].to(self.device, torch.int64))
                x = x.float() if out == whole else F.interpolate(x.float(), size=(out, out), mode="bicubic")
                levels = (127.5 * x + 128).clamp(0, 255).to(torch.uint8)
                images[start : start + step] = levels.permute(0, 2, 3, 1).cpu().numpy()
        return images

    def _images_a_pass(self, size: int) -> int:
        pixels = PASS_PIXELS.get(self.device.type, PASS_PIXELS["cpu"])
        return max(1, pixels * VQ16.channels // (self.model.config.channels * size * size))

    def _networks(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")


def _check_place(device: str, precision: str) -> None:
    if precision not in PRECISIONS:
        raise UserError(f"precision = {shown(precision)}: use one of: {', '.join(PRECISIONS)}")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UserError(f"device = {shown(device)}: is not a device; use cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device = {shown(device)}: torch finds no CUDA device here; use cpu")


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over name, dtype, shape and bytes of each tensor, sorted by name, but `quantize.codebook_used`."""
    digest = hashlib.sha256()
    for key in sorted(set(weights) - {STATISTIC}):
        value = weights[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _select(data: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside a file's content."""
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a {type(data).__name__}, not a tokenizer's weights")
    name = next((name for name in WRAPPERS if name in data), None)
    state = data if name is None else data[name]
    if not isinstance(state, dict) or not state:
        where = f"holds {shown(state)}" if name is None else f"holds {shown(state)} in {name!r}"
        raise UserError(f"{path}: {where}, not a state dict of tensors")
    for key, value in state.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            held = ", ".join(shown(key, 30) for key in list(data)[:6])
            raise UserError(f"{path}: {shown(key)} is {kind}, not a tensor of floats; the file holds {held}")
    return {str(key): value for key, value in state.items()}


def infer_config(weights: Mapping[str, Tensor], path: Path) -> VQConfig:
    """The sizes that the tensors' shapes tell.  Raises UserError when those that tell are absent or tell nonsense."""

    def shape(key: str, ndim: int) -> list[int]:
        if key not in weights or weights[key].ndim != ndim:
            state = f"is {tuple(weights[key].shape)}" if key in weights else "is missing"
            raise UserError(f"{path}: is not a VQ tokenizer's weights file: {key} {state}{_prefix_hint(weights)}")
        return list(weights[key].shape)

    def count(prefix: str) -> int:
        numbers = {int(m[1]) for key in weights if (m := re.match(re.escape(prefix) + r"(\d{1,4})\.", key))}
        return max(numbers, default=-1) + 1

    channels, _, _, _ = shape("encoder.conv_in.weight", 4)
    levels = count("encoder.conv_blocks.")
    if not 1 <= levels <= 16:
        raise UserError(f"{path}: is not a VQ tokenizer's weights file: encoder.conv_blocks has {levels} levels")
    widths = [shape(f"encoder.conv_blocks.{i}.res.0.conv1.weight", 4)[0] for i in range(levels)]
    codes, code_dim = shape("quantize.embedding.weight", 2)
    z_channels = shape("encoder.conv_out.weight", 4)[0]
    blocks = count("encoder.conv_blocks.0.res."), count("decoder.conv_blocks.0.res.")
    if channels < 1 or any(width % channels or width % GROUPS or width < 1 for width in widths) or channels % GROUPS:
        raise UserError(
            f"{path}: levels of {widths} channels over {channels}: must be multiples of that and of {GROUPS}"
        )
    if min(codes, code_dim, z_channels, *blocks) < 1 or max(blocks) > 64:
        sizes = f"{codes} codes of {code_dim}, {z_channels} z channels, {blocks[0]} and {blocks[1]} blocks a level"
        raise UserError(f"{path}: is not a VQ tokenizer's weights file: it has {sizes}")
    return VQConfig(channels, tuple(width // channels for width in widths), z_channels, codes, code_dim, *blocks)


def _prefix_hint(weights: Mapping[str, Tensor]) -> str:
    for prefix in ("module.", "_orig_mod.", "model.", "vq_model."):
        if all(key.startswith(prefix) for key in weights):
            return f"; its keys carry the prefix {prefix!r}: remove it"
    return f"; it holds {shown(next(iter(weights)))}"


def _check(weights: Mapping[str, Tensor], config: VQConfig, path: Path) -> None:
    """Every tensor of the network with its shape, finite, and nothing else; raises UserError."""
    with torch.device("meta"):
        wanted = {key: tuple(value.shape) for key, value in VQModel(config).state_dict().items()}
    missing = [key for key in wanted if key not in weights and key != STATISTIC]
    unexpected = [key for key in weights if key not in wanted]
    bent = [key for key in wanted if key in weights and tuple(weights[key].shape) != wanted[key]]
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(wanted)} tensors missing (first: {missing[0]})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected (first: {shown(unexpected[0])})")
    if bent:
        key = bent[0]
        parts.append(f"{len(bent)} misshaped (first: {key} is {tuple(weights[key].shape)}, needed {wanted[key]})")
    if not parts:
        parts = [
            f"{key} holds values that are not finite" for key, v in weights.items() if not v.float().isfinite().all()
        ][:1]
    if parts:
        network = f"VQ-{config.downsampling} of {config.channels} channels"
        raise UserError(f"{path}: does not fit the network that its shapes mean, {network}: {', '.join(parts)}")
