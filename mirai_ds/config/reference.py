"""Every field of a configuration with type, default, meaning and the paper's symbol, read from the schema."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mirai_ds.config.errors import OLD_SECTIONS, OTHER_NAMES, UserError, nearest, section_of
from mirai_ds.config.run_config import RunConfig

# What the paper (arXiv 2601.14671) calls a field.
SYMBOLS = {
    "model.vocab_size": "V",
    "model.block_size": "N",
    "model.n_layer": "L",
    "foresight.num_heads": "K",
    "foresight.layer": "l",
    "foresight.teacher_weights": "Mirai-E (Pretrained)",
    "foresight.weights": "lambda, Eq. 10",
    "foresight.heads_reduction": "1/K of Eq. 11",
    "foresight.offsets": "N_K(n), Eq. 8",
    "foresight.layout": "Eq. 7, Eq. 8",
    "foresight.schedule.kind": "Tables 3, 7",
    "foresight.warmup_epochs": "Table 10",
    "foresight.head": "rho_k, Table 9",
    "foresight.encoder.name": "R_phi, Table 4",
    "foresight.encoder.block_causal": "Fig. 3",
    "ema.decay": "tau",
    "optimizer.betas": "beta_1, beta_2",
    "sampling.cfg_scale": "CFG scale",
}
WIDE = 10_000  # characters a line: no value may run on to the next one, which a comment would cut
_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", dict: "section"}
_BOUNDS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


@dataclass(frozen=True)
class Entry:
    """One field.  type, default: as a recipe's author writes them; default "" where others decide it."""

    name: str
    type: str
    default: str
    meaning: str
    symbol: str


def entries() -> list[Entry]:
    """All fields in the order of the schema."""
    return list(_entries(RunConfig, ""))


def _entries(model: type[BaseModel], path: str) -> Iterator[Entry]:
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            yield from _entries(section, f"{path}{name}.")
            continue
        dotted = f"{path}{name}"
        kind = ", ".join([_type(field.annotation), *_bounds(field)])
        yield Entry(dotted, kind, _default(field), field.description or "", SYMBOLS.get(dotted, ""))


def _bounds(field: FieldInfo) -> Iterator[str]:
    for constraint in field.metadata:
        for key, words in _BOUNDS.items():
            bound = getattr(constraint, key, None)
            if bound is not None:
                yield f"{words} {bound:,}"


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(one) for one in inner if one is not type(None)))
    if origin is tuple:
        return f"list of {len(inner)} {_type(inner[0])}s"
    if origin is list:
        return f"list of {'lists of whole numbers' if get_origin(inner[0]) is list else _plural(_type(inner[0]))}"
    return _WORDS[origin or annotation]


def _plural(kind: str) -> str:
    return {"whole number": "whole numbers", "number": "numbers", "text": "texts"}.get(kind, kind)


def _default(field: FieldInfo) -> str:
    if field.default is None:
        return ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return yaml.safe_dump(value, default_flow_style=True, width=WIDE).removesuffix("...\n").strip()


def explained(config: RunConfig) -> str:
    """The run as YAML, every field written out with its meaning as a comment; loads back to the same run."""
    meanings = {entry.name: entry.meaning for entry in entries()}
    lines: list[str] = []
    path: list[str] = []
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=WIDE)
    for line in text.splitlines():
        key = re.match(r"( *)([A-Za-z_]\w*):( |$)", line)
        if key is not None:
            path = [*path[: len(key.group(1)) // 2], key.group(2)]
        meaning = meanings.get(".".join(path)) if key is not None else None
        lines.append(f"{line}  # {meaning}" if meaning else line)
    return "\n".join(lines) + "\n"


def find(name: str) -> list[Entry]:
    """The fields of a dotted name: one field, all of a section, or those of that last name anywhere.

    Names of the paper, LlamaGen and earlier versions lead to ours.  Raises UserError where nothing is called so.
    """
    everything, folded = entries(), name.strip().strip(".").replace("-", "_")
    for wanted in (folded, OTHER_NAMES.get(folded.rsplit(".", 1)[-1].lower()), OLD_SECTIONS.get(folded)):
        if wanted is None:
            continue
        same = [one for one in everything if one.name == wanted or one.name.startswith(f"{wanted}.")]
        same = same or [one for one in everything if one.name.rsplit(".", 1)[-1] == wanted]
        if same:
            return same
    known = [one.name for one in everything]
    sections = {part.rsplit(".", depth)[0] for part in known for depth in (1, 2) if "." in part}
    lasts = {one.rsplit(".", 1)[-1] for one in known}
    raise UserError(f"config {name!r}: no such field or section; {_hint(name, {*known, *sections, *lasts})}")


def _hint(name: str, candidates: set[str]) -> str:
    hint = nearest(name, candidates)
    return hint if hint.startswith("did you") else "`mirai-ds config` lists all"
