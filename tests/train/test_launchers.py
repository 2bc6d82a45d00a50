"""The same recipe under every launcher: the same numbers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mirai_ds.checkpoint import store
from tests.train.conftest import SMALL, numbers, small_train
from tests.waiting import wait_until

pytestmark = pytest.mark.matrix
SHORT = [*SMALL, "train.max_steps=2", "checkpoint.at_end=false", "eval.classifier.enabled=false",
         "eval.loss.at_end=false", "eval.loss.every_steps=null", "sampling.every_steps=null",
         "sampling.at_end=false"]  # fmt: skip


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


def ask(run: Path, number: int, after: int) -> tuple[int, str]:
    """`mirai-ds train` in a process of its own, and a signal to it, and only to it, when step `after` is logged."""
    long = [*SHORT, "train.max_steps=2000", "train.epochs=200", "checkpoint.every_steps=1000"]
    settings = [part for o in long for part in ("--set", o)]
    command = [sys.executable, "-m", "mirai_ds", "train", "digits-mirai-e", *settings, "--run-dir", str(run),
               "--resume", "if-present"]  # fmt: skip
    # A shell that runs the suite in the background lets it ignore Ctrl-C, and what it starts would too, rightly.
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    path = run / "metrics.jsonl"
    logged = f'"step": {after},'
    wait_until(
        f"step {after} of {run}",
        lambda: process.poll() is not None or (path.exists() and logged in path.read_text()),
    )
    process.send_signal(number)
    out, _ = process.communicate(timeout=300)
    return process.returncode, out


def test_signals_to_the_command_save_and_tell(tmp_path: Path) -> None:
    """TERM and USR1 ask for a requeue, Ctrl-C does not; each start goes on where the one before saved."""
    run, steps = tmp_path / "run", [0]
    for number, code, word in (
        (signal.SIGTERM, 75, "requeue"),
        (signal.SIGUSR1, 75, "requeue"),
        (signal.SIGINT, 0, "stopped"),
    ):
        returned, out = ask(run, number, after=steps[-1] + 3)
        assert returned == code, out[-3000:]
        name = signal.Signals(number).name
        verdict, reason = (run / "outcome").read_text().split(maxsplit=1)
        assert (verdict, reason.split()[0]) == (word, name)
        steps.append(int(reason.split()[-1]))
        assert store.list_steps(run)[-1] == steps[-1] >= steps[-2] + 3
        assert f"mirai-ds: {name}: stops after this step and saves; once more ends it now" in out
        assert f"mirai-ds: {word}: {name} at step {steps[-1]}" in out
        assert not (run / "stop").exists()
    assert "Traceback" not in out
    assert [r["step"] for r in numbers(run)] == list(range(1, steps[-1] + 1))


@pytest.mark.parametrize("ignored", [True, False])
def test_nohup_is_respected(tmp_path: Path, ignored: bool) -> None:
    """A terminal that is closed does not stop what was started with nohup; what was not is asked to save."""
    stop = tmp_path / "stop"
    (tmp_path / "rank.py").write_text(
        f"import os, pathlib, signal, time\nos.kill(int(os.environ['PARENT_PID']), signal.SIGHUP)\ntime.sleep(1)\n"
        f"print('asked', pathlib.Path({str(stop)!r}).exists())\n"
    )
    (tmp_path / "parent.py").write_text(
        "import os, pathlib, signal\nfrom mirai_ds.runtime.launch import launch\n"
        f"signal.signal(signal.SIGHUP, signal.SIG_{'IGN' if ignored else 'DFL'})\n"
        "os.environ['PARENT_PID'] = str(os.getpid())\n"
        f"print('code', launch('rank', [], 1, 0, pathlib.Path({str(stop)!r})))\n"
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "parent.py")], capture_output=True, text=True, check=True, timeout=120,
        env=environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"),
    )  # fmt: skip
    assert f"asked {not ignored}" in done.stdout
    assert "code 0" in done.stdout
