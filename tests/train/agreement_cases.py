"""Runs inside a rank: what one rank cannot open is every rank's error."""

from __future__ import annotations

import torch.distributed as dist

from mirai_ds.config import UserError
from mirai_ds.train.agree import on_every_rank


def agreement_case(failing: int | None) -> str:
    """What this rank gets when rank `failing` lacks a file (None: all have it)."""

    def build() -> str:
        if dist.get_rank() == failing:
            raise UserError(f"encoder.pth: no such file on rank {failing}")
        return f"built on {dist.get_rank()}"

    try:
        return on_every_rank(build)
    except UserError as error:
        return f"error: {error}"
