"""Between logging points the host only hands work to the device; CUDA's sync debug mode makes each wait an error.

It does not see `torch.cuda.synchronize`; the rehearsal on a fake GPU counts that too.

Not on stage 3 and not with `overlap_comm`: there DeepSpeed waits in its backward pass for the reduction of gradients.
"""

from __future__ import annotations

import os

import pytest
import torch

from mirai_ds.config import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(("method", "cuda_graph"), [("none", "off"), ("mirai-e", "off"), ("mirai-e", "auto")])
@pytest.mark.parametrize(("stage", "precision"), [
    (0, "fp32"), (0, "bf16-autocast"), (1, "bf16"), (2, "bf16-autocast"), (2, "bf16"),
])  # fmt: skip
def test_a_training_step_does_not_wait_for_the_device(stage: int, precision: str, method: str, cuda_graph: str) -> None:
    from mirai_ds.benchmarks.sessions import random_session
    from mirai_ds.engine.start import start_process_group
    from mirai_ds.runtime.distributed import World
    from mirai_ds.train.step import train_step

    os.environ.setdefault("MASTER_PORT", "29533")
    world = World(0, 0, 1, 1)
    start_process_group(world, 5)
    config = build({
        "model": {"size": "custom", "dim": 128, "n_layer": 3, "n_head": 4, "vocab_size": 512, "block_size": 64},
        "foresight": {"method": method, "warmup_epochs": 0, **({} if method == "none" else {"projector_dim": 128})},
        "deepspeed": {"zero_optimization": {"stage": stage, "overlap_comm": False}},
        "train": {"global_batch_size": 8, "precision": precision, "cuda_graph": cuda_graph},
    })  # fmt: skip
    with random_session(config, world, torch.device("cuda", 0), 8) as session:
        assert (session.graphs.problem == "") == (cuda_graph == "auto")
        for _ in range(4):  # allocators, kernels and buckets get warm, and the step is captured
            train_step(session, session.step)
            session.count_step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                train_step(session, session.step)
                session.count_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert session.engine.confirm_updates() == 0
