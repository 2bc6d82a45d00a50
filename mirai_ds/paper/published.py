"""The paper's tables and figures (Mirai, arXiv 2601.14671) as data: `tables.yaml`, read and checked."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from typing import Any, Literal

from pydantic import Field

from mirai_ds.config import UserError
from mirai_ds.config.errors import nearest
from mirai_ds.config.model_config import Section
from mirai_ds.config.yaml_text import parse

METRICS = ("fid", "sfid", "inception_score", "precision", "recall")
# floor(1,281,167 images / batch of 256): LlamaGen's loader drops the rest.
STEPS_PER_EPOCH = 5004

Method = Literal["none", "output", "Mirai-E", "Mirai-E (Pretrained)", "Mirai-I"]


class Setting(Section):
    """A run in the paper's own words; None where the paper says nothing, or the method has no such thing.

    epochs: length of the run.  K, tokens: the neighbours that are aligned.  layer, teacher_layer, encoder_layer:
    blocks, 1-based.  lambda_: of each head, in the order of its schedule; change_epochs: where a step schedule goes on.
    """

    model: Literal["LlamaGen-B", "LlamaGen-L", "LlamaGen-XL", "PAR-B"] | None = None
    resolution: int | None = None
    epochs: float | None = None
    batch_size: int | None = None
    lr: float | None = None
    lr_schedule: Literal["constant", "cosine"] | None = None
    betas: list[float] | None = None
    weight_decay: float | None = None
    grad_clip: float | None = None
    token_dropout: float | None = None
    attention_dropout: float | None = None
    ffn_dropout: float | None = None
    class_dropout: float | None = None
    ema_decay: float | None = None
    dtype: str | None = None
    cfg_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    method: Method | None = None
    layout: Literal["1D", "2D"] | None = None
    K: int | None = None
    tokens: list[str] | None = None
    layer: int | None = None
    teacher_layer: int | None = None
    lambda_: list[float] | None = Field(None, alias="lambda")
    schedule: Literal["const", "step", "cosine"] | None = None
    change_epochs: list[float] | None = None
    warmup_epochs: float | None = None
    head: Literal["MLP", "transformer"] | None = None
    encoder: str | None = None
    encoder_layer: int | None = None
    block_causal: int | None = None

    def setting(self) -> dict[str, Any]:
        """What is said, by the paper's name."""
        values = {(field.alias or name): getattr(self, name) for name, field in Setting.model_fields.items()}
        return {name: value for name, value in values.items() if value is not None}


class Row(Setting):
    """One row of a table, or one series of a figure; the numbers as printed, None where there is none.

    recipe: None for a model that is not trained here.  marks, marks_in_steps: epochs, or steps, at which the run is
    judged on its way; without them it is at its end.
    """

    label: str = Field(min_length=1)
    recipe: str | None = None
    marks: list[float] | None = None
    marks_in_steps: list[int] | None = None
    type: str | None = None
    parameters: str | None = None
    encoder_parameters: str | None = None
    head_parameters: str | None = None
    flops: float | None = None
    overhead_percent: float | None = None
    fid: float | None = Field(None, ge=0)
    sfid: float | None = Field(None, ge=0)
    inception_score: float | None = Field(None, ge=1)
    precision: float | None = Field(None, ge=0, le=1)
    recall: float | None = Field(None, ge=0, le=1)

    def metrics(self) -> dict[str, float]:
        """The printed numbers by name."""
        return {name: value for name in METRICS if (value := getattr(self, name)) is not None}


class Table(Setting):
    """A table or figure; its own setting and marks are those of all rows that do not say otherwise."""

    title: str
    note: str | None = None
    rows: list[Row]
    marks: list[float] | None = None
    marks_in_steps: list[int] | None = None


class Choice(Section):
    """A question that the paper leaves open, or where its text and the authors' code disagree.

    when: settings that a row must have for the question to arise.  set: the overrides that make the other reading.
    """

    when: dict[str, list[Any]]
    question: str
    follows: str
    why: str
    other: str
    set: list[str] = Field(min_length=1)

    def arises(self, setting: dict[str, Any]) -> bool:
        """Whether a row of this setting leaves the question open."""
        return all(setting.get(name) in values for name, values in self.when.items())


class Convergence(Section):
    """What the paper says of epochs and compute to one FID, by model (Sec. 3.3, App. G)."""

    epochs_to_the_same_fid: dict[str, float]
    fewer_epochs: dict[str, float]
    less_compute: dict[str, float]


class BeyondRow(Section):
    """A recipe that the paper does not have."""

    recipe: str
    label: str


class Published(Section):
    """All of `tables.yaml`; begins_as: the shorter recipe that a longer one is up to the shorter one's end."""

    source: str
    defaults: Setting
    models: dict[str, Setting]
    methods: dict[str, Setting]
    choices: dict[str, Choice]
    tables: dict[str, Table]
    figures: dict[str, Table]
    begins_as: dict[str, str]
    convergence: Convergence
    beyond: list[BeyondRow]

    def all_tables(self) -> dict[str, Table]:
        """Tables by number, then figures as `fig7`."""
        return {**self.tables, **{f"fig{number}": figure for number, figure in self.figures.items()}}


@cache
def published() -> Published:
    """The data file."""
    text = resources.files("mirai_ds.paper").joinpath("tables.yaml").read_text(encoding="utf-8")
    return Published.model_validate(parse(text, "tables.yaml"))


def setting_of(table: Table, row: Row) -> dict[str, Any]:
    """Everything that the paper says of the run in a row: the defaults below what table and row say."""
    data = published()
    own = {**data.defaults.setting(), **table.setting(), **row.setting()}
    below = (data.defaults, data.models[own["model"]], data.methods[own["method"]], table, row)
    whole: dict[str, Any] = {}
    for part in below:
        whole |= part.setting()
    if own["method"] == "none":
        whole.pop("layer")
    return whole


def choices_of(setting: dict[str, Any]) -> list[Choice]:
    """The open questions of a run."""
    return [choice for choice in published().choices.values() if choice.arises(setting)]


def table_title(key: str) -> str:
    """`Table 3` or `Fig. 7`."""
    return f"Fig. {key[3:]}" if key.startswith("fig") else f"Table {key}"


def table_key(text: str) -> str:
    """The key of a table as people write it: 3, `table 3`, Fig. 7, fig7.  Raises UserError."""
    key = re.sub(r"^(table|tab\.?)\s*", "", text.strip().lower())
    key = re.sub(r"^fig(ure|\.)?\s*", "fig", key)
    if key not in published().all_tables():
        raise UserError(f"table {text!r}: no recipe is a row of it; {nearest(key, published().all_tables())}")
    return key
