"""The same recipe under every launcher: the same numbers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train.conftest import SMALL, numbers, small_train

pytestmark = pytest.mark.matrix
SHORT = [*SMALL, "train.max_steps=2", "checkpoint.at_end=false", "score.enabled=false", "evaluate.at_end=false",
         "evaluate.every_steps=null", "sampling.every_steps=null", "sampling.at_end=false"]  # fmt: skip


def rank_arguments(run: Path) -> list[str]:
    return ["digits-mirai-e", *[p for o in SHORT for p in ("--set", o)], "--run-dir", str(run)]


def environment(**more: str) -> dict[str, str]:
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER"))
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), clean["PATH"]])
    return {**clean, "PATH": path, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **more}


def port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def run_all(*commands: tuple[list[str], dict[str, str]]) -> None:
    started = [
        subprocess.Popen(c, env=e, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c, e in commands
    ]
    for process in started:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, out[-1500:] + err[-3000:]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `mirai-ds train` gives."""
    run = tmp_path_factory.mktemp("launch") / "own"
    done = small_train(run, overrides=SHORT)
    assert done.code == 0, done.err
    found = numbers(run)
    assert [r["step"] for r in found] == [1, 2]
    return found


def test_torchrun(expected: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port()}", "-m",
               "mirai_ds.train", *rank_arguments(tmp_path / "run")]  # fmt: skip
    run_all((command, environment()))
    assert numbers(tmp_path / "run") == expected


def test_deepspeed_command(expected: Any, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--master_port", port(),
               "--module", "mirai_ds.train", *rank_arguments(tmp_path / "run")]  # fmt: skip
    run_all((command, environment()))
    assert numbers(tmp_path / "run") == expected


def test_srun_environment(expected: Any, tmp_path: Path) -> None:
    """What a direct srun gives its tasks, through `mirai-ds train` itself."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    commands = []
    for task in range(2):
        slurm = {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0",
                 "SLURM_STEP_TASKS_PER_NODE": "2"}  # fmt: skip
        command = [sys.executable, "-m", "mirai_ds", "train", *rank_arguments(tmp_path / "run")]
        commands.append((command, environment(**address, **slurm)))
    run_all(*commands)
    assert numbers(tmp_path / "run") == expected
