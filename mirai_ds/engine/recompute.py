"""Activation checkpointing: whole blocks, their feed-forward halves, or what the compiler chooses within a budget.

Whole blocks (full, every n-th) by torch's implementation or DeepSpeed's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mirai_ds.config import RecomputeConfig
from mirai_ds.model.gpt import BlockCall


def block_runner(config: RecomputeConfig) -> BlockCall | None:
    """What `GPTTrunk.run_block` is set to, or None to keep all activations.

    Dropout is a function of the sample's key, so no random state is stored or restored.  DeepSpeed's implementation is
    there for its options (activations partitioned or in host memory); torch's is the default.
    """
    if config.policy not in ("full", "every-n"):
        return None
    every = config.every if config.policy == "every-n" else 1
    call = _deepspeed_call(config) if config.implementation == "deepspeed" else _torch_call

    def run(index: int, block: Callable[..., Tensor], arguments: tuple[Tensor | None, ...]) -> Tensor:
        if index % every or not torch.is_grad_enabled():
            return block(*arguments)
        return call(block, *arguments)

    return run


def recompute_halves(blocks: Iterable[nn.Module], config: RecomputeConfig) -> None:
    """Let the backward pass run each feed-forward half again (policy `mlp`): half of a block's activations (GPT-B,
    autocast) for three fifths of its forward pass.  Attention, which is dearer to repeat for what it keeps, is kept."""
    for block in blocks:
        block.run_feed_forward = _again if config.policy == "mlp" else None  # type: ignore[assignment]


def _again(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return _torch_call(function, x) if torch.is_grad_enabled() else function(x)


def _torch_call(block: Callable[..., Tensor], *arguments: Any) -> Tensor:
    out: Tensor = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
    return out


def _deepspeed_call(config: RecomputeConfig) -> Callable[..., Tensor]:
    import deepspeed

    # On a CPU device the activations are in host memory already, and DeepSpeed would empty the only copy.
    in_host_memory = config.cpu_checkpointing and deepspeed.accelerator.get_accelerator().device_name() != "cpu"
    deepspeed.checkpointing.configure(
        None, partition_activations=config.partition_activations, checkpoint_in_cpu=in_host_memory
    )

    def call(block: Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
        # With partitioned activations DeepSpeed empties the tensors it is given after use: a view of x leaves the
        # tapped hidden state whole, and the rotary table stays out of its reach.
        out: Tensor = deepspeed.checkpointing.checkpoint(lambda y: block(y, *rest), x.view_as(x))
        return out

    return call
