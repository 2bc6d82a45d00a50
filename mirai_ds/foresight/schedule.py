"""When and how strongly the alignment pulls, as a function of the epoch alone."""

from __future__ import annotations

import bisect
import math

from mirai_ds.config import ForesightConfig


def alignment_active(config: ForesightConfig, epoch: float) -> bool:
    """Whether warm-up is over at `epoch` (0-based, fractional), so that teacher and heads run."""
    return config.active and epoch >= (config.warmup_epochs or 0.0)


def alignment_multiplier(config: ForesightConfig, epoch: float, total_epochs: float) -> float:
    """Multiplier on the weighted alignment loss at `epoch` (0-based, fractional); 0 during warm-up.

    `warmup_epochs` counts plain next-token epochs (15 in the paper).  `step` boundaries belong to the later value.
    """
    if not alignment_active(config, epoch):
        return 0.0
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
