"""LlamaGen's released models and their published FID, and whether a measured one is it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import Field

from mirai_ds.checkpoint.gpt_file import read_gpt_file
from mirai_ds.checkpoint.llamagen import infer_model_config
from mirai_ds.config import UserError
from mirai_ds.config.errors import nearest
from mirai_ds.config.model_config import Section
from mirai_ds.config.yaml_text import parse

# Of the published value: our choice.  How far two draws of 50,000 images differ, nobody has published or measured here.
TOLERANCE = 0.1
EVALUATED_AT = 256  # pixels, of the reference batch


class Released(Section):
    """One row: its weights' file and size, the pixels it draws, and how it scored."""

    file: str
    size: str
    image_size: int = Field(gt=0)
    cfg_scale: float = Field(gt=0)
    fid: float = Field(gt=0)


@cache
def released_models() -> dict[str, Released]:
    """By name, in the order of LlamaGen's table."""
    text = resources.files("mirai_ds.paper").joinpath("released.yaml").read_text(encoding="utf-8")
    return {name: Released(**row) for name, row in parse(text, "released.yaml").items()}


def released(name: str) -> Released:
    """Raises UserError, with the nearest name, where there is none."""
    rows = released_models()
    if name not in rows:
        raise UserError(f"{name}: is no released model; {nearest(name, rows)}")
    return rows[name]


def check_weights(row: Released, name: str, path: Path) -> None:
    """That a file's shapes are the row's; raises UserError.  What is in them, nobody has published a digest of."""
    model = infer_model_config(read_gpt_file(path, or_other=True).weights)
    if model.size != row.size:
        raise UserError(f"--weights {path}: is a {model.size}, {name} is {row.size}: its file is {row.file}")


@dataclass(frozen=True)
class Verdict:
    """measured: FID, None where it was not computed.  departures: why it cannot be put beside the published one."""

    name: str
    published: float
    measured: float | None
    departures: list[str]

    @property
    def reproduced(self) -> bool:
        """Whether the protocol is the published one and the value within `TOLERANCE` of the published."""
        if self.measured is None or self.departures:
            return False
        return abs(self.measured - self.published) <= TOLERANCE

    def lines(self) -> list[str]:
        """What to tell the user."""
        if self.measured is None:
            return [f"{self.name}: no FID was measured; LlamaGen's README says {self.published:.2f}"]
        said = f"{self.name}: FID {self.measured:.2f}, LlamaGen's README says {self.published:.2f}"
        if self.departures:
            return [f"{said}: not comparable, because", *(f"  {why}" for why in self.departures)]
        if self.reproduced:
            return [f"{said}: reproduced, within {TOLERANCE:g}"]
        return [
            f"{said}: {self.measured - self.published:+.2f}, beyond {TOLERANCE:g}.  See docs/reproducing.md: the "
            "reference batch, the Inception file, guidance and the tokenizer are the usual causes"
        ]


def verdict(name: str, row: dict[str, Any]) -> Verdict:
    """Of the row that `mirai-ds evaluate --json` writes."""
    wanted = released(name)
    departures = [str(why) for why in row["protocol"]["departures"]]
    drawn = row["protocol"].get("sampling") or {}
    if drawn.get("cfg_scale") != wanted.cfg_scale:
        departures.append(f"guidance was {drawn.get('cfg_scale', 'not recorded')}, not {wanted.cfg_scale:g}")
    return Verdict(name, wanted.fid, row["fid"], departures)
