"""Who am I among my peers: from each launcher's variables; schedules as functions of the step."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mirai_ds.config import OptimizerConfig, TrainConfig, UserError
from mirai_ds.config.schedule import horizon_steps, learning_rate, total_steps
from mirai_ds.runtime import distributed, launch
from mirai_ds.runtime.distributed import World, device_index, first_host, local_device, read_world, rendezvous
from mirai_ds.runtime.launch import gpu_names
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


def test_where_ranks_meet_under_srun() -> None:
    """Without MASTER_ADDR: the step's first node, and a port that jobs and steps do not share."""
    two = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77", "SLURM_STEP_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[03-04]"}
    world = World(rank=1, local_rank=0, size=2, local_size=1)
    assert rendezvous(world, {**two, "SLURM_STEP_NODELIST": "gpu[04]"}) == ("gpu04", 15000 + 77 * 31)
    assert rendezvous(world, two)[0] == "gpu03"
    ports = {
        rendezvous(world, {**two, "SLURM_JOB_ID": str(j), "SLURM_STEP_ID": str(s)})[1] for j in (1, 2) for s in (0, 1)
    }
    assert len(ports) == 4
    one = {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77", "SLURM_STEP_NUM_NODES": "1"}
    assert rendezvous(World(1, 1, 2, 2), one)[0] == "127.0.0.1"
    assert rendezvous(World(0, 0, 1, 1), {}) == ("127.0.0.1", 29500)
    with pytest.raises(UserError, match="MASTER_ADDR"):
        rendezvous(world, {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "77", "SLURM_STEP_NUM_NODES": "2"})


@pytest.mark.parametrize(("nodes", "first"), [
    ("node7", "node7"), ("a,b", "a"), ("gpu[03-07,9],login1", "gpu03"), ("n[1,3]", "n1"),
    ("rack[1-2]-n[5-6]", "rack1-n5"),
])  # fmt: skip
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_each_rank_has_a_gpu_of_its_own() -> None:
    assert [device_index(World(r, r, 4, 4), 4) for r in range(4)] == [0, 1, 2, 3]
    assert [device_index(World(r, r, 4, 4), 1) for r in range(4)] == [0, 0, 0, 0]  # srun --gpus-per-task=1
    with pytest.raises(UserError, match="sees 2 GPUs; start at most 2 ranks a node"):
        device_index(World(2, 2, 4, 4), 2)


@pytest.mark.parametrize(("given", "names"), [
    (None, ["0", "1", "2", "3"]), ("2,3", ["2", "3"]), ("", []), ("-1", []), ("3,7,1", ["3"]),
    ("GPU-a1,GPU-b2", ["GPU-a1", "GPU-b2"]), ("MIG-1,MIG-2", ["MIG-1"]),
])  # fmt: skip
def test_gpus_are_named_as_they_were_given(
    given: str | None, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert gpu_names(tmp_path) == names


def test_wsl2_has_no_device_files_and_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver = tmp_path / "bin" / "nvidia-smi"
    driver.parent.mkdir()
    driver.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA GeForce RTX 4090 (UUID: GPU-x)'\n")
    driver.chmod(0o755)
    monkeypatch.setenv("PATH", str(driver.parent), prepend=os.pathsep)
    assert gpu_names(tmp_path) == ["0"]
    driver.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed: no driver'; exit 9\n")
    assert gpu_names(tmp_path) == []


def test_the_launcher_keeps_the_gpus_that_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's launcher writes CUDA_VISIBLE_DEVICES: ranks must find what the user wrote."""
    monkeypatch.setattr(launch, "gpu_names", lambda: ["4", "GPU-5"])
    shown: list[dict[str, list[str]]] = []

    class Started:
        def __init__(self, command: list[str], **_: Any) -> None:
            world = next(part for part in command if part.startswith("--world_info=")).partition("=")[2]
            shown.append(json.loads(base64.urlsafe_b64decode(world)))

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(launch.subprocess, "Popen", Started)
    assert launch.launch("module", [], 2, 2) == 0
    assert launch.launch("module", [], 1, 2) == 0
    assert launch.launch("module", [], 2, 0) == 0
    assert shown == [{"localhost": ["4", "GPU-5"]}, {"localhost": ["4"]}, {"localhost": ["0", "1"]}]
    with pytest.raises(UserError, match="only 2 GPUs are visible"):
        launch.launch("module", [], 3, 2)


def test_gpus_that_torch_cannot_use_are_no_reason_to_train_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "visible_gpus", lambda: 2)
    with pytest.raises(UserError, match=r"2 GPUs here, but torch .* cannot use them: .*DS_ACCELERATOR=cpu"):
        local_device(World(0, 0, 1, 1))


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
