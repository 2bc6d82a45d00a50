"""Two ranks under every launcher, and one alone: the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mirai_ds.runtime.launch import free_port
from mirai_ds.sampling import draw_archive
from tests.sampling.conftest import ALONE, content, request_of

MODULE = "mirai_ds.cli.sample"


@pytest.mark.matrix
@pytest.mark.parametrize("launcher", ["own", "torchrun", "deepspeed", "srun"])
def test_two_ranks(launcher: str, tiny: Path, tmp_path: Path) -> None:
    """srun: what it gives its two tasks."""
    options = [str(tiny / "weights.pt"), "--recipe", str(tiny / "recipe.yaml"), "--tokenizer", str(tiny / "book.npz")]
    options += ["--num-images", "21", "--batch", "4", "--cfg", "2", "--out", str(tmp_path / "two" / "x.npz")]
    verb, port = [sys.executable, "-m", "mirai_ds", "sample", *options], str(free_port())
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    commands = {
        "own": [[*verb, "--ranks", "2"]],
        "torchrun": [[*torchrun, "-m", MODULE, *options]],
        "deepspeed": [[str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--master_port", port,
                       "--module", MODULE, *options]],
        "srun": [verb, verb],
    }[launcher]  # fmt: skip
    outside = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_STEP_ID")
    clean = {name: value for name, value in os.environ.items() if name not in outside} | {"DS_ACCELERATOR": "cpu"}
    (tmp_path / "two").mkdir()
    processes = []
    for task, command in enumerate(commands):
        slurm = {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0",
                 "SLURM_STEP_TASKS_PER_NODE": "2"}  # fmt: skip
        environment = clean | (slurm if launcher == "srun" else {})
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    said = [process.communicate(timeout=300)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    assert sum(text.count("21 images of 8 pixels") for text in said) == 1, said
    (tmp_path / "one").mkdir()
    draw_archive(request_of(tiny, tmp_path / "one" / "x.npz"), ALONE)
    assert content(tmp_path / "two") == content(tmp_path / "one")
