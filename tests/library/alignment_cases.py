"""What the ranks run: the page's GPT-2 with alignment under DDP, FSDP and DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

import mirai_ds as m
from tests.library.foreign import digits, example

BATCH, STEPS = 16, 4
ADAMW = {"lr": 1e-2, "eps": 1e-4}  # a small eps would follow the sign of what rounding leaves of a zero gradient
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0,
    "optimizer": {"type": "AdamW", "params": {**ADAMW, "torch_adam": True}},
}  # fmt: skip


def alignment(seed: int = 0) -> m.ForesightAlignment:
    """Of the page's ImageGPT on digits; warm-up ends after the first step."""
    torch.manual_seed(seed)
    model = example("gpt2_mirai.py").ImageGPT(17, 10, 64, width=32, depth=3, heads=2)
    config = m.ForesightConfig(method="mirai-e", convention="paper", warmup_epochs=1, projector_dim=24)
    return m.ForesightAlignment(model, "blocks.1", grid=8, width=32, config=config, decay=0.5)


def _step(mirai: m.ForesightAlignment, network: Any, tokens: Tensor, labels: Tensor, epoch: int) -> Tensor:
    target = mirai.target(tokens, labels) if mirai.begun(epoch) else None
    logits, loss, _ = network(target, tokens[:, :-1], labels)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten()) + mirai.multiplier(epoch) * loss


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(way: str, differs: bool = False) -> tuple[list[float], dict[str, float]]:
    """(losses of the whole batch, sums of the teacher's parameters) of a few steps on this rank's part of the batch.

    way: alone, ddp, fsdp or the stage of ZeRO.  differs: each rank's model begins at weights of its own, until the
    wrapper sends round those of rank 0.
    """
    rank, world = (0, 1) if way == "alone" else (dist.get_rank(), dist.get_world_size())
    page = example("parallel_mirai.py")
    mirai = alignment(rank if differs else 0)
    network, update = mirai, mirai.update
    if way == "ddp":
        network, update = page.with_ddp(mirai)
    elif way == "fsdp":
        network, update = page.with_fsdp(mirai)
    elif way != "alone":
        network, update = page.with_deepspeed(mirai, DEEPSPEED | {"zero_optimization": {"stage": int(way)}})
    engine = network if way.isdigit() else None
    optimizer = None if engine else torch.optim.AdamW(mirai.parameters(), **ADAMW)
    tokens, labels = digits(BATCH * STEPS)
    losses = []
    for step in range(STEPS):
        mine = slice(step * BATCH + rank * BATCH // world, step * BATCH + (rank + 1) * BATCH // world)
        loss = _step(mirai, network, tokens[mine], labels[mine], step)
        _apply(engine, optimizer, loss)
        update()
        total = loss.detach().clone()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world)
    assert mirai.teacher is not None
    sums = {name: float(_whole(p).double().abs().sum()) for name, p in mirai.teacher.named_parameters()}
    if engine:
        engine.destroy()
    return losses, sums


def _apply(engine: Any, optimizer: torch.optim.Optimizer | None, loss: Tensor) -> None:
    if optimizer is None:
        engine.backward(loss)
        engine.step()
        return
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
