"""Start ranks on this machine with DeepSpeed's launcher, and hand signals through to them."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from mirai_ds.config.errors import UserError
from mirai_ds.runtime.disk import write_whole
from mirai_ds.runtime.log import LOG, start_log
from mirai_ds.runtime.processes import as_parent, tie_to_starter
from mirai_ds.runtime.signals import SAME_EVENT_SECONDS, is_ignored


def gpu_names(devices: Path = Path("/dev")) -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them (an index, or the UUID of a GPU or of a
    MIG slice), without importing torch, which takes seconds.

    `devices` is where the driver's device files are.  Under WSL2 there are none, and the driver's nvidia-smi is asked.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    present = sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob("nvidia*"))
    if present == 0:
        present = _gpus_of_the_driver()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [str(index) for index in range(present)]
    names: list[str] = []
    for name in (part.strip() for part in chosen.split(",")):
        # CUDA ignores what follows an entry that is not there.
        if not name or name == "-1" or (name.isdigit() and int(name) >= present):
            break
        names.append(name)
    if names and names[0].startswith("MIG-"):
        return names[:1]  # a process sees one MIG slice, and NCCL does not connect slices
    return names if present else []


def _gpus_of_the_driver() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def visible_gpus() -> int:
    """How many GPUs this process may use."""
    return len(gpu_names())


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


# glibc maps large blocks anew at each malloc and gives them back at each free: thousands of page faults a step.
# Without mappings all come from the heap, which is not trimmed below 4 GiB of free space at its end.
CPU_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(4 * 2**30)}

GPU_MEMORY = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # fewer holes between blocks of many sizes


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
    else:
        env = {**GPU_MEMORY, **env}
    return env


def launch(module: str, arguments: list[str], ranks: int, gpus: int, stop_file: Path | None = None) -> int:
    """Run `python -m module arguments` on `ranks` local ranks; returns the exit code.

    stop_file: where ranks look for a request to stop; None: signals go to the launcher, which ends them.
    `deepspeed.launcher.launch` and not the `deepspeed` command: the command dies of SIGTERM and its ranks are killed
    without warning, this one forwards it.
    """
    # DeepSpeed's launcher overwrites CUDA_VISIBLE_DEVICES with these: the ones that were given stay the ones used.
    places: list[str] = (gpu_names() if gpus else []) or [str(index) for index in range(ranks)]
    if gpus and ranks > len(places):
        raise UserError(f"--ranks {ranks}: only {len(places)} GPUs are visible; give {len(places)} or fewer")
    world = base64.urlsafe_b64encode(json.dumps({"localhost": places[:ranks]}).encode()).decode()
    command = [
        sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", "--master_addr=127.0.0.1",
        f"--master_port={free_port()}", "--log_level=critical", "--no_local_rank", "--module", module, *arguments,
    ]  # fmt: skip
    start_log()
    if stop_file is not None:
        stop_file.unlink(missing_ok=True)
    env = {**launch_environment(ranks, gpus), **as_parent()}
    # A session of its own: a terminal's Ctrl-C comes here alone, and reaches the ranks as a request.
    process = subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=tie_to_starter())
    asked: list[float] = []

    def forward(number: int, _frame: object) -> None:
        """First a request in a file, which every rank obeys at its next step; the launcher would give them 30 s.  A
        second signal goes through to them."""
        if stop_file is None:  # the launcher knows these two
            process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)
        elif not asked:
            asked.append(time.monotonic())
            name = signal.Signals(number).name
            stop_file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(stop_file, f"{'stop' if number == signal.SIGINT else 'requeue'} {name}")
            LOG.info("%s: stops after this step and saves; once more ends it now", name)
        elif time.monotonic() - asked[0] > SAME_EVENT_SECONDS:
            process.send_signal(signal.SIGTERM)

    caught = [n for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP) if not is_ignored(n)]
    old = {number: signal.signal(number, forward) for number in caught}
    try:
        return process.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        if stop_file is not None:
            stop_file.unlink(missing_ok=True)
