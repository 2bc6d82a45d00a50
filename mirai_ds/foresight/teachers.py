"""Teachers: the model's own EMA (Mirai-E) and a frozen vision encoder (Mirai-I); features, never gradients."""

from __future__ import annotations

import inspect
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
    """The first `teacher_layer` blocks with averaged weights: true labels, no dropout, raw residual stream."""

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
    model.load_state_dict(_fitting_weights(model, path, config, patch))
    return model, size


# Parts of published files that give no patch features: classifiers, masked tokens, decoders.
_NOT_FEATURES = ("head", "fc_norm.", "mask_token", "decoder", "pre_logits.")


def _fitting_weights(model: nn.Module, path: Path, config: EncoderConfig, patch: int) -> dict[str, Tensor]:
    """The file's tensors for exactly this encoder, its position table resampled to this grid; ConfigError otherwise.

    Nothing else may be dropped or bent: a file of a relative (layer scales, another patch) would give wrong features.
    """

    def unfit(problem: str) -> ConfigError:
        return ConfigError("foresight.encoder.weights", config.weights, f"{problem}; encoder.name is {config.name}")

    try:
        state = read_weights(path)
    except Exception as error:  # bytes from anywhere: the readers raise nearly any type on them
        reason = (str(error).splitlines() or [""])[0][:120]
        raise unfit(f"cannot be read as weights: {type(error).__name__}: {reason}") from None
    kernel = state.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4 and kernel.shape[-1] != patch:
        raise unfit(f"is of an encoder with patch {kernel.shape[-1]}, not {patch}")
    convert = getattr(inspect.getmodule(type(model)), "checkpoint_filter_fn", None)  # timm's own, for published files
    if convert is not None:
        try:
            state = convert(state, model)
        except (KeyError, ValueError, RuntimeError, AssertionError, AttributeError) as error:
            raise unfit(f"is not of this encoder: {type(error).__name__} when converted by timm") from None
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    missing = sorted(set(wanted) - set(state))
    if missing:
        raise unfit(f"lacks {len(missing)} of {len(wanted)} tensors, e.g. {missing[0]}")
    extra = sorted(name for name in set(state) - set(wanted) if not name.startswith(_NOT_FEATURES))
    if extra:
        raise unfit(f"holds {len(extra)} tensors that this encoder has not, e.g. {extra[0]}")
    bent = [name for name, shape in wanted.items() if state[name].shape != shape]
    if bent:
        shapes = f"{tuple(state[bent[0]].shape)}, not {tuple(wanted[bent[0]])}"
        raise unfit(f"has {len(bent)} tensors of other shapes, e.g. {bent[0]} {shapes}")
    return {name: state[name] for name in wanted}


def _patch_size(name: str) -> int:
    import timm

    model = timm.create_model(name, pretrained=False, num_classes=0)
    size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if size is None or not hasattr(model, "num_prefix_tokens"):
        raise ConfigError("foresight.encoder.name", name, "is not a patch-based vision transformer")
    return int(size if isinstance(size, int) else size[0])


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
