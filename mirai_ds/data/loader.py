"""A rank's micro-batches of a step, cut from the global batch by position alone, read ahead by worker processes."""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mirai_ds.config import UserError
from mirai_ds.config.errors import LocalError
from mirai_ds.data.order import DataOrder
from mirai_ds.data.stacked import StackedCodes
from mirai_ds.data.token_source import TokenSource

MAX_AUTO_WORKERS = 8
READ_BYTES = 16 * 2**20
NOT_FOR_WORKERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Batch(NamedTuple):
    """tokens (B, N), labels (B,), keys (B,) int64 and images (B, 3, H, W) uint8 or None."""

    tokens: Tensor
    labels: Tensor
    keys: Tensor
    images: Tensor | None


@dataclass(frozen=True)
class MicroBatchDataset(Dataset[Any]):
    """A rank's micro-batches, numbered from the start of the run: number k is accumulation k % A of step k // A.

    Micro-batch a of rank r holds positions (a * world + r) * micro ... of the global batch.  Which view a sample shows
    is a function of its key too: a worker draws nothing.
    """

    source: TokenSource
    order: DataOrder
    micro: int
    rank: int
    world: int
    accumulation: int
    images: bool

    def __getitem__(self, number: int) -> Batch:
        step, a = divmod(number, self.accumulation)
        start = (a * self.world + self.rank) * self.micro
        indices, keys = self.order.batch(step, start, start + self.micro)
        views = self.order.views(keys, self.source.num_views)
        tokens, labels, images = self.source.gather(indices, views, self.images)
        return Batch(tokens, labels, keys, images)


class _ErrorsAsText(Dataset[Any]):
    """Brings a user's mistake out of a worker as text: DataLoader would wrap it into a traceback."""

    def __init__(self, cut: MicroBatchDataset) -> None:
        self.cut = cut

    def __getitem__(self, number: int) -> Batch | str:
        try:
            return self.cut[number]
        except UserError as error:
            return str(error)


class BatchLoader:
    """Micro-batches on `device`.  workers > 0: that many processes read up to `prefetch` micro-batches each ahead, into
    pinned memory where there is a GPU; the batches are the same for any number of them."""

    def __init__(
        self,
        source: TokenSource,
        order: DataOrder,
        micro: int,
        rank: int,
        world: int,
        device: torch.device,
        images: bool,
        workers: int = 0,
        prefetch: int = 2,
    ) -> None:
        accumulation, rest = divmod(order.global_batch_size, micro * world)
        if rest:
            raise ValueError(f"micro * world = {micro} * {world} does not divide {order.global_batch_size}")
        self.cut = MicroBatchDataset(source, order, micro, rank, world, accumulation, images)
        self.device, self.workers, self.prefetch = device, workers, prefetch
        self.accumulation = accumulation
        self._stream: Iterator[Batch | str] | None = None
        self._next = -1  # number of the micro-batch the stream gives next

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """The accumulation steps of global step `step` (0-based).  Raises LocalError for data that cannot be read."""
        for batch in self.host_batches(step):
            yield Batch(*(None if t is None else t.to(self.device, non_blocking=True) for t in batch))  # type: ignore[arg-type]

    def host_batches(self, step: int) -> Iterator[Batch]:
        """The same in host memory, pinned where there is a GPU."""
        for number in range(step * self.accumulation, (step + 1) * self.accumulation):
            yield self._read(number)

    def _read(self, number: int) -> Batch:
        if self.workers == 0:
            try:
                return self._pinned(self.cut[number])
            except UserError as error:
                raise LocalError(str(error)) from None
        if self._stream is None or number != self._next:  # the start of a run, or a resume
            self._stream = self._start(number)
        batch = next(self._stream)
        self._next = number + 1
        if isinstance(batch, str):
            raise LocalError(batch)
        return batch

    def _pinned(self, batch: Batch) -> Batch:
        """In pinned memory where there is a GPU: from any other the host waits for the copy, `non_blocking` or not."""
        if self.device.type != "cuda":
            return batch
        return Batch(*(None if tensor is None else tensor.pin_memory() for tensor in batch))  # type: ignore[arg-type]

    def _start(self, number: int) -> Iterator[Batch | str]:
        self.close()
        _STARTED.add(self)
        loader = DataLoader(
            _ErrorsAsText(self.cut), batch_size=None, sampler=itertools.count(number), num_workers=self.workers,
            prefetch_factor=self.prefetch, pin_memory=self.device.type == "cuda", worker_init_fn=_quiet_worker,
            generator=torch.Generator(),  # else it would draw from the process's own
        )  # fmt: skip
        # A worker begins with its parent's mask: no signal reaches it before `_quiet_worker` has run.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_WORKERS)
        try:
            return iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """End the workers."""
        stream, self._stream = self._stream, None
        # Not left to the collection of garbage: a traceback may hold the stream.
        if (end := getattr(stream, "_shutdown_workers", None)) is not None:
            end()


_STARTED: weakref.WeakSet[BatchLoader] = weakref.WeakSet()  # with workers


@atexit.register
def _close_all() -> None:
    """Of a process that ends with loaders open, by an error say: Python would send SIGTERM to workers, which ignore it,
    and wait for them for ever."""
    for loader in list(_STARTED):
        loader.close()


def _quiet_worker(_: int) -> None:
    """The rank decides what a signal means and ends its workers; they see its death themselves."""
    for number in NOT_FOR_WORKERS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NOT_FOR_WORKERS)
    warnings.filterwarnings("ignore", module="PIL")  # remarks on files, once for each worker


def warm_page_cache(source: TokenSource) -> threading.Thread | None:
    """Read a mapped store once in order, in the background: at random the first epoch would fetch it page by page.
    For one rank a node.  None where codes are in memory or would fill half of it."""
    parts = source.codes.parts if isinstance(source.codes, StackedCodes) else (source.codes,)
    paths = [Path(part.filename) for part in parts if isinstance(part, np.memmap) and part.filename is not None]
    if not paths or sum(path.stat().st_size for path in paths) > available_bytes() // 2:
        return None

    def read() -> None:
        buffer = bytearray(READ_BYTES)
        for path in paths:
            # What cannot be read will be said when it is used.
            with suppress(OSError), path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    thread = threading.Thread(target=read, daemon=True, name="warm-page-cache")
    thread.start()
    return thread


def available_bytes() -> int:
    """Memory that could be used for caching; 0 where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kib[0] * 1024 if kib else 0


def auto_workers(images: bool, local_ranks: int) -> int:
    """Reading codes needs no help; decoding images gets the cores a rank can spare, up to 8."""
    spare = len(os.sched_getaffinity(0)) // max(1, local_ranks) - 1
    return max(0, min(MAX_AUTO_WORKERS, spare)) if images else 0
