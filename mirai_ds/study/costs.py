"""What a step of each arm costs, measured apart from the runs: the machine may be shared, so CPU time and ratios.

All arms' sessions live in one process and take turns, a few steps each; what counts is an arm's time over the
baseline's in the same round.  Time is the process's CPU time; where a GPU trains, the clock's, its work included.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mirai_ds.config import RunConfig
from mirai_ds.study.arms import BASELINE, Study, StudyArm, run_config

ROUNDS, STEPS = 7, 4
Costs = dict[str, dict[str, float]]


def measure_costs(study: Study, arms: list[StudyArm], folder: Path) -> Costs:
    """By arm: ms of an aligned step (of mtp and the baseline: of any), its ratio to the baseline's, the ratio's
    quartiles over rounds, the ratio of FLOPs, and the first aligned step.  For a process of its own: it starts a
    process group."""
    from mirai_ds.runtime.distributed import use_cuda

    if not use_cuda():
        os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed guesses aloud
    configs = {arm.name: run_config(study, arm, 0, folder) for arm in arms}
    with tempfile.TemporaryDirectory() as scratch:
        sessions = {name: _session(config, Path(scratch) / name) for name, config in configs.items()}
        seconds = _rounds(sessions)
    base = np.median(seconds[BASELINE])
    costs: Costs = {}
    for name, session in sessions.items():
        ratios = np.asarray(seconds[name]) / np.asarray(seconds[BASELINE])
        low, ratio, high = np.percentile(ratios, (25, 50, 75))
        costs[name] = {
            "step_ms": float(1000 * base * ratio), "ratio": float(ratio), "ratio_low": float(low),
            "ratio_high": float(high), "flops_ratio": _flops(session) / _flops(sessions[BASELINE]),
            "aligned_from": float(first_aligned(configs[name], session.order.steps_per_epoch)),
        }  # fmt: skip
    return costs


def first_aligned(config: RunConfig, steps_per_epoch: int) -> int:
    """The first 0-based step with alignment; 0 without warm-up."""
    from mirai_ds.foresight import alignment_active

    if not config.foresight.active:
        return 0
    return next(s for s in itertools.count() if alignment_active(config.foresight, s / steps_per_epoch))


def _session(config: RunConfig, run: Path) -> Any:
    from mirai_ds.engine.start import start_process_group
    from mirai_ds.runs.lock import RunLock
    from mirai_ds.runtime.distributed import World, local_device
    from mirai_ds.runtime.signals import StopRequests
    from mirai_ds.train.build import build_session

    world = World(0, 0, 1, 1)
    device = local_device(world)
    start_process_group(world, config.launch.timeout_minutes)
    run.mkdir(parents=True)
    session = build_session(config, run, world, device, RunLock.take(run), StopRequests())
    session.progress.step = first_aligned(config, session.order.steps_per_epoch)
    return session


def _rounds(sessions: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of a step, round by round; the first round warms up and is left out."""
    from mirai_ds.train.step import train_step

    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for count in range(ROUNDS + 1):
        for name, session in sessions.items():
            began = _now(session.device)
            for _ in range(STEPS):
                train_step(session, session.step)
                session.count_step()
            if count:
                seconds[name].append((_now(session.device) - began) / STEPS)
    return seconds


def _now(device: Any) -> float:
    """Seconds of the clock of costs: CPU time, or on a GPU wall time once its work is done."""
    if device.type != "cuda":
        return time.process_time()
    import torch

    torch.cuda.synchronize(device)
    return time.perf_counter()


def _flops(session: Any) -> float:
    """Of an aligned training step, an image; an encoder's are counted where its shape is known."""
    from mirai_ds.planning.flops import training_flops

    width = session.teacher.feature_dim if session.teacher else 0
    return training_flops(session.config.model, session.config.foresight, width, session.teacher is not None)


def run_seconds(costs: Costs, arm: str, steps: int) -> float:
    """Seconds of a run's training steps."""
    base, own = costs[BASELINE]["step_ms"], costs[arm]
    warm = min(steps, int(own["aligned_from"]))
    return (base * warm + own["step_ms"] * (steps - warm)) / 1000


def compute_spent(cost: dict[str, float], steps: Any) -> Any:
    """Steps of an arm -> baseline steps of the same compute: warm-up steps count one, aligned ones `ratio`."""
    warm = np.minimum(steps, cost["aligned_from"])
    return warm + cost["ratio"] * (np.asarray(steps) - warm)
