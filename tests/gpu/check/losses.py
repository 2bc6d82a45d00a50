"""Losses of a small model on the GPU beside those on the CPU, step by step, as rows.

Both runs draw the same weights, data and dropout, which are functions of seed and sample; what differs is how sums are
ordered and, in bf16, where they are rounded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from tests.gpu.check.native_rows import one

MODULE = "tests.gpu.check.losses"
STEPS = 50
TOLD = (1, 10, 25, 50)  # steps whose losses are rows
# Largest relative difference of a loss.  fp32: the sums differ in order, and 50 steps of AdamW make a difference grow;
# autocast: a bf16 product is rounded to 2^-9, in other places on either device.
BOUNDS = {"fp32": 1e-3, "bf16-autocast": 2e-2}
SMALL = {"size": "custom", "dim": 128, "n_layer": 4, "n_head": 4, "vocab_size": 512, "num_classes": 10,
         "block_size": 64}  # fmt: skip


def settings(precision: str) -> dict[str, Any]:
    """Mirai-E from the first step on, ZeRO-2, dropout on."""
    return {
        "model": SMALL, "foresight": {"method": "mirai-e", "warmup_epochs": 0},
        "deepspeed": {"zero_optimization": {"stage": 2, "overlap_comm": False}},
        "train": {"global_batch_size": 16, "precision": precision},
    }  # fmt: skip


def losses(precision: str, device_name: str, steps: int) -> list[float]:
    """Of so many steps in this process, which has no other engine."""
    import torch

    from mirai_ds.benchmarks.sessions import random_session
    from mirai_ds.config import build
    from mirai_ds.engine.start import start_process_group
    from mirai_ds.runtime.distributed import World
    from mirai_ds.runtime.launch import free_port
    from mirai_ds.train.step import train_step

    os.environ["MASTER_PORT"] = str(free_port())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    world, device = World(0, 0, 1, 1), torch.device(device_name, *([0] if device_name == "cuda" else []))
    start_process_group(world, 5)
    found = []
    with random_session(build(settings(precision)), world, device, steps) as session:
        for _ in range(steps):
            found.append(train_step(session, session.step).metrics["loss"])
            session.count_step()
        return [float(loss) for loss in found]


def elsewhere(precision: str, device: str, steps: int) -> list[float]:
    """The same in a process of its own: DeepSpeed chooses its device once a process."""
    environment = dict(os.environ) | ({"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    command = [sys.executable, "-m", MODULE, "--precision", precision, "--device", device, "--steps", str(steps)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: list[float] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
    return found


def main(argv: list[str] | None = None) -> int:
    """Print rows; 1 where a loss differs by more than its bound."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check.losses", description=__doc__)
    parser.add_argument("--precision", choices=list(BOUNDS), default="fp32")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="print the losses of this device alone")
    args = parser.parse_args(argv)
    if args.device:
        print(json.dumps(losses(args.precision, args.device, args.steps)))
        return 0
    cpu, gpu = (elsewhere(args.precision, device, args.steps) for device in ("cpu", "cuda"))
    worst = max(abs(a - b) / abs(a) for a, b in zip(cpu, gpu, strict=True))
    about = {"model": "128x4", "method": "E", "batch": "16", "precision": args.precision}
    rows = [
        one("losses", "loss", f"{values[step - 1]:.6g}", "nats", variant=f"{device}, step {step}", **about)
        for device, values in (("cpu", cpu), ("gpu", gpu)) for step in TOLD if step <= args.steps
    ]  # fmt: skip
    rows.append(
        one("losses", "largest relative difference", f"{worst:.3g}", "", variant=f"{args.steps} steps", **about)
    )
    print("\n".join(map(json.dumps, rows)))
    if worst > BOUNDS[args.precision]:
        print(f"error: losses differ by {worst:.3g}, more than {BOUNDS[args.precision]:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
