"""True peak memory of a real training step, to check the plan against.

CPU: the bytes of all live tensor storages, counted from before the engine is built.  (The profiler's record of the CPU
allocator would miss what gloo's threads release.)  GPU: the caching allocator's own peak of allocated bytes.
"""

from __future__ import annotations

import gc
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mirai_ds.checkpoint.fence import Fence
from mirai_ds.config import RunConfig, build
from mirai_ds.runtime.distributed import World
from mirai_ds.runtime.signals import StopRequests
from mirai_ds.train.session import build_session
from mirai_ds.train.step import train_step

STEPS = 3  # AdamW's moments are there from the second on


@dataclass(frozen=True)
class Measured:
    """Bytes on this rank: the peak within the last step, and what is there between steps."""

    peak: int
    resting: int


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all tensor storages that operators of this thread made while it is active, each until its
    last reference is gone, in whatever thread that happens.  What an operator uses inside for itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, note new storages."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._held or not size:
            return
        self._held[key] = (weakref.ref(storage, lambda _: self._forget(key)), size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int) -> None:
        self.live -= self._held.pop(key)[1]

    def restart(self) -> int:
        """Measure the peak from here; what is alive now."""
        self.peak = self.live
        return self.live


def measure_step(config: RunConfig, world: World, device: torch.device) -> Measured:
    """Collective: build the run on random codes, take `STEPS` steps.  The process group must exist.

    The configuration's data is replaced; an encoder's weights file must exist.  One engine a call; it is destroyed.
    """
    names: list[str] = [tempfile.mkdtemp() if world.rank == 0 else ""]
    dist.broadcast_object_list(names, src=0)
    folder = Path(names[0])
    if world.rank == 0:
        _write_data(config, folder / "data.npz")
    dist.barrier()
    config = build(config.model_dump(mode="json") | {
        "data": {"source": "npz", "path": str(folder / "data.npz"), "held_out_fraction": 0.0},
        "evaluate": {"at_end": False}, "score": {"enabled": False}, "sampling": {"classes": 1},
    })  # fmt: skip

    if device.type == "cuda":
        return _work(config, folder, world, device, _AllocatorOfGpu(device))
    with LiveStorages() as counter:
        return _work(config, folder, world, device, counter)


class _AllocatorOfGpu:
    """The caching allocator's own counts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def peak(self) -> int:
        """Bytes."""
        return torch.cuda.max_memory_allocated(self.device)

    def restart(self) -> int:
        """As `LiveStorages.restart`."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)


def _work(
    config: RunConfig, folder: Path, world: World, device: torch.device, counter: LiveStorages | _AllocatorOfGpu
) -> Measured:
    mine = [Fence.take(folder).mine if world.rank == 0 else None]
    dist.broadcast_object_list(mine, src=0)
    fence = Fence(folder, mine[0], main=world.rank == 0)  # type: ignore[arg-type]
    session = build_session(config, folder, world, device, fence, StopRequests())
    resting = 0
    for step in range(STEPS):
        resting = counter.restart()
        train_step(session, step)
        session.step += 1
    peak = counter.peak
    fence.release("finished")
    session.engine.destroy()
    del session
    gc.collect()
    return Measured(peak, resting)


def _write_data(config: RunConfig, path: Path) -> None:
    """Random codes, and pixels where an encoder watches, enough for the steps."""
    count = max(config.train.global_batch_size * (STEPS + 1), config.model.num_classes)
    generator = np.random.default_rng(0)
    arrays = {
        "codes": generator.integers(0, config.model.vocab_size, (count, config.model.block_size)),
        "labels": np.arange(count) % config.model.num_classes,
    }
    if config.foresight.method == "mirai-i":
        side = 16 * config.model.grid
        arrays["images"] = np.zeros((count, side, side, 3), np.uint8)
    np.savez(path, **arrays)  # type: ignore[arg-type]
