"""When and how strongly the alignment pulls, as a function of the epoch alone."""

from __future__ import annotations

import bisect
import math

from mirai_ds.config import ForesightConfig


def alignment_active(config: ForesightConfig, epoch: float) -> bool:
    """Whether teacher and heads run at `epoch` (0-based, fractional): warm-up is over, or heads learn at its end."""
    return config.active and epoch >= (config.warmup_epochs or 0.0) - config.head_warmup_epochs


def heads_alone(config: ForesightConfig, epoch: float) -> bool:
    """Whether at `epoch` only the heads learn from the alignment, the network's states being detached."""
    return alignment_active(config, epoch) and epoch < (config.warmup_epochs or 0.0)


def ramping(config: ForesightConfig, epoch: float) -> bool:
    """Whether at `epoch` the multiplier is still rising after warm-up."""
    warmup = config.warmup_epochs or 0.0
    return config.active and warmup <= epoch < warmup + config.ramp_epochs


def alignment_multiplier(config: ForesightConfig, epoch: float, total_epochs: float) -> float:
    """Multiplier on the weighted alignment loss at `epoch` (0-based, fractional); 0 while the alignment sleeps.

    `warmup_epochs` counts plain next-token epochs (15 in the paper).  `step` boundaries belong to the later value.
    While heads learn alone it is the schedule's; then `ramp_epochs` multiply it by a line from 0 to 1.
    """
    if not alignment_active(config, epoch):
        return 0.0
    value = _scheduled(config, epoch, total_epochs)
    return value * (epoch - (config.warmup_epochs or 0.0)) / config.ramp_epochs if ramping(config, epoch) else value


def _scheduled(config: ForesightConfig, epoch: float, total_epochs: float) -> float:
    schedule = config.schedule
    if schedule.kind == "const":
        return 1.0
    if schedule.kind == "step":
        assert schedule.at_epochs is not None
        assert schedule.multipliers is not None
        return schedule.multipliers[bisect.bisect_right(schedule.at_epochs, epoch)]
    span = total_epochs - schedule.start_epoch
    progress = min(1.0, max(0.0, (epoch - schedule.start_epoch) / span))
    return schedule.final + (1.0 - schedule.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
