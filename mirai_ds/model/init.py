"""Initial weights as a function of (seed, name): the same on every rank, for every arm of a comparison."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn


def initial_value(name: str, shape: tuple[int, ...], seed: int, std: float = 0.02) -> Tensor:
    """float32 on CPU.  LlamaGen's rule: matrices N(0, std), norm weights 1, biases 0, `output.weight` zero.

    `name` is the state-dict key without the training wrapper's prefix, so that a baseline and a Mirai run with one
    seed start from the same GPT.
    """
    if name == "output.weight":
        return torch.zeros(shape)
    if len(shape) < 2:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    # One 32-bit number of both: torch's CPU generator takes the low 32 bits of a seed and drops the others.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialise(module: nn.Module, seed: int, std: float = 0.02) -> None:
    """Fill every parameter of `module` by `initial_value`."""
    for name, parameter in module.named_parameters():
        parameter.copy_(initial_value(name.removeprefix("gpt."), tuple(parameter.shape), seed, std))
