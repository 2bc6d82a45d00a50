"""A checkpoint's tensors: one safetensors file a rank, every tensor a slice of a named, flattened parameter.

Nothing in the format knows of ranks or ZeRO stages: a slice says which parameter it belongs to and where it starts, so
any layout can read what any other wrote, and no file executes anything when it is read.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mirai_ds.checkpoint.store import files_of
from mirai_ds.config import UserError
from mirai_ds.engine.engine import TrainEngine

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")


def rank_file(folder: Path, rank: int) -> Path:
    """File of one rank's slices."""
    return folder / f"state-rank{rank:05d}.safetensors"


def _values(engine: TrainEngine) -> dict[str, list[Tensor]]:
    layout = engine.layout
    return {
        "master": layout.masters,
        "exp_avg": layout.moments("exp_avg"),
        "exp_avg_sq": layout.moments("exp_avg_sq"),
        "ema": engine.ema.values,
    }


class Snapshot(NamedTuple):
    """A rank's part of a checkpoint, in host memory and no longer changing."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


class SnapshotBuffers:
    """Host memory that snapshots are taken into, kept from one to the next (pinned where there is a GPU, so that the
    copies of all slices run at once)."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def copy(self, name: str, part: Tensor) -> Tensor:
        """A float32 host copy of `part`; on a GPU it is complete after the next synchronisation."""
        kept = self._kept.get(name)
        if kept is None or kept.shape != part.shape:
            pinned = part.device.type == "cuda"
            kept = self._kept[name] = torch.empty(part.shape, dtype=torch.float32, pin_memory=pinned)
        kept.copy_(part, non_blocking=True)
        return kept


def take_snapshot(engine: TrainEngine, rank: int, buffers: SnapshotBuffers) -> Snapshot:
    """Copy this rank's slices (fp32), AdamW step counters and random states."""
    tensors: dict[str, Tensor] = {f"rng/{name}": state for name, state in rng_state(engine.device).items()}
    places: dict[str, tuple[int, tuple[int, ...], Tensor]] = {}
    steps = engine.layout.steps()
    for kind, values in _values(engine).items():
        for shard, value, step in zip(engine.layout.shards, values, steps, strict=True):
            if shard.world == 1 and rank != 0:
                continue  # replicated: rank 0 writes it
            flat = value.detach().flatten()
            for piece in shard.pieces():
                name = f"{kind}/{piece.name}"
                tensors[name] = buffers.copy(name, flat[piece.local : piece.local + piece.length])
                places[piece.name] = (piece.start, piece.shape, step)
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)
    # Read only now: a number read between the copies would wait for each of them.
    pieces = {name: (start, shape, float(step)) for name, (start, shape, step) in places.items()}
    return Snapshot(tensors, {"pieces": json.dumps(pieces)})


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Write a snapshot as one safetensors file.  Raises what safetensors or the system raise."""
    save_file(snapshot.tensors, path, metadata=snapshot.metadata)


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


@torch.no_grad()
def read_into(engine: TrainEngine, reader: StateReader) -> None:
    """Fill masters, AdamW state and EMA of this rank from a checkpoint of any layout; then the model's own weights."""
    expected = {p.name: p.shape for shard in engine.layout.shards for p in shard.parameters}
    for name, shape in expected.items():
        if reader.shapes.get(name) != shape:
            raise UserError(
                f"{reader.folder}: {name!r} is {reader.shapes.get(name)} there and {shape} in this run; "
                "resume with the configuration it was written with"
            )
    extra = sorted(set(reader.shapes) - set(expected))
    if extra:
        raise UserError(f"{reader.folder}: holds {extra[0]!r}, which this run does not have")
    for kind, values in _values(engine).items():
        for shard, value in zip(engine.layout.shards, values, strict=True):
            flat = value.data.flatten()
            for piece in shard.pieces():
                flat[piece.local : piece.local + piece.length] = reader.read(
                    kind, piece.name, piece.start, piece.length
                )
    for shard, step in zip(engine.layout.shards, engine.layout.steps(), strict=True):
        step.fill_(reader.steps[shard.parameters[0].name])
    engine.layout.refresh_parameters()
    engine.ema.version += 1


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Every generator of this process as tensors.  Training itself draws from none of them; user code may."""
    version, internal, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *internal], dtype=torch.int64),
        "python_gauss": torch.tensor([math.nan if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy_rest": torch.tensor([position, has_gauss, cached], dtype=torch.float64),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_rng(state: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `rng_state` returned; nothing when it is empty."""
    if not state:
        return
    torch.set_rng_state(state["torch"])
    version, *internal = state["python"].tolist()
    gauss = float(state["python_gauss"])
    random.setstate((version, tuple(internal), None if math.isnan(gauss) else gauss))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
