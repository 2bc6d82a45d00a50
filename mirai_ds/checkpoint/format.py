"""A checkpoint's tensors: one safetensors file a rank, every tensor a slice of a named, flattened parameter.

Nothing in the format knows of ranks or ZeRO stages: a slice says which parameter it belongs to and where it starts, so
any layout can read what any other wrote, and no file executes anything when it is read.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from mirai_ds.checkpoint.store import files_of
from mirai_ds.config import UserError
from mirai_ds.runtime.weight_files import write_safetensors

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
FP32_COPIES = len(KINDS)  # of every parameter


def rank_file(folder: Path, rank: int) -> Path:
    """File of one rank's slices."""
    return folder / f"state-rank{rank:05d}.safetensors"


class Snapshot(NamedTuple):
    """A rank's part of a checkpoint, in host memory and no longer changing."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Write a snapshot as one safetensors file.  Raises what safetensors or the system raise."""
    write_safetensors(path, snapshot.tensors, snapshot.metadata)


class StateReader:
    """Reads named tensors, or slices of them, out of all ranks' files of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[str, list[tuple[int, int, Any]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.steps: dict[str, float] = {}
        self._files = []
        for path in _state_files(folder):
            file = safe_open(path, framework="pt")
            self._files.append(file)
            for name, (start, shape, step) in json.loads(file.metadata()["pieces"]).items():
                length = file.get_slice(f"master/{name}").get_shape()[0]
                self._where.setdefault(name, []).append((start, length, file))
                self.shapes[name], self.steps[name] = tuple(shape), step
        if not self._files:
            raise UserError(f"{folder}: its manifest names no state-rank*.safetensors; not a checkpoint of mirai_ds")

    def read(self, kind: str, name: str, start: int = 0, length: int | None = None) -> Tensor:
        """Elements start..start+length-1 of flattened `name`, float32 on CPU; UserError when some are missing."""
        if name not in self.shapes:
            raise UserError(f"{self.folder}: has no tensor {name!r}; was it made with another model or method?")
        length = math.prod(self.shapes[name]) - start if length is None else length
        out = torch.empty(length)
        filled = 0
        for piece_start, piece_length, file in self._where[name]:
            low, high = max(start, piece_start), min(start + length, piece_start + piece_length)
            if low < high:
                part = file.get_slice(f"{kind}/{name}")[low - piece_start : high - piece_start]
                out[low - start : high - start] = part
                filled += high - low
        if filled != length:
            raise UserError(f"{self.folder}: {name!r} is incomplete ({filled} of {length} elements)")
        return out

    def weights(self, kind: str, prefix: str = "gpt.") -> dict[str, Tensor]:
        """Whole tensors of `kind` (master or ema) whose names start with `prefix`, without it."""
        return {
            name.removeprefix(prefix): self.read(kind, name).view(shape)
            for name, shape in sorted(self.shapes.items())
            if name.startswith(prefix)
        }

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Random states of `rank`, empty when the checkpoint was written by fewer ranks."""
        if rank >= len(self._files):
            return {}
        file = self._files[rank]
        return {key.removeprefix("rng/"): file.get_tensor(key) for key in file.keys() if key.startswith("rng/")}  # noqa: SIM118


def _state_files(folder: Path) -> list[Path]:
    """The files that the manifest names, by rank; a stray one beside them is no part of the checkpoint."""
    try:
        names = sorted(name for name in files_of(folder) if name.startswith("state-rank"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: not a whole checkpoint ({type(error).__name__}: {error})") from None
    return [folder / name for name in names]
