"""What the alignment loss is told it will receive from backward, beside what it receives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from mirai_ds.config.deepspeed_file import resolve
from mirai_ds.engine.engine import TrainEngine
from mirai_ds.foresight import MiraiObjective, methods
from mirai_ds.model import initialise
from tests.engine.cases import fixed_target, release, toy_config, toy_loader


def upstream_case(stage: int, precision: str, accumulation: int, multiplier: float) -> list[tuple[float, float]]:
    """(told, received) of every micro-step of one step."""
    config = toy_config("mirai-e", stage, precision, accumulation=accumulation)
    ds_config = resolve(config, dist.get_world_size())
    steps = ds_config["gradient_accumulation_steps"]
    assert steps == accumulation
    module = MiraiObjective(config.model, config.foresight, grad_accum_steps=steps)
    initialise(module, config.seed)
    engine = TrainEngine(module, config, ds_config, torch.device("cpu"))
    told: list[float] = []
    received: list[float] = []
    compute = methods.foresight_cosine

    def spy(*args: Any, **kwargs: Any) -> Any:
        loss, cosine = compute(*args, **kwargs)
        told.append(kwargs["upstream"])
        loss.register_hook(lambda gradient: received.append(float(gradient)))
        return loss, cosine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "foresight_cosine", spy)
        engine.set_rates(1e-3, heads_active=True)
        for batch in toy_loader(config, dist.get_rank(), dist.get_world_size(), accumulation).micro_batches(0):
            target = fixed_target(config, batch, 0)
            loss, _ = engine.forward(batch.tokens, batch.labels, batch.keys, target, multiplier)
            engine.backward(loss)
            engine.step()
    release(engine)
    return list(zip(told, received, strict=True))
