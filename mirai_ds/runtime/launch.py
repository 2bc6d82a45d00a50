"""Start ranks on this machine with DeepSpeed's launcher, and hand signals through to them."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def visible_gpus() -> int:
    """GPUs this process may use, without importing torch (seconds)."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return 0
    present = len([p for p in Path("/dev").glob("nvidia*") if p.name.removeprefix("nvidia").isdigit()])
    if chosen is None:
        return present
    return min(present, len([c for c in chosen.split(",") if c.strip() and c.strip() != "-1"]))


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# glibc gives large blocks back to the system at every free: thousands of page faults a step.  Blocks above 32 MiB, the
# most it can be told, still are.
CPU_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(4 * 2**30)}


def launch_environment(ranks: int, gpus: int) -> dict[str, str]:
    """Environment of the ranks: this Python's bin first in PATH (else JIT builds flip between two ninjas and rebuild),
    CPU cores shared out, DeepSpeed told of the accelerator so that it does not guess aloud."""
    env = dict(os.environ)
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    env.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if gpus == 0:
        env["DS_ACCELERATOR"] = "cpu"
        env = {**CPU_MEMORY, **env}
    return env


def launch(module: str, arguments: list[str], ranks: int, gpus: int) -> int:
    """Run `python -m module arguments` on `ranks` local ranks; returns the exit code.

    `deepspeed.launcher.launch` and not the `deepspeed` command: the command dies of SIGTERM and its ranks are killed
    without warning, this one forwards it.
    """
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
    command = [
        sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--master_addr=127.0.0.1",
        f"--master_port={free_port()}", "--log_level=critical", "--no_local_rank", "--module", module, *arguments,
    ]  # fmt: skip
    process = subprocess.Popen(command, env=launch_environment(ranks, gpus))

    def forward(number: int, _frame: object) -> None:
        process.send_signal(number)

    old = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return process.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
