"""One optimizer step: teacher, forward, backward for each micro-batch, then the update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mirai_ds.config.schedule import horizon_steps, learning_rate
from mirai_ds.engine.step_graphs import Inputs
from mirai_ds.foresight import alignment_active, alignment_multiplier, heads_alone, ramping
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


class Weight(NamedTuple):
    """What `MiraiObjective.forward` must know of the alignment's part in the loss; see there."""

    multiplier: Tensor | float
    expected: float
    detached: bool


def train_step(session: Session, step: int, plainly: bool = False) -> StepRecord:
    """Run 0-based step `step` and return its record; `plainly`: not as a captured graph, in which no hook runs."""
    config, engine = session.config, session.engine
    epoch = step / session.order.steps_per_epoch
    aligned = alignment_active(config.foresight, epoch)
    multiplier = alignment_multiplier(config.foresight, epoch, config.train.epochs)
    horizon = horizon_steps(config.train, session.order.steps_per_epoch)
    lr = learning_rate(config.optimizer, step, horizon)
    sleeps = config.foresight.heads_in_warmup == "sleep"
    engine.set_rates(lr, heads_active=aligned or not sleeps)
    # A function of the step, not of what this process has seen: a resume at the boundary wakes them too.
    if (
        sleeps
        and aligned
        and step > 0
        and not alignment_active(config.foresight, (step - 1) / session.order.steps_per_epoch)
    ):
        engine.wake_heads()
    place = step + session.progress.batch_offset
    # The kernel prepares its gradient for one multiplier and corrects it where another comes: a schedule of steps is
    # captured again at each of them, one that changes all the time is corrected.
    moves = config.foresight.schedule.kind == "cosine" or ramping(config.foresight, epoch)
    expected = 1.0 if moves and session.device.type == "cuda" else multiplier
    detached = heads_alone(config.foresight, epoch)

    def body(batches: Iterable[Inputs], multiplier: Tensor | float) -> dict[str, Tensor]:
        return _step_on_device(session, batches, aligned, Weight(multiplier, expected, detached))

    means = None
    if not plainly:
        means = session.graphs.run(
            (aligned, expected, detached), step, lambda: list(session.loader.host_batches(place)), multiplier, body
        )
    if means is None:
        means = body(session.loader.micro_batches(place), multiplier)
    norm = means.pop("grad_norm")
    return StepRecord(step + 1, (step + 1) / session.order.steps_per_epoch, lr, multiplier, aligned, norm, means)


def _step_on_device(session: Session, batches: Iterable[Inputs], aligned: bool, weight: Weight) -> dict[str, Tensor]:
    """What the device does in a step, and nothing that asks it: means of the metrics over the micro-batches, and
    `grad_norm`.  A graph repeats exactly this; Python that should run in every step belongs to `train_step`."""
    engine = session.engine
    if aligned:
        session.refresh_teacher()
    sums: dict[str, Tensor] = {}
    grad_norm: Tensor | None = None
    if engine.tap_gradients is not None:
        engine.tap_gradients.clear()
    for tokens, labels, keys, images in batches:
        target = session.teacher.features(tokens, labels, images) if aligned else None  # type: ignore[union-attr, arg-type]
        loss, metrics = engine.forward(tokens, labels, keys, target, *weight)
        engine.backward(propagate_nonfinite_loss(loss))
        grad_norm = engine.step()
        metrics["loss"] = loss.detach()
        for name, value in metrics.items():
            sums[name] = sums[name] + value if name in sums else value
    assert grad_norm is not None
    if aligned and engine.tap_gradients is not None and engine.tap_gradients.sums is not None:
        # The engine has divided each loss by the number of micro-batches, and a square twice.
        sums["tap_gradients"] = engine.tap_gradients.sums * session.loader.accumulation**2
    return {name: value / session.loader.accumulation for name, value in sums.items()} | {"grad_norm": grad_norm}


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
