"""An experiment, not a way to train: EMA teachers that start from different random weights on every rank.

In the authors' script (github y0urOy/Mirai-Code) the average is copied from the model before DDP gives all ranks the
weights of rank 0, and each rank has a seed of its own: rank r's teacher is an average that began at rank r's random
weights, and only rank 0's is saved.  An average forgets its start exponentially, so after t updates

    teacher_r = ema + decay^t (init_r - init_0)

holds exactly, and one process can be all of those ranks: no further average is kept.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mirai_ds.config import RunConfig
from mirai_ds.foresight.teachers import Average, EmaTeacher
from mirai_ds.model import initial_value

OTHER_SEEDS = 2**31  # seeds of runs are below it
NEGLIGIBLE = 1e-7  # of the wrong start: below fp32's resolution of the weights themselves


class DesynchronisedTeacher(EmaTeacher):
    """As many teachers as `foresight.desynchronised_ranks`: part r of a micro-batch, cut evenly, sees rank r's."""

    capturable = False  # `remembers` is another number in each step

    def __init__(self, config: RunConfig, dtype: torch.dtype, device: torch.device, autocast: bool) -> None:
        super().__init__(config.model, config.foresight, dtype, device, autocast)
        assert config.foresight.desynchronised_ranks is not None
        self.ranks = config.foresight.desynchronised_ranks
        self.decay, self.remembers = config.ema.decay, 1.0
        self.average: dict[str, Tensor] = {}
        names = [(name, tuple(value.shape)) for name, value in self.trunk.named_parameters()]

        def drawn(seed: int) -> dict[str, Tensor]:
            std = config.model.init_std
            return {name: initial_value(name, shape, seed, std).to(device, dtype) for name, shape in names}

        started = drawn(config.seed)
        others = [drawn(config.seed + OTHER_SEEDS * rank) for rank in range(1, self.ranks)]
        self.offsets = [{name: start - started[name] for name, start in one.items()} for one in (started, *others)]

    def age(self, updates: int) -> None:
        """Tell how often the average was updated: decay^updates of the wrong start is left."""
        self.remembers = self.decay**updates

    def refresh(self, average: Average, updates: int) -> None:
        """See `Teacher.refresh`."""
        if self._version != average.version:
            self.age(updates)
        super().refresh(average, updates)

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `EmaTeacher.load`; rank 0's average."""
        self.average = {name: value.clone() for name, value in weights}
        super().load(self.average.items())

    @torch.no_grad()
    def features(self, tokens: Tensor, labels: Tensor, images: Tensor | None) -> Tensor:
        """See `EmaTeacher.features`."""
        if self.remembers < NEGLIGIBLE:
            return super().features(tokens, labels, images)
        features = []
        for rank, (part, label) in enumerate(zip(tokens.chunk(self.ranks), labels.chunk(self.ranks), strict=True)):
            offset = self.offsets[rank]
            super().load((name, value + self.remembers * offset[name]) for name, value in self.average.items())
            features.append(super().features(part, label, images))
        super().load(self.average.items())
        return torch.cat(features)
