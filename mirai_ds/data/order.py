"""The data order is a function of (seed, epoch, position): never of ranks, workers or library versions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mirai_ds.runtime.counter_random import derive_keys, root_key

# Independent uses of randomness under one (seed, epoch).
_SHUFFLE, _VIEW, _DROPOUT = 0, 1, 2


@dataclass(frozen=True)
class DataOrder:
    """Shuffled epochs over `num_samples`, the incomplete last batch dropped (LlamaGen's drop_last)."""

    num_samples: int
    global_batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch."""
        return self.num_samples // self.global_batch_size

    def permutation(self, epoch: int) -> Tensor:
        """(num_samples,) int64: the order of `epoch`."""
        return _permutation(self.num_samples, self.seed, epoch)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Sample numbers and keys (int64 each) of positions start..stop-1 of the global batch of `step` (0-based).

        A key belongs to (seed, epoch, position in the epoch); it decides the sample's dropout and view.
        """
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        stop = self.global_batch_size if stop is None else stop
        first = step_in_epoch * self.global_batch_size
        positions = torch.arange(first + start, first + stop)
        keys = derive_keys(root_key(self.seed, epoch) + positions, _DROPOUT)
        return self.permutation(epoch)[positions], keys

    @staticmethod
    def views(keys: Tensor, num_views: int) -> Tensor:
        """Which of `num_views` stored crops each sample shows: (B,) int64."""
        return (derive_keys(keys, _VIEW) & ((1 << 62) - 1)) % num_views


@lru_cache(maxsize=2)
def _permutation(num_samples: int, seed: int, epoch: int) -> Tensor:
    scores = derive_keys(root_key(seed, epoch) + torch.arange(num_samples), _SHUFFLE)
    return torch.argsort(scores, stable=True)
