"""The commands as users give them, on 1, 2 and 8 fake GPUs: which devices run, what they print, the CPU's numbers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.rehearsal.conftest import FakeGpu
from tests.gpu.rehearsal.environment import ROOT, fake_environment

pytestmark = pytest.mark.rehearsal
SETTINGS = [
    "train.max_steps=4", "foresight.warmup_epochs=0.05", "logging.every_steps=1", "checkpoint.every_steps=2",
    "eval.classifier.enabled=false", "sampling.at_end=false", "eval.loss.at_end=false",
]  # fmt: skip
SETS = [part for setting in SETTINGS for part in ("--set", setting)]
# What torch tells users who can do nothing about it.
NOISE = re.compile(r"warning|non-deterministic|destroy_process_group|device id|Traceback", re.IGNORECASE)


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss/total"] for row in map(json.loads, lines) if "loss/total" in row]


def records(folder: Path) -> list[dict[str, Any]]:
    """What each process did that launched kernels, by rank."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(found, key=lambda record: record["rank"])


def devices(folder: Path) -> list[list[int]]:
    """The physical devices of each rank."""
    return [[int(device) for device in record["launches"]] for record in records(folder)]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the same run on two CPU ranks."""
    run = tmp_path_factory.mktemp("cpu") / "run"
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mirai_ds", "train", "digits-mirai-e", *SETS, "--run-dir", str(run)]
    subprocess.run(command, env=env, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return losses(run)


def quiet(done: subprocess.CompletedProcess[str]) -> None:
    noise = [line for line in (done.stdout + done.stderr).splitlines() if NOISE.search(line)]
    assert noise == []


@pytest.mark.parametrize(("gpus", "visible", "expected"), [
    (1, None, [[0]]), (8, "4,5", [[4], [5]]), (8, None, [[device] for device in range(8)]), (3, None, [[0], [1]]),
])  # fmt: skip
def test_training_runs_on_the_gpus_that_were_given(
    fake_gpu: FakeGpu, tmp_path: Path, on_cpu: list[float], gpus: int, visible: str | None, expected: list[list[int]]
) -> None:
    env = {"MIRAI_FAKE_RECORDS": str(tmp_path)} | ({"CUDA_VISIBLE_DEVICES": visible} if visible else {})
    run = tmp_path / "run"
    done = fake_gpu(
        "-m", "mirai_ds", "train", "digits-mirai-e", *SETS, "--run-dir", str(run), gpus=gpus, env=env
    )  # fmt: skip
    quiet(done)
    assert devices(tmp_path) == expected
    assert [record["missing"] for record in records(tmp_path)] == [{}] * len(expected)
    assert len(on_cpu) == 4
    assert losses(run) == pytest.approx(on_cpu, rel=1e-5)  # fp32; sums over ranks in another order


def test_one_gpu_a_task_and_no_address(fake_gpu: FakeGpu, tmp_path: Path, on_cpu: list[float]) -> None:
    """`srun --ntasks 2 --gpus-per-task 1`: each task sees one device, and no MASTER_ADDR."""
    run, processes = tmp_path / "run", []
    command = [sys.executable, "-m", "mirai_ds", "train", "digits-mirai-e", *SETS, "--run-dir", str(run)]
    with fake_environment(fake_gpu.built, gpus=4) as env:
        for rank in range(2):
            task = {
                "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "1",
                "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2",
                "SLURM_STEP_TASKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": str(2 + rank),
                "MIRAI_FAKE_RECORDS": str(tmp_path),
            }  # fmt: skip
            processes.append(
                subprocess.Popen(
                    command, env=env | task, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
        said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert devices(tmp_path) == [[2], [3]]
    assert losses(run) == pytest.approx(on_cpu, rel=1e-5)


def test_more_ranks_than_gpus_are_refused(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    command = ["-m", "mirai_ds", "train", "digits-mirai-e", "--ranks", "3", "--run-dir", str(tmp_path / "run")]
    done = fake_gpu(*command, gpus=2, fails=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("mirai-ds: error: ")
    assert "2" in done.stderr


def test_what_follows_a_run(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    """Resume, samples (captured; test_real_sizes.py compiles them), an archive, the map, the plan, the doctor."""
    run, out = str(tmp_path / "run"), tmp_path / "samples.npz"
    train = ["train", "digits-mirai-e", *SETS, "--run-dir", run]
    for arguments in (
        [*train, "--set", "train.max_steps=3"], [*train, "--set", "sampling.at_end=true", "--resume", "auto"],
        ["sample", run, "--classes", "1,2"], ["sample", run, "--num", "12", "--batch", "8", "--out", str(out)],
        ["map", run], ["inspect", run],
        ["plan", "mirai-e-b-80", "--gpus", "1", "--device", "a100-80g"], ["doctor"],
    ):  # fmt: skip
        done = fake_gpu("-m", "mirai_ds", *arguments)
        quiet(done)
    assert len(losses(Path(run))) == 4
    assert json.loads(Path(f"{out}.json").read_text(encoding="utf-8"))["num"] == 12
    assert "training step: ok" in done.stdout


def test_the_benchmark_of_steps(fake_gpu: FakeGpu, tmp_path: Path) -> None:
    """All sides of it build, compile and step; its times mean nothing here."""
    rows = tmp_path / "rows.csv"
    sets = ["model.size=custom", "model.dim=64", "model.n_layer=3", "model.n_head=4", "model.vocab_size=128"]
    small = [part for setting in sets for part in ("--set", setting)]
    command = ["-m", "mirai_ds", "bench", "step", "plain", "--batch", "4", "--methods", "none,E", "--rounds", "2"]
    fake_gpu(*command, *small, "--out", str(rows))
    assert rows.read_text(encoding="utf-8").count("(fake)") == 7  # of E the fp32 teacher besides
