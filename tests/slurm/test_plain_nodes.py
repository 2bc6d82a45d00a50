"""Several nodes without Slurm: one launcher a node, here two on this machine, give what `mirai-ds train` gives."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mirai_ds.runtime.launch import free_port
from tests.slurm.conftest import settings
from tests.train.conftest import mirai_ds, numbers

pytestmark = pytest.mark.matrix


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks under one launcher."""
    run = tmp_path_factory.mktemp("plain") / "alone"
    done = mirai_ds("train", "digits-mirai-e", *settings("train.max_steps=8"), "--run-dir", str(run), "--ranks", "2")
    assert done.code == 0, done.err
    assert [record["step"] for record in numbers(run)] == list(range(1, 9))
    return run


def by_hostfile(node: int, port: int, folder: Path) -> list[str]:
    """The `deepspeed` command on each node, as it is where nodes cannot ssh to each other."""
    (folder / "hosts").write_text("nodea slots=1\nnodeb slots=1\n")
    return [str(Path(sys.executable).parent / "deepspeed"), "--hostfile", str(folder / "hosts"), "--no_ssh",
            f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"]  # fmt: skip


def by_launcher(node: int, port: int, folder: Path) -> list[str]:
    """What the `deepspeed` command starts on each node over ssh."""
    world = base64.urlsafe_b64encode(json.dumps({"nodea": [0], "nodeb": [0]}).encode()).decode()
    return [sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--node_rank={node}",
            "--master_addr=127.0.0.1", f"--master_port={port}"]  # fmt: skip


@pytest.mark.parametrize("launcher", [by_hostfile, by_launcher], ids=["hostfile", "launcher"])
def test_two_nodes(launcher: object, alone: Path, tmp_path: Path) -> None:
    assert callable(launcher)
    run, port = tmp_path / "run", free_port()
    dirty = ("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dirty)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    rank = ["--module", "mirai_ds.train", "digits-mirai-e", *settings("train.max_steps=8"), "--run-dir", str(run)]
    cores = sorted(os.sched_getaffinity(0))
    # Each node has one core, as each rank under one launcher: two threads sum squares in another order than one.
    nodes = [
        subprocess.Popen(["taskset", "-c", str(cores[node % len(cores)]), *launcher(node, port, tmp_path), *rank],
                         env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for node in (1, 0)
    ]  # fmt: skip
    for process in nodes:
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out[-3000:]
    assert numbers(run) == numbers(alone)
    assert json.loads((run / "starts.jsonl").read_text())["world_size"] == 2
