"""Learning rate and run length as functions of the step."""

from __future__ import annotations

import math

from mirai_ds.config.run_config import OptimizerConfig, TrainConfig


def horizon_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps in `epochs` epochs of whole batches: what schedules span."""
    return max(1, round(train.epochs * steps_per_epoch))


def total_steps(train: TrainConfig, steps_per_epoch: int) -> int:
    """Steps after which the run stops: the horizon, or earlier by `max_steps` (which bends no schedule)."""
    steps = horizon_steps(train, steps_per_epoch)
    return min(steps, train.max_steps) if train.max_steps else steps


def learning_rate(optimizer: OptimizerConfig, step: int, horizon: int) -> float:
    """Rate of step `step` (0-based) of `horizon`: linear warm-up to `lr`, then constant or a cosine to `final_lr`."""
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    progress = (step - optimizer.warmup_steps) / max(1, horizon - optimizer.warmup_steps)
    return optimizer.final_lr + (optimizer.lr - optimizer.final_lr) * 0.5 * (
        1.0 + math.cos(math.pi * min(1.0, progress))
    )
