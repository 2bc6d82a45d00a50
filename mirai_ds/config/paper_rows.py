"""The `paper:` mapping of a recipe: in which rows of the paper's tables it stands, and the numbers there.

No part of a run: it is checked and taken out when a recipe is read, and never inherited from a `base:`.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field, ValidationError, model_validator

from mirai_ds.config.errors import ConfigError, from_validation, nearest
from mirai_ds.config.model_config import Section

# Tables and figures that recipes reproduce; Mirai, arXiv 2601.14671.
TABLES: dict[str, str] = {
    "1": "where foresight enters (output or inside) and how it is laid out (1D or 2D), K",
    "2": "which layer is aligned",
    "3": "lambda over training, Mirai-E",
    "4": "Mirai-I's encoder",
    "5": "which tokens Mirai-E looks at",
    "6": "system level, 300 epochs",
    "7": "lambda over training, Mirai-I",
    "8": "size of Mirai-I's encoder for LlamaGen-L",
    "9": "MLP or transformer head",
    "10": "epochs of warm-up, Mirai-E",
    "11": "384 pixels",
    "12": "PAR instead of LlamaGen",
    "fig3": "block-causal masks on Mirai-I's encoder",
    "fig4": "number of foresight tokens K",
    "fig5": "K with a frozen pretrained teacher",
    "fig7": "convergence: the runs of Table 6 at 40, 80, 160 and 300 epochs",
}


def table_title(table: str) -> str:
    """`Table 3` or `Fig. 7`."""
    return f"Fig. {table[3:]}" if table.startswith("fig") else f"Table {table}"


METRICS = ("fid", "sfid", "inception_score", "precision", "recall")


class PaperNumbers(Section):
    """What `source` reports for a run after some epochs; what is left out is not at hand."""

    fid: float | None = Field(None, ge=0)
    sfid: float | None = Field(None, ge=0)
    inception_score: float | None = Field(None, ge=1)
    precision: float | None = Field(None, ge=0, le=1)
    recall: float | None = Field(None, ge=0, le=1)
    source: str = ""
    of: str | None = Field(None, description="the recipe whose numbers these are, the same run up to then")

    def values(self) -> dict[str, float]:
        """The numbers that are at hand, by name."""
        values = {name: getattr(self, name) for name in METRICS}
        return {name: value for name, value in values.items() if value is not None}

    @model_validator(mode="before")
    @classmethod
    def _name(cls, data: Any) -> Any:
        """`80: mirai-e-b-80` is short for `80: {of: mirai-e-b-80}`."""
        return {"of": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _check(self) -> PaperNumbers:
        if bool(self.values()) == (self.of is not None):
            raise ConfigError("paper.numbers", self.of, "give numbers, or the name of the recipe that has them")
        if self.of is None and not self.source:
            raise ConfigError("paper.numbers.source", self.source, "say where the numbers are from")
        return self


class PaperRow(Section):
    """One row of a table."""

    table: str = Field(description="a key of TABLES")
    row: str = Field(min_length=1, description="the row's label")
    epochs: list[float] | None = Field(None, description="default the whole run")
    note: str | None = Field(None, description="what about this row is not known")

    @model_validator(mode="before")
    @classmethod
    def _name(cls, data: Any) -> Any:
        """A table is written as a number, or as fig7."""
        if isinstance(data, dict) and isinstance(data.get("table"), int):
            data = {**data, "table": str(data["table"])}
        return data

    @model_validator(mode="after")
    def _check(self) -> PaperRow:
        if self.table not in TABLES:
            raise ConfigError("paper.rows.table", self.table, nearest(self.table, TABLES))
        return self


class PaperEntry(Section):
    """A recipe's place in the paper; `numbers` by epochs."""

    rows: list[PaperRow]
    numbers: dict[int, PaperNumbers] = Field(default_factory=dict)


def read_entry(data: object, where: str) -> PaperEntry:
    """Validate a `paper:` mapping; raises `UserError` with one line an error."""
    try:
        return PaperEntry.model_validate(data)
    except ValidationError as error:
        raise from_validation(error, PaperEntry, f"{where}: paper") from None
