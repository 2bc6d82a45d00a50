"""What operators cost and what is odd about them, counted while a step runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor

from tests.gpu.rehearsal.device import gives_views
from tests.gpu.rehearsal.library import asker

_COPIES = {"copy_", "_to_copy", "_foreach_copy_", "_copy_from"}


class Operators:
    """A watcher of `FakeDevice`: bytes read and written, attention kernels, operators on tensors of two devices."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.attention: Counter[str] = Counter()
        self.mixed: Counter[str] = Counter()  # operators with large tensors of both sides that are no copies

    def __call__(self, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Count one operator."""
        name = func._schema.name.split("::")[1]
        if gives_views(func, name, inputs, outputs):
            return
        self.calls[name] += 1
        self.bytes[name] += _traffic(func, inputs, outputs)
        if name.startswith("_scaled_dot_product"):
            self.attention[name] += 1
        devices = {t.device.type for t in inputs if t.dim()}
        if len(devices) > 1 and name not in _COPIES:
            self.mixed[f"{name} at {asker()}"] += 1


def _traffic(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes on the device: every input is read once, every output written once; what an operator changes, both."""
    read = sum(_size(t) for t in inputs if t.device.type == "cuda")
    written = sum(_size(t) for t in outputs if t.device.type == "cuda")
    if func._schema.is_mutable and not outputs:
        written = sum(_size(t) for t in inputs[:1])
    return read + written


def _size(tensor: Tensor) -> int:
    """Of what is really there: an expanded tensor is as large as its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
