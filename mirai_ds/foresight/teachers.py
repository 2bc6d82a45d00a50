"""Teachers: the model's own EMA (Mirai-E) and a frozen vision encoder (Mirai-I).  Both give features, never gradients."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirai_ds.config import ConfigError, EncoderConfig, ForesightConfig, ModelConfig
from mirai_ds.model import GPTTrunk


class Teacher(Protocol):
    """What the training step needs of a teacher."""

    feature_dim: int

    def features(self, tokens: Tensor, labels: Tensor, images: Tensor | None) -> Tensor:
        """tokens (B, N), labels (B,) int64, images (B, 3, H, W) uint8 or None -> features (B, M, C), no gradient."""
        ...


class EmaTeacher:
    """The first `teacher_layer` blocks with averaged weights, eval mode: true labels, no dropout, raw residual stream."""

    def __init__(
        self, model: ModelConfig, foresight: ForesightConfig, dtype: torch.dtype, device: torch.device, autocast: bool
    ) -> None:
        assert foresight.teacher_layer is not None
        self.feature_dim = model.width
        self.n_tokens = model.block_size - (0 if foresight.teacher_sees_last_token else 1)
        self.autocast = autocast
        with torch.device(device):
            self.trunk = GPTTrunk(model, foresight.teacher_layer).eval().requires_grad_(False)
        for parameter in self.trunk.parameters():  # the rotary table stays fp32
            parameter.data = parameter.data.to(dtype)
        self.names = frozenset(name for name, _ in self.trunk.named_parameters())

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy named averages (GPT keys) in; raises KeyError when one is missing."""
        own = dict(self.trunk.named_parameters())
        for name, value in weights:
            own.pop(name).copy_(value)
        if own:
            raise KeyError(f"the teacher was not given {sorted(own)[:3]} ({len(own)} tensors)")

    @torch.no_grad()
    def features(self, tokens: Tensor, labels: Tensor, images: Tensor | None) -> Tensor:
        """(B, 1 + T, D): slot 0 is the class; T = N - 1, or N when the teacher sees the last token."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            return self.trunk.features(tokens[:, : self.n_tokens], labels)


class EncoderTeacher:
    """Patch features of a frozen timm encoder in raster order, prefix tokens dropped."""

    def __init__(self, config: EncoderConfig, grid: int, device: torch.device) -> None:
        self.config, self.grid = config, grid
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.dtype]
        self.encoder, self.image_size = load_encoder(config, grid)
        self.encoder.to(device=device, dtype=self.dtype).eval().requires_grad_(False)
        self.feature_dim = int(self.encoder.num_features)  # type: ignore[arg-type]
        self.prefix = int(getattr(self.encoder, "num_prefix_tokens", 0))
        self.mean = torch.tensor(config.mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(config.std, device=device).view(1, 3, 1, 1)

    @torch.no_grad()
    def features(self, tokens: Tensor, labels: Tensor, images: Tensor | None) -> Tensor:
        """images (B, 3, H, W) uint8 -> (B, grid^2, C).

        Pixels to [0, 1], ImageNet mean and std, *then* bicubic resize without antialias (REPA's order).
        """
        if images is None:
            raise ConfigError("foresight.method", "mirai-i", "the data has no images; give npz data an `images` array")
        x = (images.float() / 255.0 - self.mean) / self.std
        if x.shape[-1] != self.image_size or x.shape[-2] != self.image_size:
            x = F.interpolate(x, size=(self.image_size, self.image_size), mode="bicubic", align_corners=False)
        out = self.encoder.forward_features(x.to(self.dtype))  # type: ignore[operator]
        return out[:, self.prefix :]


def load_encoder(config: EncoderConfig, grid: int) -> tuple[nn.Module, int]:
    """The timm model with weights from a local file, its patch grid equal to the token grid, and its input side.

    Raises ConfigError for an unknown name, a missing or unfit file, or another grid.
    """
    import timm

    if config.weights is None:
        raise ConfigError("foresight.encoder.weights", None, "give the file with the encoder's weights")
    path = Path(config.weights)
    if not path.is_file():
        raise ConfigError("foresight.encoder.weights", config.weights, "no such file")
    if config.name not in timm.list_models():
        raise ConfigError("foresight.encoder.name", config.name, "timm has no such model; see timm.list_models('vit*')")
    patch = _patch_size(config.name)
    size = config.image_size or patch * grid
    if size != patch * grid:
        raise ConfigError(
            "foresight.encoder.image_size", size, f"patch {patch} on a {grid}x{grid} grid needs {patch * grid}"
        )
    model = timm.create_model(config.name, pretrained=False, num_classes=0, img_size=size)
    state = read_weights(path)
    filter_fn = getattr(timm.models.vision_transformer, "checkpoint_filter_fn", None)
    if filter_fn is not None and isinstance(model, timm.models.VisionTransformer):
        state = filter_fn(state, model)  # resamples the position table to this grid
    wanted = set(model.state_dict())
    missing = sorted(wanted - set(state))
    if missing:
        raise ConfigError(
            "foresight.encoder.weights", config.weights, f"lacks {len(missing)} tensors of {config.name}, e.g. {missing[0]}"
        )
    model.load_state_dict({name: state[name] for name in wanted})
    return model, size


def _patch_size(name: str) -> int:
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=0)
    embed = getattr(model, "patch_embed", None)
    if embed is None or not hasattr(embed, "patch_size"):
        raise ConfigError("foresight.encoder.name", name, "is not a patch-based vision transformer")
    return int(embed.patch_size[0])


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors or a torch file, without executing anything in it."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(str(path))
    data = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model", "teacher"):
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
    return {name: value for name, value in data.items() if isinstance(value, Tensor)}
