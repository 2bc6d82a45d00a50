"""The section of a frozen vision encoder, and the presets of the paper's."""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from mirai_ds.config.errors import ConfigError
from mirai_ds.config.model_config import Section


class EncoderPreset(NamedTuple):
    """A short name's timm model, and the 1-based block whose output is the feature (None: the last, normed)."""

    timm_name: str
    layer: int | None = None


# The encoders of the paper's tables.  MAE's features are raw outputs of a block two thirds up: 8 of 12, 16 of 24.
ENCODERS: dict[str, EncoderPreset] = {
    "dinov2-b": EncoderPreset("vit_base_patch14_dinov2"),
    "dinov2-l": EncoderPreset("vit_large_patch14_dinov2"),
    "dinov3-b": EncoderPreset("vit_base_patch16_dinov3"),
    "mae-b": EncoderPreset("vit_base_patch16_224.mae", layer=8),
    "mae-l": EncoderPreset("vit_large_patch16_224.mae", layer=16),
}


class EncoderConfig(Section):
    """Mirai-I's frozen vision encoder, a timm model with weights from a local file or as published.

    `name`: a key of `ENCODERS`, which fills the fields left out, any timm ViT, or `package.module:function` of your
    own, which is called with this section, the grid's side and the device and returns a `Teacher`.  mean and std are
    ImageNet's for every encoder; timm's own defaults (0.5 for MAE) are not used.
    """

    name: str = Field(
        "vit_base_patch14_dinov2",
        description="dinov2-b, dinov2-l, dinov3-b, mae-b, mae-l, a timm ViT, or package.module:function",
    )
    weights: str | None = Field(None, description="file with the encoder's state dict (.safetensors, .pth, .bin)")
    pretrained: bool = Field(False, description="timm's published weights, from the Hugging Face cache or the network")
    image_size: int | None = Field(None, ge=1, description="encoder input side; default patch size * token grid")
    mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406), strict=False, description="pixels' mean, subtracted; ImageNet's"
    )  # YAML has lists, not tuples
    std: tuple[float, float, float] = Field(
        (0.229, 0.224, 0.225), strict=False, description="pixels' standard deviation, divided by; ImageNet's"
    )
    dtype: Literal["auto", "fp32", "tf32", "bf16"] = Field(
        "auto", description="auto: tf32, as the authors ran it, in a run that is not fp32; a CPU computes tf32 in fp32"
    )
    layer: int | None = Field(None, ge=1, description="block whose output is the feature, 1-based; default the last")
    final_norm: bool | None = Field(None, description="the encoder's last norm on it; default true without layer")
    block_causal: int | None = Field(None, ge=1, description="patch i sees patch j iff j // b <= i // b; default all")
    compile: bool = Field(False, description="torch.compile the encoder's forward")

    @property
    def timm_name(self) -> str:
        """What timm calls the encoder."""
        return ENCODERS[self.name].timm_name if self.name in ENCODERS else self.name

    @model_validator(mode="after")
    def _fill_and_check(self) -> EncoderConfig:
        if self.layer is None and self.name in ENCODERS:
            self.__dict__["layer"] = ENCODERS[self.name].layer
        if self.final_norm is None:
            self.__dict__["final_norm"] = self.layer is None
        if min(self.std) <= 0:
            raise ConfigError("foresight.encoder.std", list(self.std), "each must be greater than 0")
        if self.pretrained and self.weights is not None:
            raise ConfigError("foresight.encoder.pretrained", True, "foresight.encoder.weights is a file; keep one")
        return self
