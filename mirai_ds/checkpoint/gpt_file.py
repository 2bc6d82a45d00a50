"""A GPT's weights out of a file of LlamaGen, Mirai, PAR or this package, whatever was around the network that it is of.

Layouts and keys: FoundationVision/LlamaGen (commit ce98ec4), y0urOy/Mirai-Code (commit 4e8611e), YuqingWang1029/PAR
(commit b1dd994), whose files have one tensor more.  Never runs a file's code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mirai_ds.config import ModelConfig, UserError
from mirai_ds.config.errors import shown
from mirai_ds.config.eval_config import Weights
from mirai_ds.runtime.weight_files import SAFETENSORS, read_safetensors_file, read_safetensors_notes, read_torch_file

# Where the raw weights lie, in the order LlamaGen's samplers look: DDP script, DeepSpeed, others, else a bare dict.
WRAPPERS = ("model", "module", "state_dict")
AVERAGE = "ema"  # where the average lies; in a .safetensors file, which has one level, before its keys
PROJECTORS = "projectors."
# The rotary table of older released files, which LlamaGen's samplers ignore too, and torch's count of averaged models.
STRAY = {"freqs_cis", "n_averaged"}
# What keys call the modules around a network: DDP and DeepSpeed, torch.compile, FSDP, recomputation, an objective.
AROUND = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "gpt", "model"}


class GptFile(NamedTuple):
    """weights: GPT keys and `projectors.*`, on CPU, dtypes as stored.  kind: which weights they are, of those `held`.

    model: fields of the model's configuration that the file states (exports of this package do); steps: 0 if unknown.
    """

    weights: dict[str, Tensor]
    kind: Weights
    held: tuple[Weights, ...]
    model: dict[str, Any]
    steps: int


def read_gpt_file(path: Path, kind: Weights = "raw", or_other: bool = False) -> GptFile:
    """The weights of `kind` in a file; or_other: where it has none of these, those that it has.

    Accepts `{"model", "optimizer", "steps", "args"[, "ema"]}`, `{"module"}`, `{"state_dict"}` and a bare state dict in
    .pt, .pth or .bin, and .safetensors, with the keys of a network inside DDP, FSDP, torch.compile or an objective.
    Only `freqs_cis` and `n_averaged` are dropped.  Raises UserError.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a weights file; `mirai-ds export` writes one from a run")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    sets, notes, steps = _content_of_safetensors(path) if path.suffix == SAFETENSORS else _content(path)
    held: tuple[Weights, ...] = tuple(kind for kind in ("raw", "ema") if kind in sets)
    if kind not in sets:
        if not or_other:
            raise UserError(f"{path}: has no {kind!r} weights, only {held[0]!r}; ask for those")
        kind = held[0]
    weights = sets[kind]
    if not isinstance(weights, Mapping):
        raise UserError(f"{path}: the weights are a {type(weights).__name__}, not a state dict")
    bad = next((key for key, value in weights.items() if not isinstance(value, Tensor)), None)
    if bad is not None or not weights:
        reason = f"{shown(bad)} is a {type(weights[bad]).__name__}" if weights else "it is empty"
        raise UserError(f"{path}: is not a state dict of tensors: {reason}")
    told = {name: notes[name] for name in ModelConfig.model_fields if name in notes} if "size" in notes else {}
    # Copies: the file may be mapped into memory, and its optimizer state must not stay there with it.
    copies = {key: value.detach().clone() for key, value in _official_keys(weights, path).items()}
    return GptFile(copies, kind, held, told, int(steps) if isinstance(steps, Integral) else 0)


def _content(path: Path) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """(weights by kind, what an export says of itself, steps) of a torch file."""
    data = read_torch_file(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a {type(data).__name__}, not a checkpoint or state dict")
    notes = data["args"] if isinstance(data.get("args"), dict) else {}  # LlamaGen's are a Namespace
    name = next((name for name in WRAPPERS if name in data), None)
    sets = {AVERAGE: data[AVERAGE]} if AVERAGE in data else {}
    if name is not None or not sets:
        sets[_main_kind(notes)] = data if name is None else data[name]
    return sets, notes, data.get("steps")


def _content_of_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """The same of a .safetensors file, whose notes are text."""
    notes = {name: _from_text(text) for name, text in read_safetensors_notes(path).items()}
    sets: dict[str, Any] = {}
    for key, value in read_safetensors_file(path).items():
        average = key.startswith(f"{AVERAGE}.")
        sets.setdefault(AVERAGE if average else _main_kind(notes), {})[key.removeprefix(f"{AVERAGE}.")] = value
    return sets or {_main_kind(notes): {}}, notes, notes.get("steps")


def _main_kind(notes: Mapping[str, Any]) -> Weights:
    """An export of the average alone has it where samplers look, under "model"."""
    return "ema" if notes.get("weights") == "ema" else "raw"


def _from_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _official_keys(weights: Mapping[Any, Tensor], path: Path) -> dict[str, Tensor]:
    """Without the names of what was around the network.  Raises UserError where that leaves two tensors of one name, or
    the keys were of two networks."""
    out: dict[str, Tensor] = {}
    called: dict[str, str] = {}
    first: dict[bool, str] = {}  # of the GPT's keys, and of the heads'
    for key in map(str, weights):
        name = ".".join(part for part in key.split(".") if part not in AROUND) or key
        if name in STRAY:
            continue
        other = called.setdefault(name, key)
        if other == key:
            other = first.setdefault(name.startswith(PROJECTORS), key)
            other = key if _front(other) == _front(key) else other
        if other != key:
            raise UserError(
                f"{path}: holds {shown(other)} and {shown(key)}: weights of two networks, or of one in two pieces; "
                "write one state dict and give that file"
            )
        out[name] = weights[key]
    return out


def _front(key: str) -> list[str]:
    """The modules around the whole network; those around a part of it may differ from part to part."""
    parts = key.split(".")
    return parts[: next((i for i, part in enumerate(parts) if part not in AROUND), len(parts))]
