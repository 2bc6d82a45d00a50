"""torch.compile of blocks: one graph for all blocks of a network, since nothing in it depends on a block's number.

Blocks and not the whole: recomputation, the tap of a hidden state and ZeRO-3's gathers stay outside of the graphs, a
first step takes seconds instead of minutes, and what DeepSpeed hooks onto modules still runs.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mirai_ds.config import RecomputeConfig, TrainConfig
from mirai_ds.runtime.log import LOG


def wanted(config: TrainConfig, device: torch.device) -> bool:
    """Whether blocks are compiled.  Where `auto` would and no C compiler is there, which Triton needs for each kernel's
    launcher, they are not, and the user is told."""
    if not config.compiles_on(device.type):
        return False
    if config.compile == "auto" and not can_compile():
        LOG.warning("blocks are not compiled (train.compile: auto): no Triton or no C compiler here; steps are slower")
        return False
    return True


def can_compile() -> bool:
    """Whether Triton and a C compiler are there."""
    compilers = (os.environ.get("CC", "gcc"), "gcc", "clang", "cc")
    return importlib.util.find_spec("triton") is not None and any(map(shutil.which, compilers))


def compile_blocks(blocks: Iterable[nn.Module], recompute: RecomputeConfig | None = None) -> None:
    """Replace each block's `forward` by a compiled one; it compiles at its first call.

    recompute: with policy `budget` the partitioner keeps only that share of what the backward pass needs and chooses
    what is cheapest to compute again.
    """
    for block in blocks:
        forward: Any = torch.compile(block.forward, dynamic=False)
        if recompute is not None and recompute.policy == "budget":
            forward = _budgeted(forward, recompute.budget)
        block.forward = forward


def _budgeted(forward: Any, budget: float) -> Any:
    """The partitioner reads a global at compile time; other graphs of this process keep theirs."""
    from torch._functorch import config

    def call(*arguments: Any, **named: Any) -> Any:
        with config.patch(activation_memory_budget=budget):
            return forward(*arguments, **named)

    return call


@contextmanager
def eager() -> Iterator[None]:
    """Everything compiled runs as it was written, module by module, so that hooks see each of them."""
    with torch.compiler.set_stance("force_eager"):
        yield
