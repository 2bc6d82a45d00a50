"""The foresight section: everything in which the paper's text and the authors' code differ is a field here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mirai_ds.config.encoder_config import EncoderConfig
from mirai_ds.config.errors import ConfigError
from mirai_ds.config.model_config import ModelConfig, Section
from mirai_ds.config.own import check_name, import_own, is_own

# What gives each method's targets, which is all that checks and costs ask of it.  gpt: a GPT like the student, with
# averaged or fixed weights; encoder: a vision encoder that sees the image; tokens: the image's own, without a teacher.
# mirai-e, mirai-i: align a block's states with the features; mtp: multi-token prediction at the output (Table 1).
TeacherKind = Literal["gpt", "encoder", "tokens"]
TEACHERS: dict[str, TeacherKind] = {"mirai-e": "gpt", "mirai-i": "encoder", "mtp": "tokens"}

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
        "heads_in_warmup": "decay",
    },
    "paper": {
        "head_order": "nearest",
        "slots": "predict",
        "border": "mask",
        "heads_reduction": "mean",
        "teacher_sees_last_token": True,
        "normalizer": "valid",
        "heads_in_warmup": "sleep",
    },
}


# The fields that mean something with one kind of schedule only.
_OF_KIND = {"step": ("at_epochs", "multipliers"), "cosine": ("start_epoch", "final")}


class LambdaSchedule(Section):
    """Multiplier on the alignment loss over epochs.

    `const`: 1.  `step`: `multipliers[i]` from `at_epochs[i-1]` on (authors: 1.0 before epoch 80, 0.5 from it).
    `cosine`: from 1 at `start_epoch` to `final` at the last epoch.
    """

    kind: Literal["const", "step", "cosine"] = Field(
        "const", description="const: 1 throughout; step: multipliers; cosine: from 1 to `final`"
    )
    at_epochs: list[float] | None = Field(None, description="step: epochs at which the next multiplier begins")
    multipliers: list[float] | None = Field(None, description="step: one more than at_epochs; default halved each time")
    start_epoch: float = Field(0.0, ge=0, description="cosine: where it begins to fall")
    final: float = Field(0.0, ge=0, description="cosine: multiplier at the last epoch")

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


# Explicit offsets: what the compiled loss takes on CUDA.  Without them: the 3x3 block, all that the paper uses.
MAX_OFFSETS, MAX_HEADS = 64, 9
HEAD_ATTENTION_HEADS = 4  # of a transformer head (the paper's has 7.68 M parameters at width 768)


class ForesightConfig(Section):
    """Alignment of hidden states with later tokens' features; fields left out are filled from `convention`."""

    method: str = Field("none", description="none: next tokens only; mirai-e, mirai-i, mtp or package.module:METHOD")
    convention: Literal["official", "paper"] = Field(
        "official", description="official: the authors' code; paper: the text; fills the fields left out"
    )
    num_heads: int | None = Field(
        None,
        ge=1,
        description="K: 3 for mirai-e and mtp (whose first is the next-token loss), 1 for mirai-i; at most 9",
    )
    layout: str = Field("2d", description="2d, 1d or package.module:LAYOUT: what an offset means")
    layer: int | None = Field(
        None, ge=1, description="student block, 1-based; default round(8/12 * n_layer), of mtp the last"
    )
    teacher_layer: int | None = Field(None, ge=1, description="mirai-e: teacher block; default the student's")
    teacher_weights: str | None = Field(
        None,
        description="mirai-e: a frozen teacher instead of the run's EMA: a weights file, run or checkpoint folder",
    )
    desynchronised_ranks: int | None = Field(
        None,
        ge=2,
        description="experiment, mirai-e on one rank: as many EMAs that began at different random weights, a defect of "
        "the authors' code",
    )
    weights: list[float] | None = Field(None, description="lambda of each head; default 2 each, of mtp 1")
    heads_reduction: Literal["sum", "mean"] | None = Field(
        None, description="the loss sums over heads, or is their mean"
    )
    head_order: Literal["official", "nearest"] | None = Field(
        None, description="of neighbours: the authors' (down-right blocks), or nearest first (Eq. 8)"
    )
    offsets: list[list[int]] | None = Field(
        None,
        description="[down, right] of each head instead of num_heads and head_order, as [[0, 1], [1, -1]]; at most 64",
    )
    slots: Literal["input", "predict"] | None = Field(None, description="cell n: the slot that holds, or predicts, it")
    border: Literal["mask", "wrap", "clamp", "nearest"] | None = Field(
        None,
        description="a neighbour beyond the grid: left out, the authors' flat shift, the cell at the edge; nearest: K "
        "nearest later cells of each cell, Eq. 8 to the letter",
    )
    normalizer: Literal["valid", "constant"] | None = Field(None, description="divide by valid cells, or by all")
    class_slot: bool | None = Field(None, description="mirai-e: align the class slot too; official only")
    teacher_sees_last_token: bool | None = Field(None, description="mirai-e: teacher reads x_1..x_N, not x_1..x_{N-1}")
    mask_decoded_targets: bool = Field(
        False, description="PAR: leave out pairs whose target the slot has seen already (seams of regions)"
    )
    flat_stride: int | None = Field(None, ge=1, description="wrap: flat shift of one row down; default the grid side")
    schedule: LambdaSchedule = LambdaSchedule()
    warmup_epochs: float | None = Field(
        None, ge=0, description="epochs without alignment; 15 for mirai-e with the run's own EMA, else 0"
    )
    ramp_epochs: float = Field(
        0.0, ge=0, description="beyond the paper: epochs after warm-up in which the multiplier rises linearly from 0"
    )
    head_warmup_epochs: float = Field(
        0.0,
        ge=0,
        description="beyond the paper: last epochs of warm-up in which heads learn from detached states, so that the "
        "network feels nothing of them",
    )
    heads_in_warmup: Literal["decay", "sleep"] | None = Field(
        None,
        description="decay: AdamW goes on with zero gradients, as in the authors' code; sleep: nothing of the heads "
        "moves, and AdamW begins with the first aligned step",
    )
    head: Literal["mlp", "transformer"] | None = Field(
        None, description="mlp: 3 layers (REPA's); transformer: one block, the default of mtp (Table 9 has both)"
    )
    head_attention: Literal["causal", "full"] | None = Field(
        None, description="transformer head: causal, as the states are; full lets slot n read later tokens"
    )
    projector_dim: int = Field(2048, ge=1, description="mlp head: hidden width")
    teacher_dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: as the student is computed; fp32: the authors'"
    )
    kernel: Literal["auto", "cuda", "cpu", "reference"] = Field(
        "auto", description="what computes the alignment loss; auto: the compiled one of the device if it can be built"
    )
    encoder: EncoderConfig | None = None

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        check_name(value, ["none", *TEACHERS], "foresight.method")
        if is_own(value):
            made = import_own(value, "foresight.method")
            if getattr(made, "targets", None) not in TEACHERS.values():
                raise ConfigError("foresight.method", value, "is no mirai_ds.foresight.methods.ForesightMethod")
        return value

    @field_validator("layout")
    @classmethod
    def _known_layout(cls, value: str) -> str:
        check_name(value, ["2d", "1d"], "foresight.layout")
        return value

    @field_validator("offsets", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if isinstance(value, list) and not all(isinstance(offset, list) for offset in value):
            raise ConfigError("foresight.offsets", value, "must be a list of [down, right], e.g. [[0, 1]]")
        return value

    @property
    def active(self) -> bool:
        """Whether there is an alignment loss at all."""
        return self.method != "none"

    @property
    def teacher(self) -> TeacherKind | None:
        """What gives the targets; None without a method."""
        own = is_own(self.method)
        kind: TeacherKind | None = import_own(self.method, "foresight.method").targets if own else None
        return kind or TEACHERS.get(self.method)

    @property
    def predicts_tokens(self) -> bool:
        """Whether heads predict tokens, through the unembedding, instead of features."""
        return self.teacher == "tokens"

    @property
    def follows_average(self) -> bool:
        """Whether the teacher's weights are the run's own average, renewed with every update."""
        return self.teacher == "gpt" and self.teacher_weights is None

    @property
    def first_neighbour(self) -> int:
        """Where heads begin in the order of neighbours: of mtp behind (0, 0), the next token, which needs no head."""
        return int(self.predicts_tokens)

    @property
    def targets_by_cell(self) -> bool:
        """Whether a target's rows are the image's cells (patches, tokens), not the slots of a teacher's sequence."""
        return self.teacher != "gpt"

    @property
    def heads(self) -> int:
        """Number of head modules: K; of mtp K - 1, since k = 1 is the next-token loss; 0 without a method."""
        if not self.active or not self.num_heads:
            return 0
        return self.num_heads - self.predicts_tokens

    @model_validator(mode="after")
    def _fill(self) -> ForesightConfig:
        self._check_offsets()
        if not self.active:
            return self
        fill = dict(CONVENTIONS[self.convention])
        fill["num_heads"] = 1 if self.teacher == "encoder" else 3
        if self.offsets is not None:
            fill |= {"num_heads": len(self.offsets) + self.predicts_tokens, "head_order": None}
        if self.border == "nearest":
            fill["head_order"] = "nearest"
        fill["warmup_epochs"] = 15.0 if self.follows_average else 0.0
        fill["class_slot"] = self.teacher == "gpt" and self.convention == "official"
        fill["head"] = "transformer" if self.predicts_tokens else "mlp"
        if self.predicts_tokens:  # a slot predicts what it has not read; there is no teacher
            fill |= {"slots": "predict", "teacher_sees_last_token": None}
        for name, value in fill.items():
            if getattr(self, name) is None:
                self.__dict__[name] = value
        if self.head == "transformer" and self.head_attention is None:
            self.__dict__["head_attention"] = "causal"
        if self.weights is None:
            self.__dict__["weights"] = [1.0 if self.predicts_tokens else 2.0] * self.heads
        if self.teacher == "encoder" and self.encoder is None:
            self.__dict__["encoder"] = EncoderConfig()
        self._check()
        return self

    def _check_offsets(self) -> None:
        """Without `offsets`: few enough heads.  With them: pairs that make sense, and no field that says otherwise."""
        name, given = "foresight.offsets", self.offsets
        if given is None:
            if (self.num_heads or 0) > MAX_HEADS:
                fix = "; for more give foresight.offsets" if self.layout == "2d" else ""
                raise ConfigError("foresight.num_heads", self.num_heads, f"must be at most {MAX_HEADS}{fix}")
            return
        if not 1 <= len(given) <= MAX_OFFSETS:
            raise ConfigError(name, given, f"must have 1 to {MAX_OFFSETS} entries [down, right], one a head")
        for i, offset in enumerate(given):
            if len(offset) != 2 or offset[0] < 0 or (offset[0] == 0 and offset[1] < 0):
                problem = "must be [down, right] of a later token: down at least 0, and right too in the same row"
                raise ConfigError(f"{name}[{i}]", offset, problem)
            if offset in given[:i]:
                raise ConfigError(f"{name}[{i}]", offset, "given twice; remove one")
        if self.layout == "1d":
            raise ConfigError(name, given, "needs layout: 2d; remove it")
        if self.head_order is not None:
            problem = "foresight.offsets orders the heads; remove it or set it to null"
            raise ConfigError("foresight.head_order", self.head_order, problem)
        if self.predicts_tokens and [0, 0] in given:
            problem = "[0, 0] is the next token, which mtp predicts anyway; remove it"
            raise ConfigError(f"{name}[{given.index([0, 0])}]", [0, 0], problem)
        count = len(given) + self.predicts_tokens
        if self.num_heads not in (None, count):
            problem = f"must be {count}, one head an entry of foresight.offsets; remove it or set it to null"
            raise ConfigError("foresight.num_heads", self.num_heads, problem)

    def _check(self) -> None:
        weights = self.weights or []
        if self.predicts_tokens and not self.heads:
            problem = "of mtp counts the next token as the first; use 2 or more, or method: none"
            raise ConfigError("foresight.num_heads", self.num_heads, problem)
        if len(weights) != self.heads:
            counted = ", less the next token" if self.predicts_tokens else ""
            problem = f"must have {self.heads} values (foresight.num_heads{counted})"
            raise ConfigError("foresight.weights", weights, problem)
        if any(w < 0 for w in weights):
            raise ConfigError("foresight.weights", weights, "must not be negative")
        if self.class_slot and self.teacher != "gpt":
            what = "tokens have" if self.predicts_tokens else "an encoder has"
            raise ConfigError("foresight.class_slot", True, f"{what} no class slot; use false")
        if self.class_slot and self.slots == "predict":
            raise ConfigError("foresight.class_slot", True, "with slots: predict slot 0 is the first cell; use false")
        if self.flat_stride is not None and (self.border != "wrap" or self.layout == "1d"):
            raise ConfigError("foresight.flat_stride", self.flat_stride, "needs layout: 2d and border: wrap; remove it")
        if self.border == "nearest" and (self.layout != "2d" or self.offsets or self.head_order != "nearest"):
            problem = "finds and orders neighbours itself: needs layout: 2d, and no offsets or head_order"
            raise ConfigError("foresight.border", "nearest", problem)
        if self.teacher == "gpt" and self.encoder is not None:
            problem = "is for method: mirai-i (mirai-e's teacher is the EMA); remove it"
            raise ConfigError("foresight.encoder", self.encoder.name, problem)
        if self.head_warmup_epochs > (self.warmup_epochs or 0.0):
            problem = f"is the end of warm-up, which has {self.warmup_epochs or 0:g} epochs; use at most that"
            raise ConfigError("foresight.head_warmup_epochs", self.head_warmup_epochs, problem)
        self._check_head()
        self._check_teacher()

    def _check_head(self) -> None:
        if self.head == "mlp" and self.head_attention is not None:
            problem = "is of head: transformer; remove it"
            raise ConfigError("foresight.head_attention", self.head_attention, problem)
        if self.predicts_tokens and self.head_attention == "full":
            problem = "would read the tokens that mtp predicts; use causal"
            raise ConfigError("foresight.head_attention", "full", problem)
        if self.predicts_tokens and self.slots == "input":
            problem = "the slot that holds a token has read it; mtp needs predict"
            raise ConfigError("foresight.slots", "input", problem)

    def _check_teacher(self) -> None:
        """Fields that only one kind of teacher has."""
        if self.desynchronised_ranks is not None and not self.follows_average:
            problem = "is an experiment about the run's own EMA as teacher (method: mirai-e); remove it"
            raise ConfigError("foresight.desynchronised_ranks", self.desynchronised_ranks, problem)
        if self.teacher == "gpt":
            return
        why = "an encoder gives one output" if self.teacher == "encoder" else "mtp has no teacher"
        names = ["teacher_layer", "teacher_weights"]
        names += ["teacher_sees_last_token"] if self.predicts_tokens else []  # conventions fill it for the others
        for name in names:
            if getattr(self, name) is not None:
                problem = f"is for method: mirai-e ({why}); remove it"
                raise ConfigError(f"foresight.{name}", getattr(self, name), problem)
        if self.predicts_tokens and self.encoder is not None:
            raise ConfigError("foresight.encoder", self.encoder.name, "is for method: mirai-i; remove it")

    def fill_from_model(self, model: ModelConfig) -> None:
        """Fill and check what depends on the model: layers within depth, offsets within the grid."""
        if not self.active:
            return
        if self.layer is None:
            self.__dict__["layer"] = model.depth if self.predicts_tokens else max(1, round(model.depth * 8 / 12))
        if self.teacher == "gpt" and self.teacher_layer is None:
            self.__dict__["teacher_layer"] = self.layer
        for name in ("layer", "teacher_layer"):
            value = getattr(self, name)
            if value is not None and value > model.depth:
                raise ConfigError(f"foresight.{name}", value, f"must be at most the model's depth, {model.depth}")
        ahead = self.layout == "1d" and self.slots == "predict"
        if self.mask_decoded_targets and (model.par_tokens is None or ahead):
            why = "layout 1d with slots predict" if model.par_tokens else "raster order (model.par_tokens is null)"
            problem = f"in {why} no target is decoded already; set it to false"
            raise ConfigError("foresight.mask_decoded_targets", True, problem)
        for i, offset in enumerate(self.offsets or []):
            if max(map(abs, offset)) >= model.grid:
                problem = f"leaves the {model.grid}x{model.grid} grid from every cell; use at most {model.grid - 1}"
                raise ConfigError(f"foresight.offsets[{i}]", offset, problem)
        if self.head == "transformer" and model.width % HEAD_ATTENTION_HEADS:
            problem = (
                f"has {HEAD_ATTENTION_HEADS} attention heads, which do not divide model.dim = {model.width}; use mlp"
            )
            raise ConfigError("foresight.head", self.head, problem)
        if model.grid < 3 and self.heads > model.grid**2:
            problem = f"must be at most {model.grid**2}, the cells of the grid"
            raise ConfigError("foresight.num_heads", self.heads, problem)
