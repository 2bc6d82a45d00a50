"""Whole steps as CUDA graphs: the plain step's bits, by every kind of engine that can be captured."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from mirai_ds.config import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STEPS = 7  # three plain ones, the capture and four replays


def steps_of(settings: dict[str, Any], cuda_graph: str) -> tuple[list[float], list[float], str, str]:
    """Losses, norms, the state's digest, and why steps ran plainly."""
    from mirai_ds.benchmarks.sessions import random_session
    from mirai_ds.engine.start import start_process_group
    from mirai_ds.runtime.distributed import World
    from mirai_ds.train.step import train_step
    from tests.gpu.rehearsal.steps import digest

    os.environ.setdefault("MASTER_PORT", "29541")
    world = World(0, 0, 1, 1)
    start_process_group(world, 5)
    config = build({**settings, "train": settings["train"] | {"cuda_graph": cuda_graph}})
    losses, norms = [], []
    torch._dynamo.reset()
    with random_session(config, world, torch.device("cuda", 0), STEPS) as session:
        for _ in range(STEPS):
            record = train_step(session, session.step)
            session.count_step()
            losses.append(record.metrics["loss"])
            norms.append(record.grad_norm)
        assert session.engine.confirm_updates() == 0
        return [float(v) for v in losses], [float(v) for v in norms], digest(session), session.graphs.problem


@pytest.mark.parametrize(("method", "stage", "precision", "compiled"), [
    ("none", 0, "bf16-autocast", "blocks"), ("mirai-e", 0, "bf16-autocast", "blocks"),
    ("mirai-e", 2, "bf16-autocast", "blocks"), ("mirai-e", 1, "bf16", "blocks"), ("mirai-e", 2, "fp32", "none"),
    ("mtp", 0, "bf16-autocast", "none"),
])  # fmt: skip
def test_replays_are_plain_steps(method: str, stage: int, precision: str, compiled: str) -> None:
    """Deterministic kernels, so equal bits: losses, norms, masters, moments and average."""
    settings = {
        "model": {"size": "custom", "dim": 128, "n_layer": 3, "n_head": 4, "vocab_size": 512, "block_size": 64},
        "foresight": {"method": method, "warmup_epochs": 0, **({} if method == "none" else {"projector_dim": 128})},
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "train": {"global_batch_size": 8, "precision": precision, "compile": compiled},
    }
    graph, plain = steps_of(settings, "auto"), steps_of(settings, "off")
    assert graph[3] == ""
    assert graph[:3] == plain[:3]
    assert len(set(graph[0])) == STEPS
