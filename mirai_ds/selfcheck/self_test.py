"""What a machine really does, in twenty seconds: the self-test of `mirai-ds doctor`.

One process a GPU (or two on a CPU) joins the others and does a little of everything that training needs, in order: an
exact matrix product, the alignment kernel beside its plain reference, one collective where there are several, and two
training steps.  Processes of their own, because a device that fails often takes its process along, and because the
parent can then say which of them has not answered.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mirai_ds.runtime.distributed import World, local_device, read_world, wait_for_ranks
from mirai_ds.runtime.launch import free_port, gpu_names, launch_environment

ANSWER = '{"rank": '  # how a rank's line of JSON begins
LIMIT_SECONDS = 180.0  # the first use of a kernel compiles it
CPU_RANKS = 2
CHECKS = ("matrix product", "alignment kernel", "collective", "training step")

# What errors of CUDA and NCCL mean, and what helps.  The first that matches is told.
_MEANINGS = (
    (r"no kernel image is available|not compatible with the current PyTorch",
     "something is compiled for other GPUs than this one: install a torch whose torch.cuda.get_arch_list() has it, and "
     "unset TORCH_CUDA_ARCH_LIST or add this GPU's capability to it"),
    (r"driver (version )?(on your system )?is (too old|insufficient)",
     "the driver is older than the CUDA release of this torch: update it, or install a torch for an older CUDA"),
    (r"Duplicate GPU", "two ranks have the same GPU: start one rank a GPU, each seeing its own"),
    (r"ncclSystemError|NCCL error|ncclUnhandled|NCCL WARN|ncclInternalError",
     "NCCL cannot connect the GPUs: NCCL_DEBUG=WARN says why; in a container give --ipc=host or --shm-size 8g"),
    (r"out of memory", "another process holds the GPU's memory: nvidia-smi lists it"),
    (r"ECC|uncorrectable|unspecified launch failure|illegal memory access",
     "the device is faulty, or a kernel of this build is: try another GPU; nvidia-smi -q -d ECC shows memory faults"),
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What one rank says of one check."""

    rank: int
    check: str
    ok: bool
    seconds: float
    detail: str


def run_self_test(limit: float = LIMIT_SECONDS) -> tuple[list[str], bool]:
    """Start a process a GPU (on a CPU two) and wait at most `limit` seconds.

    Returns lines for a report, and whether all is well.
    """
    gpus = len(gpu_names())
    ranks, port, end = gpus or CPU_RANKS, free_port(), time.monotonic() + limit
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"rank-{rank}" for rank in range(ranks)]
        processes = [_start(World(rank, rank, ranks, ranks), gpus, port, log) for rank, log in enumerate(logs)]
        codes: list[int | None] = []
        for process in processes:
            try:
                codes.append(process.wait(timeout=max(1.0, end - time.monotonic())))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                codes.append(None)
        return report([log.read_text(encoding="utf-8", errors="replace") for log in logs], codes, limit)


def _start(world: World, gpus: int, port: int, log: Path) -> subprocess.Popen[bytes]:
    env = launch_environment(world.size, gpus) | {
        "RANK": str(world.rank), "LOCAL_RANK": str(world.local_rank), "WORLD_SIZE": str(world.size),
        "LOCAL_WORLD_SIZE": str(world.local_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with log.open("wb") as file:
        return subprocess.Popen([sys.executable, "-m", __name__], env=env, stdout=file, stderr=subprocess.STDOUT)


def report(logs: list[str], codes: list[int | None], limit: float) -> tuple[list[str], bool]:
    """Lines from what each rank wrote and its exit code (None: it was ended after `limit` seconds).

    A check that failed is told once, for the first rank that failed it, with its cause in words.
    """
    answers = [[Answer(**json.loads(line)) for line in log.splitlines() if line.startswith(ANSWER)] for log in logs]
    lines, healthy = [], True
    for check in CHECKS:
        given = [a for rank in answers for a in rank if a.check == check]
        failed = [a for a in given if not a.ok]
        if failed:
            healthy = False
            lines.append(f"  PROBLEM   {check} on rank {failed[0].rank}: {in_words(failed[0].detail)}")
        elif len(given) == len(logs):
            detail = "; ".join(dict.fromkeys(a.detail for a in given if a.detail))
            lines.append(f"            {check}: ok, {max(a.seconds for a in given):.1f} s{detail and f', {detail}'}")
    for rank, (mine, log, code) in enumerate(zip(answers, logs, codes, strict=True)):
        if all(a.ok for a in mine) and len(mine) < len(CHECKS):
            healthy = False
            said = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith(ANSWER)]
            ended = f"no answer within {limit:.0f} s" if code is None else f"its process ended with {code}"
            why = f"{ended}; it said last: {in_words(said[-1])}" if said else ended
            lines.append(f"  PROBLEM   {CHECKS[len(mine)]} on rank {rank}: {why}")
    return ["self-test   one process a rank", *lines], healthy


def in_words(error: str) -> str:
    """What an error of a device or a library means and what helps, with the error's own words behind it."""
    meaning = next((text for pattern, text in _MEANINGS if re.search(pattern, error, re.IGNORECASE)), None)
    first = (error.strip().splitlines() or [""])[0][:200]
    return f"{meaning} ({first})" if meaning else first


# --- one rank --------------------------------------------------------------------------------------------------------


def main() -> int:
    """One rank: each check in turn, a line of JSON after each; 1 at the first that fails."""
    world = read_world() or World(0, 0, 1, 1)
    device: Any = None

    def choose_device() -> str:
        nonlocal device
        import torch

        from mirai_ds.train.preflight import check_device

        device = local_device(world)
        check_device(device)
        return torch.cuda.get_device_name(device) if device.type == "cuda" else ""

    parts: tuple[Callable[[], str], ...] = (
        choose_device, lambda: compare_kernel(device), lambda: meet(world, device), lambda: train(world, device),
    )  # fmt: skip
    for name, part in zip(CHECKS, parts, strict=True):
        began = time.perf_counter()
        try:
            detail, ok = part(), True
        except Exception as error:
            detail, ok = str(error) or traceback.format_exc(), False
        print(json.dumps(asdict(Answer(world.rank, name, ok, time.perf_counter() - began, detail))), flush=True)
        if not ok:
            return 1
    return 0


def compare_kernel(device: Any) -> str:
    """The compiled alignment loss and its gradients beside the plain ones, at GPT-B's width; which kernel it was.

    Raises RuntimeError where they differ by more than roundings of fp32.
    """
    import torch

    from mirai_ds.kernels.foresight_cosine import choose, foresight_cosine

    chosen = choose("auto", device.type, say=lambda _: None)
    generator = torch.Generator().manual_seed(0)
    states, noise = (torch.randn(2, 64, 768, generator=generator).to(device) for _ in range(2))
    target = states + 0.5 * noise  # cosines of 0.9 for one head, and none that is all rounding error
    index = torch.arange(64)[:, None] + torch.tensor([0, 1, 8])
    index = torch.where(index < 64, index, -1).int().to(device)
    ones = torch.ones(3, device=device)
    results = []
    for kernel in (chosen, "reference"):
        heads = [states.clone().requires_grad_() for _ in range(3)]
        loss, _ = foresight_cosine(heads, target, index, ones, 64 * ones, kernel=kernel)
        loss.backward()
        results.append([loss.detach(), *(head.grad for head in heads)])
    for fused, plain in zip(*results, strict=True):
        error = float((fused - plain).abs().max())
        if not error <= 1e-5 * float(plain.abs().max()):
            raise RuntimeError(
                f"kernel {chosen} is {error:.1e} off the plain computation; use foresight.kernel: reference"
            )
    return f"kernel: {chosen}"


def meet(world: World, device: Any) -> str:
    """Join the process group and sum over the ranks.  Raises RuntimeError for a wrong sum."""
    import torch
    import torch.distributed as dist

    from mirai_ds.engine.start import start_process_group

    start_process_group(world, LIMIT_SECONDS / 60)
    value = torch.full((1 << 20,), float(world.rank + 1), device=device)
    dist.all_reduce(value)
    expected = world.size * (world.size + 1) / 2
    if not bool((value == expected).all()):
        raise RuntimeError(f"an all-reduce over {world.size} ranks gave {float(value[0])}, not {expected}")
    return f"{world.size} ranks, {dist.get_backend()}" if world.size > 1 else "one rank"


def train(world: World, device: Any) -> str:
    """Two steps of a small Mirai-E run.  Raises RuntimeError for a loss that is not finite."""
    import math

    from mirai_ds.benchmarks.sessions import random_session
    from mirai_ds.config import build
    from mirai_ds.train.step import mean_over_ranks, train_step

    config = build({
        "model": {"size": "custom", "dim": 128, "n_layer": 3, "n_head": 4, "vocab_size": 512, "block_size": 64},
        "foresight": {"method": "mirai-e", "warmup_epochs": 0, "projector_dim": 128},
        "train": {"global_batch_size": 4 * world.size, "precision": "bf16-autocast"},
    })  # fmt: skip
    with random_session(config, world, device, 2) as session:
        for _ in range(2):
            record = train_step(session, session.step)
            session.count_step()
        loss = mean_over_ranks({"loss": record.metrics["loss"]})["loss"][0]
        refused = session.engine.confirm_updates()
    wait_for_ranks()
    if refused or not math.isfinite(loss):
        raise RuntimeError(f"the loss of a small model is {loss}: this device computes wrongly")
    return f"loss {loss:.3f}"


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a group whose other ranks are gone must not be waited for
