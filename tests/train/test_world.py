"""Who am I among my peers: from each launcher's variables; schedules as functions of the step."""

from __future__ import annotations

from typing import Any

import pytest

from mirai_ds.config import OptimizerConfig, TrainConfig
from mirai_ds.runtime.distributed import World, read_world
from mirai_ds.train.schedule import horizon_steps, learning_rate, total_steps
from tests.train.agreement_cases import agreement_case


def test_world_of_each_launcher() -> None:
    torchrun = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    deepspeed = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_RANK": "1"}
    srun = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0",
            "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}  # fmt: skip
    for environ in (torchrun, deepspeed, srun):
        assert read_world(environ) == World(rank=3, local_rank=1, size=4, local_size=2)
    assert read_world({}) is None
    assert (
        read_world({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None
    )  # the batch script itself


def test_learning_rate() -> None:
    constant = OptimizerConfig(lr=1e-4)
    assert {learning_rate(constant, s, 100) for s in range(100)} == {1e-4}
    cosine = OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=10, final_lr=1e-4)
    rates = [learning_rate(cosine, s, 110) for s in range(111)]
    assert rates[:10] == pytest.approx([1e-4 * (s + 1) for s in range(10)])
    assert rates[10] == pytest.approx(1e-3)
    assert rates[60] == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates[110] == pytest.approx(1e-4)
    assert learning_rate(cosine, 500, 110) == pytest.approx(1e-4)


def test_max_steps_stops_without_bending_schedules() -> None:
    train = TrainConfig(epochs=2.5, max_steps=7)
    assert (horizon_steps(train, 10), total_steps(train, 10)) == (25, 7)
    assert total_steps(TrainConfig(epochs=300), 5004) == 1_501_200  # LlamaGen's 300 epochs on ImageNet


def test_what_one_rank_lacks_is_every_ranks_error(ranks: Any) -> None:
    """Else rank 0 would wait in the next collective, and the one that knows the reason says nothing."""
    for failing in (0, 1):
        said = ranks[2].run(agreement_case, failing)
        assert said == [f"error: encoder.pth: no such file on rank {failing}"] * 2
    assert ranks[2].run(agreement_case, None) == ["built on 0", "built on 1"]
