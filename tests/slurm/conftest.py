"""A real Slurm cluster of three nodes on this machine, and the recipe that is trained on it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.once import once
from tests.train.conftest import Done, mirai_ds

SCRIPT = Path(__file__).with_name("local_cluster.sh")
PROGRAMS = ["slurmctld", "slurmd", "sbatch", "munged", "unshare", "nsenter", "ip"]
SETTINGS = [
    "model.dim=48", "model.n_layer=3", "model.n_head=2", "train.epochs=4", "train.global_batch_size=32",
    "foresight.warmup_epochs=0.1", "foresight.projector_dim=32", "logging.every_steps=1", "logging.progress=false",
    "checkpoint.every_steps=6", "eval.loss.every_steps=null", "eval.loss.at_end=false", "sampling.every_steps=null",
    "sampling.at_end=false", "eval.classifier.enabled=false", "ema.decay=0.9",
    "model.token_dropout=0.05", "model.resid_dropout=0.1", "model.ffn_dropout=0.1",
]  # fmt: skip
CLUSTER = """
gpus_per_node: 0
ranks_per_node: {ranks}
cpus_per_rank: 1
exclusive: false
memory: 1000M
time: "0:10:00"
signal_seconds: {signal_seconds}
"""


def settings(*more: str) -> list[str]:
    """The small recipe as options."""
    return [part for value in (*SETTINGS, *more) for part in ("--set", value)]


def cluster_file(folder: Path, signal_seconds: int = 20, ranks: int = 1, more: str = "") -> str:
    """A cluster file for CPU nodes."""
    path = folder / "cluster.yaml"
    path.write_text(CLUSTER.format(signal_seconds=signal_seconds, ranks=ranks) + more)
    return str(path)


@dataclass
class Slurm:
    """The cluster: commands, jobs, power switches."""

    env: dict[str, str]

    def __call__(self, *command: str) -> str:
        """Output of one of Slurm's commands."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout

    def cluster(self, *arguments: str) -> None:
        """local_cluster.sh."""
        subprocess.run([str(SCRIPT), *arguments], env=self.env, check=True, timeout=120, stdout=subprocess.DEVNULL)

    def submit(self, *arguments: str, cwd: Path | None = None) -> list[str]:
        """`mirai-ds submit`; the job ids."""
        done = self.try_submit(*arguments, cwd=cwd)
        assert done.code == 0, done.err
        found = re.search(r"^job ([0-9 >-]+):", done.out, re.MULTILINE)
        assert found, done.out
        return found[1].split(" -> ")

    def try_submit(self, *arguments: str, cwd: Path | None = None) -> Done:
        """`mirai-ds submit`, whatever becomes of it."""
        if cwd is None:
            return mirai_ds("submit", *arguments, env=self.env)
        done = subprocess.run(
            [sys.executable, "-m", "mirai_ds", "submit", *arguments], env=self.env, cwd=cwd, capture_output=True,
            text=True, check=False, timeout=60,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr)

    def job(self, job_id: str) -> dict[str, str]:
        """`scontrol show job`: the fields of one job, or of an array's first."""
        text = self("scontrol", "--oneliner", "show", "job", job_id).splitlines()[0]
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def wait(self, job_id: str, *states: str, timeout: float = 300) -> dict[str, str]:
        """Until the job is in one of these states (default: at an end); its fields."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        until(lambda: self.job(job_id)["JobState"] in wanted, timeout, lambda: str(self.job(job_id)))
        return self.job(job_id)


def until(condition: Callable[[], bool], timeout: float, why: Callable[[], str] = str) -> None:
    """Wait for a condition; fails with `why()` when it does not come."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, why()
        time.sleep(0.1)


def steps(run: Path) -> int:
    """Steps that the run's log has."""
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def log_of(run: Path) -> str:
    """The jobs' logs."""
    return "\n".join(path.read_text() for path in sorted(run.glob("jobs/*.log")))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Three nodes, so that a job of two has a spare; down at the end.  Each worker of pytest has its own."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        pytest.skip(
            f"not installed: {', '.join(missing)} (apt-get install slurmctld slurmd slurm-client munge iproute2)"
        )
    if os.getuid() != 0:
        pytest.skip("a cluster of namespaces needs root")
    folder = tmp_path_factory.mktemp("slurm")
    dirty = ("SLURM", "SBATCH", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(dirty)}
    env |= {"SLURM_LOCAL_DIR": str(folder), "NODES": "3", "SLURM_CONF": f"{folder}/etc/slurm.conf",
            "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{env['PATH']}:/usr/sbin:/sbin"}  # fmt: skip
    cluster = Slurm(env)
    try:
        cluster.cluster("up")
        yield cluster
    finally:
        cluster.cluster("down")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small recipe without Slurm and without interruption: 24 steps on two local ranks."""

    def train(folder: Path) -> None:
        run = ["--run-dir", str(folder / "whole"), "--ranks", "2"]
        done = mirai_ds("train", "digits-mirai-e", *settings("train.max_steps=24"), *run)
        assert done.code == 0, done.err

    return once(tmp_path_factory, "slurm-whole", train) / "whole"
