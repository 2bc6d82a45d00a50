"""The model section: LlamaGen's sizes and its GPT's hyper-parameters."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mirai_ds.config.errors import ConfigError, nearest
from mirai_ds.config.yaml_text import number_in


class Section(BaseModel):
    """Base of every section: unknown keys are errors, types are exact (`true` is no number), numbers are finite.

    Two kindnesses: `1e-4` (text to YAML) is a number, and 1e5 or 8.0 a whole one, where a number is wanted; `off` and
    `on` (true and false to YAML) are words where those are a choice.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, validate_default=True, str_strip_whitespace=True
    )

    @model_validator(mode="before")
    @classmethod
    def _read_numbers(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            key: _as_meant(value, cls.model_fields[key].annotation) if key in cls.model_fields else value
            for key, value in data.items()
        }


def _as_meant(value: Any, annotation: Any) -> Any:
    word = "on" if value is True else "off"
    if isinstance(value, bool) and get_origin(annotation) is Literal and word in get_args(annotation):
        return word
    return _as_number(value, _leaf_types(annotation))


def _leaf_types(annotation: Any) -> set[Any]:
    """The plain types in an annotation: `list[float] | None` -> {float, NoneType}."""
    if get_origin(annotation) is Literal:
        return {str}
    inner = get_args(annotation)
    return set().union(*map(_leaf_types, inner)) if inner else {annotation}


def _as_number(value: Any, types: set[Any]) -> Any:
    if str in types or not types & {int, float}:
        return value
    if isinstance(value, list):
        return [_as_number(item, types) for item in value]
    if isinstance(value, str):
        number = number_in(value)
        value = value if number is None else number
    return int(value) if int in types and isinstance(value, float) and value.is_integer() else value


class Size(NamedTuple):
    """Width, depth and heads of a named model."""

    dim: int
    n_layer: int
    n_head: int


# LlamaGen, autoregressive/models/gpt.py (its table of sizes).
SIZES: dict[str, Size] = {
    "GPT-B": Size(768, 12, 12),
    "GPT-L": Size(1024, 24, 16),
    "GPT-XL": Size(1280, 36, 20),
    "GPT-XXL": Size(1536, 48, 24),
    "GPT-XXXL": Size(2560, 48, 40),
    "GPT-1B": Size(2048, 22, 32),
    "GPT-3B": Size(3200, 24, 32),
    "GPT-7B": Size(4096, 32, 32),
}


class ModelConfig(Section):
    """LlamaGen's class-conditional GPT.  `size` names a row of `SIZES`; `custom` needs dim, n_layer and n_head."""

    size: str = Field("GPT-B", description="GPT-B, GPT-L, GPT-XL, GPT-XXL, GPT-XXXL, GPT-1B, GPT-3B, GPT-7B, or custom")
    dim: int | None = Field(None, ge=2, description="width; from `size`")
    n_layer: int | None = Field(None, ge=1, description="number of blocks; from `size`")
    n_head: int | None = Field(None, ge=1, description="attention heads of a block; from `size`")
    vocab_size: int = Field(16384, ge=2, description="codes of the tokenizer")
    num_classes: int = Field(1000, ge=1, description="classes, the unconditional one not counted")
    block_size: int = Field(256, ge=1, description="tokens of one image, a square number")
    grid_size: int | None = Field(None, ge=1, description="side of the token grid; derived from block_size")
    par_tokens: int | None = Field(None, description="PAR: tokens made at once, one a region; default: raster order")
    ffn_multiple_of: int = Field(256, ge=1, description="the feed-forward width is rounded up to a multiple of this")
    norm_eps: float = Field(1e-5, gt=0, description="RMSNorm's")
    rope_base: float = Field(10000.0, gt=0, description="of the rotary positions' frequencies")
    init_std: float = Field(
        0.02, ge=0, description="standard deviation of initial weights; the output layer begins at 0"
    )
    token_dropout: float = Field(0.1, ge=0, lt=1, description="of the token embedding")
    resid_dropout: float = Field(0.1, ge=0, lt=1, description="of the attention module's output")
    ffn_dropout: float = Field(0.1, ge=0, lt=1, description="of the feed-forward module's output")
    class_dropout: float = Field(0.1, ge=0, le=1, description="label replaced by the unconditional id, per sample")
    drop_path: float = Field(0.0, ge=0, lt=1, description="rate of the last block; linear from 0 over depth")

    @model_validator(mode="after")
    def _fill_and_check(self) -> ModelConfig:
        self._fill_size()
        side = math.isqrt(self.block_size)
        if side * side != self.block_size:
            raise ConfigError(
                "model.block_size", self.block_size, f"is not a square number; use {side**2} or {(side + 1) ** 2}"
            )
        if self.grid_size not in (None, side):
            raise ConfigError(
                "model.grid_size", self.grid_size, f"must be sqrt(model.block_size) = {side}; leave it out"
            )
        self.__dict__["grid_size"] = side
        self._check_par(side)
        dim, n_head = self.width, self.heads
        if dim % (4 * n_head):
            good = [h for h in range(1, dim // 4 + 1) if dim % (4 * h) == 0]
            close = sorted(sorted(good, key=lambda h: abs(h - n_head))[:4])
            fix = f"use one of {close}" if good else f"make model.dim a multiple of {4 * n_head}"
            wrong = f"does not divide model.dim = {dim}"
            if dim % n_head == 0:
                wrong = f"makes heads of width {dim // n_head}, not a multiple of 4 (2D rotary pairs)"
            raise ConfigError("model.n_head", n_head, f"{wrong}; {fix}")
        return self

    def _check_par(self, side: int) -> None:
        """n equal square regions of more than one cell each."""
        good = [s * s for s in range(2, side) if side % s == 0]
        if self.par_tokens is None or self.par_tokens in good:
            return
        fix = f"use {' or '.join(map(str, good))}, or null" if good else "set it to null"
        if self.par_tokens == self.block_size:
            wrong = "is the whole image, with one cell a region and nothing left to make at once"
        elif self.par_tokens < 4 or math.isqrt(self.par_tokens) ** 2 != self.par_tokens:
            wrong = "is not a square number of at least 4"
        else:
            wrong = f"makes {math.isqrt(self.par_tokens)} regions a side, which does not divide the {side}x{side} grid"
        raise ConfigError("model.par_tokens", self.par_tokens, f"{wrong}; {fix}")

    def _fill_size(self) -> None:
        if self.size != "custom" and self.size not in SIZES:
            raise ConfigError("model.size", self.size, nearest(self.size, [*SIZES, "custom"]))
        for name in Size._fields:
            given = getattr(self, name)
            if self.size == "custom":
                if given is None:
                    raise ConfigError(f"model.{name}", None, "model.size = 'custom' has no default; give it a value")
                continue
            value = getattr(SIZES[self.size], name)
            if given not in (None, value):
                raise ConfigError(f"model.{name}", given, f"{self.size} has {value}; set model.size = 'custom'")
            self.__dict__[name] = value

    @property
    def width(self) -> int:
        """Model width D."""
        assert self.dim is not None
        return self.dim

    @property
    def depth(self) -> int:
        """Number of blocks L."""
        assert self.n_layer is not None
        return self.n_layer

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        assert self.n_head is not None
        return self.n_head

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return math.isqrt(self.block_size)

    @property
    def learnable_tokens(self) -> int:
        """Slots of the sequence that hold neither the class nor a token: PAR's n - 1."""
        return (self.par_tokens or 1) - 1

    @property
    def slots(self) -> int:
        """Input slots in training: the class, all tokens but the last, and the learnable ones."""
        return self.block_size + self.learnable_tokens

    @property
    def ffn_hidden(self) -> int:
        """Feed-forward width: floor(2/3 * 4D) rounded up to `ffn_multiple_of` (LlamaGen's rule)."""
        hidden = int(2 * (4 * self.width) / 3)
        return -(-hidden // self.ffn_multiple_of) * self.ffn_multiple_of

    @classmethod
    def from_reference(cls, config: dict[str, Any]) -> ModelConfig:
        """From a configuration in LlamaGen's own names (dim, n_layer, n_head, vocab_size, block_size, num_classes), and
        PAR's ar_token_num where there is one."""
        names = ("dim", "n_layer", "n_head", "vocab_size", "block_size", "num_classes")
        return cls(size="custom", par_tokens=config.get("ar_token_num"), **{name: config[name] for name in names})
