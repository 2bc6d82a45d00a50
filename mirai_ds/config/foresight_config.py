"""The foresight section: everything in which the paper's text and the authors' code differ is a field here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mirai_ds.config.errors import ConfigError
from mirai_ds.config.model_config import ModelConfig, Section

Method = Literal["none", "mirai-e", "mirai-i"]

# What a convention means.
# `official`: the authors' code (github y0urOy/Mirai-Code); `paper`: the text, Sec. 3 and Eq. 8-11.
CONVENTIONS: dict[str, dict[str, Any]] = {
    "official": {
        "head_order": "official",
        "slots": "input",
        "border": "wrap",
        "heads_reduction": "sum",
        "teacher_sees_last_token": False,
        "normalizer": "valid",
    },
    "paper": {
        "head_order": "nearest",
        "slots": "predict",
        "border": "mask",
        "heads_reduction": "mean",
        "teacher_sees_last_token": True,
        "normalizer": "valid",
    },
}


# The fields that mean something with one kind of schedule only.
_OF_KIND = {"step": ("at_epochs", "multipliers"), "cosine": ("start_epoch", "final")}


class LambdaSchedule(Section):
    """Multiplier on the alignment loss over epochs.

    `const`: 1.  `step`: `multipliers[i]` from `at_epochs[i-1]` on (authors: 1.0 before epoch 80, 0.5 from it).
    `cosine`: from 1 at `start_epoch` to `final` at the last epoch.
    """

    kind: Literal["const", "step", "cosine"] = "const"
    at_epochs: list[float] | None = None
    multipliers: list[float] | None = None
    start_epoch: float = Field(0.0, ge=0)
    final: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> LambdaSchedule:
        name = "foresight.schedule"
        for kind, fields in _OF_KIND.items():
            for field in fields:
                if kind != self.kind and getattr(self, field):
                    raise ConfigError(
                        f"{name}.{field}", getattr(self, field), f"{name}.kind is {self.kind!r}; use kind: {kind}"
                    )
        if self.kind != "step":
            return self
        if not self.at_epochs:
            raise ConfigError(f"{name}.at_epochs", self.at_epochs, "kind: step needs the epochs, e.g. [80]")
        if self.multipliers is None:
            self.__dict__["multipliers"] = [0.5**i for i in range(len(self.at_epochs) + 1)]
        multipliers = self.multipliers or []
        if len(multipliers) != len(self.at_epochs) + 1:
            raise ConfigError(
                f"{name}.multipliers",
                multipliers,
                f"must have {len(self.at_epochs) + 1} values, one before and one after each of at_epochs",
            )
        if any(m < 0 for m in multipliers):
            raise ConfigError(f"{name}.multipliers", multipliers, "must not be negative")
        if any(b <= a for a, b in zip(self.at_epochs, self.at_epochs[1:], strict=False)) or self.at_epochs[0] < 0:
            raise ConfigError(f"{name}.at_epochs", self.at_epochs, "must be non-negative and rising")
        return self


class EncoderConfig(Section):
    """Mirai-I's frozen vision encoder, a timm model loaded from a local file."""

    name: str = "vit_base_patch14_dinov2"
    weights: str | None = Field(None, description="file with the encoder's state dict (.safetensors, .pth, .bin)")
    image_size: int | None = Field(None, ge=1, description="encoder input side; default patch size * token grid")
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), strict=False)  # YAML has lists, not tuples
    std: tuple[float, float, float] = Field((0.229, 0.224, 0.225), strict=False)
    dtype: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _check(self) -> EncoderConfig:
        if min(self.std) <= 0:
            raise ConfigError("foresight.encoder.std", list(self.std), "each must be greater than 0")
        return self


class ForesightConfig(Section):
    """Alignment of hidden states with later tokens' features; fields left out are filled from `convention`."""

    method: Method = "none"
    convention: Literal["official", "paper"] = "official"
    num_heads: int | None = Field(None, ge=1, le=9, description="K: 3 for mirai-e, 1 for mirai-i")
    layout: Literal["2d", "1d"] = "2d"
    layer: int | None = Field(None, ge=1, description="student block, 1-based; default round(8/12 * n_layer)")
    teacher_layer: int | None = Field(None, ge=1, description="mirai-e: teacher block; default the student's")
    weights: list[float] | None = Field(None, description="lambda of each head; default 2 each")
    heads_reduction: Literal["sum", "mean"] | None = None
    head_order: Literal["official", "nearest"] | None = None
    slots: Literal["input", "predict"] | None = Field(None, description="cell n: the slot that holds, or predicts, it")
    border: Literal["mask", "wrap", "clamp"] | None = None
    normalizer: Literal["valid", "constant"] | None = Field(None, description="divide by valid cells, or by all")
    class_slot: bool | None = Field(None, description="mirai-e: align the class slot too; official only")
    teacher_sees_last_token: bool | None = Field(None, description="mirai-e: teacher reads x_1..x_N, not x_1..x_{N-1}")
    flat_stride: int | None = Field(None, ge=1, description="wrap: flat shift of one row down; default the grid side")
    schedule: LambdaSchedule = LambdaSchedule()
    warmup_epochs: float | None = Field(
        None, ge=0, description="epochs without alignment; 15 for mirai-e, 0 for mirai-i"
    )
    projector_dim: int = Field(2048, ge=1)
    teacher_dtype: Literal["auto", "fp32", "bf16"] = "auto"
    kernel: Literal["auto", "cuda", "cpu", "reference"] = Field(
        "auto", description="what computes the alignment loss; auto: the compiled one of the device if it can be built"
    )
    encoder: EncoderConfig | None = None

    @property
    def active(self) -> bool:
        """Whether there is an alignment loss at all."""
        return self.method != "none"

    @property
    def heads(self) -> int:
        """K, the number of heads (0 without alignment)."""
        return self.num_heads if self.active and self.num_heads else 0

    @model_validator(mode="after")
    def _fill(self) -> ForesightConfig:
        if not self.active:
            return self
        fill = dict(CONVENTIONS[self.convention])
        fill["num_heads"] = 3 if self.method == "mirai-e" else 1
        fill["warmup_epochs"] = 15.0 if self.method == "mirai-e" else 0.0
        fill["class_slot"] = self.method == "mirai-e" and self.convention == "official"
        for name, value in fill.items():
            if getattr(self, name) is None:
                self.__dict__[name] = value
        if self.weights is None:
            self.__dict__["weights"] = [2.0] * self.heads
        if self.method == "mirai-i" and self.encoder is None:
            self.__dict__["encoder"] = EncoderConfig()
        self._check()
        return self

    def _check(self) -> None:
        weights = self.weights or []
        if len(weights) != self.heads:
            raise ConfigError("foresight.weights", weights, f"must have {self.heads} values (foresight.num_heads)")
        if any(w < 0 for w in weights):
            raise ConfigError("foresight.weights", weights, "must not be negative")
        if self.class_slot and self.method == "mirai-i":
            raise ConfigError("foresight.class_slot", True, "an encoder has no class slot; use false")
        if self.class_slot and self.slots == "predict":
            raise ConfigError("foresight.class_slot", True, "with slots: predict slot 0 is the first cell; use false")
        if self.flat_stride is not None and (self.border != "wrap" or self.layout == "1d"):
            raise ConfigError("foresight.flat_stride", self.flat_stride, "needs layout: 2d and border: wrap; remove it")
        if self.method == "mirai-i" and self.teacher_layer is not None:
            problem = "is for method: mirai-e (an encoder gives one output); remove it"
            raise ConfigError("foresight.teacher_layer", self.teacher_layer, problem)
        if self.method == "mirai-e" and self.encoder is not None:
            problem = "is for method: mirai-i (mirai-e's teacher is the EMA); remove it"
            raise ConfigError("foresight.encoder", self.encoder.name, problem)

    def fill_from_model(self, model: ModelConfig) -> None:
        """Fill and check what depends on the model: layers within depth, offsets within the grid."""
        if not self.active:
            return
        if self.layer is None:
            self.__dict__["layer"] = max(1, round(model.depth * 8 / 12))
        if self.method == "mirai-e" and self.teacher_layer is None:
            self.__dict__["teacher_layer"] = self.layer
        for name in ("layer", "teacher_layer"):
            value = getattr(self, name)
            if value is not None and value > model.depth:
                raise ConfigError(f"foresight.{name}", value, f"must be at most the model's depth, {model.depth}")
        if model.grid < 3 and self.heads > model.grid**2:
            problem = f"must be at most {model.grid**2}, the cells of the grid"
            raise ConfigError("foresight.num_heads", self.heads, problem)
