"""One optimizer step: teacher, forward, backward for each micro-batch, then the update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mirai_ds.config.schedule import horizon_steps, learning_rate
from mirai_ds.foresight import alignment_active, alignment_multiplier
from mirai_ds.train.session import Session


@dataclass
class StepRecord:
    """What a step did.  Tensors stay on the device until somebody logs; means over this rank's micro-batches."""

    step: int  # 1-based: steps done
    epoch: float
    lr: float
    multiplier: float
    aligned: bool
    grad_norm: Tensor
    metrics: dict[str, Tensor]
    applied: bool = True  # unless `nonfinite.confirm_step` found out otherwise


def train_step(session: Session, step: int) -> StepRecord:
    """Run 0-based step `step` and return its record."""
    config, engine = session.config, session.engine
    epoch = step / session.order.steps_per_epoch
    aligned = alignment_active(config.foresight, epoch)
    multiplier = alignment_multiplier(config.foresight, epoch, config.train.epochs)
    horizon = horizon_steps(config.train, session.order.steps_per_epoch)
    lr = learning_rate(config.optimizer, step, horizon)
    engine.set_rates(lr, heads_active=aligned)
    if aligned:
        # A function of the step, not of what this process has seen: a resume at the boundary wakes them too.
        if step > 0 and not alignment_active(config.foresight, (step - 1) / session.order.steps_per_epoch):
            engine.wake_heads()
        session.refresh_teacher()
    sums: dict[str, Tensor] = {}
    grad_norm: Tensor | None = None
    for batch in session.loader.micro_batches(step + session.progress.batch_offset):
        target = session.teacher.features(batch.tokens, batch.labels, batch.images) if aligned else None  # type: ignore[union-attr]
        loss, metrics = engine.forward(batch.tokens, batch.labels, batch.keys, target, multiplier)
        engine.backward(propagate_nonfinite_loss(loss))
        grad_norm = engine.step()
        metrics["loss"] = loss.detach()
        for name, value in metrics.items():
            sums[name] = sums[name] + value if name in sums else value
    means = {name: value / session.loader.accumulation for name, value in sums.items()}
    assert grad_norm is not None
    return StepRecord(step + 1, (step + 1) / session.order.steps_per_epoch, lr, multiplier, aligned, grad_norm, means)


def propagate_nonfinite_loss(loss: Tensor) -> Tensor:
    """`loss`, whose gradients are NaN unless it is finite: the engine then refuses the update on every rank.  Nothing
    is read from the device, and a finite loss is multiplied by one, which changes no bit."""
    value = loss.detach()
    return loss * torch.where(torch.isfinite(value), torch.ones_like(value), torch.full_like(value, float("nan")))


def mean_over_ranks(values: dict[str, Tensor]) -> dict[str, list[float]]:
    """Average of each (small) tensor over all ranks, as Python numbers: here metrics leave the device."""
    import torch.distributed as dist

    names = sorted(values)
    flat = torch.cat([values[name].double().flatten() for name in names])
    dist.all_reduce(flat)
    numbers, out = (flat / dist.get_world_size()).tolist(), {}
    for name in names:
        size = values[name].numel()
        out[name], numbers = numbers[:size], numbers[size:]
    return out
