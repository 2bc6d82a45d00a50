"""An engine's state to and from the checkpoint format: masters, moments, average, step counters, random generators."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import torch
from torch import Tensor

from mirai_ds.checkpoint.format import Snapshot, StateReader
from mirai_ds.config import UserError
from mirai_ds.engine.engine import TrainEngine


def _values(engine: TrainEngine) -> dict[str, list[Tensor]]:
    layout = engine.layout
    return {
        "master": layout.masters,
        "exp_avg": layout.moments("exp_avg"),
        "exp_avg_sq": layout.moments("exp_avg_sq"),
        "ema": engine.ema.values,
    }


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
