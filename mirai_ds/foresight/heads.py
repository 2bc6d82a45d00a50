"""MLP heads from hidden states to the teacher's feature space (the REPA projector)."""

from __future__ import annotations

from torch import nn


def projector(dim: int, hidden: int, target: int) -> nn.Sequential:
    """Linear, SiLU, Linear, SiLU, Linear, all biased; keys 0, 2, 4 as in the authors' checkpoints."""
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, target)
    )


def projectors(count: int, dim: int, hidden: int, target: int) -> nn.ModuleList:
    """One head an offset."""
    return nn.ModuleList(projector(dim, hidden, target) for _ in range(count))
