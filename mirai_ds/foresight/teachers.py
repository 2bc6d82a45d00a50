"""Teachers give features, never gradients: what one is, and Mirai-E's, the model's own EMA."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mirai_ds.config import ForesightConfig, ModelConfig
from mirai_ds.model import GPTTrunk


class Average(Protocol):
    """The run's own average, of which each rank holds a part.  version: changes with every update of it."""

    @property
    def version(self) -> int: ...

    def gather(self, names: Collection[str], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Collective: (name, whole tensor) of these GPT keys."""
        ...


class Teacher:
    """What the training step needs of a teacher.  By itself it never changes, needs no images and has no blocks."""

    feature_dim: int
    reads_images = False  # whether `features` needs the pixels
    # Whether a CUDA graph may repeat `refresh` and `features`: every call launches the same operations, and no number
    # that changes is Python's, which a graph would repeat as it was captured.  So nobody is taken for one unasked.
    capturable = False
    blocks: Sequence[nn.Module] = ()  # of a GPT: what the compiler may replace

    def features(self, tokens: Tensor, labels: Tensor, images: Tensor | None) -> Tensor:
        """tokens (B, N), labels (B,) int64, images (B, 3, H, W) uint8 or None -> features (B, M, C), no gradient."""
        raise NotImplementedError

    def refresh(self, average: Average, updates: int) -> None:
        """Collective, before each aligned step: take what is newer of the run's own average, which has been updated
        `updates` times."""


class EmaTeacher(Teacher):
    """The first `teacher_layer` blocks with averaged weights: true labels, no dropout, raw residual stream.

    The averages are the run's own, renewed at every step, or (`foresight.teacher_weights`) another's, loaded once.
    """

    capturable = True

    def __init__(
        self, model: ModelConfig, foresight: ForesightConfig, dtype: torch.dtype, device: torch.device, autocast: bool
    ) -> None:
        assert foresight.teacher_layer is not None
        self.feature_dim = model.width
        self.n_tokens = model.block_size - (0 if foresight.teacher_sees_last_token else 1)
        self.autocast = autocast
        self.frozen = foresight.teacher_weights is not None
        with torch.device(device):
            self.trunk = GPTTrunk(model, foresight.teacher_layer).eval().requires_grad_(False)
        for parameter in self.trunk.parameters():  # the rotary table stays fp32
            parameter.data = parameter.data.to(dtype)
        self.names = frozenset(name for name, _ in self.trunk.named_parameters())
        self.dtype, self.blocks = dtype, list(self.trunk.layers)
        self._version = -1

    def refresh(self, average: Average, updates: int) -> None:
        """See `Teacher.refresh`; one with weights of its own keeps them, and nothing is gathered twice."""
        if not self.frozen and self._version != average.version:
            self.load(average.gather(self.names, self.dtype))
            self._version = average.version

    @torch.no_grad()
    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy named averages (GPT keys) in; raises KeyError when one is missing."""
        own = dict(self.trunk.named_parameters())
        for name, value in weights:
            own.pop(name).copy_(value)
        if own:
            raise KeyError(f"the teacher was not given {sorted(own)[:3]} ({len(own)} tensors)")

    @torch.no_grad()
    def features(self, tokens: Tensor, labels: Tensor, images: Tensor | None) -> Tensor:
        """(B, 1 + T, D): slot 0 is the class; T = N - 1, or N when the teacher sees the last token.

        PAR: n - 1 slots more, in the student's order.
        """
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            return self.trunk.features(tokens[:, : self.n_tokens], labels)
