"""Training steps of many configurations in one process, and what each of them did: run by the tests, on a fake GPU or
on the CPU.

    python -m tests.gpu.rehearsal.steps CASES.json RESULTS.json [cpu]
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # before what is there already is set aside from collections of garbage

from mirai_ds.benchmarks.sessions import random_session
from mirai_ds.config import build
from mirai_ds.engine.start import start_process_group
from mirai_ds.kernels.foresight_cosine import reference
from mirai_ds.runtime.distributed import World
from mirai_ds.runtime.launch import free_port
from mirai_ds.train.session import Session
from mirai_ds.train.step import train_step

WARM, TRACED = 2, 2  # allocators, buckets and AdamW's moments are there after two
WARM_CAPTURED = 4  # the last of them is captured


def main(cases: Path, results: Path, device: torch.device) -> None:
    """Run each case; the results hold its error where there was one."""
    os.environ["MASTER_PORT"] = str(free_port())
    world = World(0, 0, 1, 1)
    start_process_group(world, 5)
    if os.environ.get("MIRAI_FAKE_VALUES") == "none":
        reference.check_index = lambda *_: None  # type: ignore[assignment]  # it reads what no kernel computed
    found = {}
    for name, settings in json.loads(cases.read_text(encoding="utf-8")).items():
        try:
            found[name] = run_case(settings, world, device)
            gc.collect()
            found[name]["left"] = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        results.write_text(json.dumps(found, indent=1), encoding="utf-8")
        if len(found) == 1:
            gc.freeze()  # the modules that the first case imported


def run_case(settings: dict[str, Any], world: World, device: torch.device) -> dict[str, Any]:
    """Warm and traced steps of one configuration.  Counts are of the traced steps, divided by their number.

    `rehearsal` in the settings is no section: it may say how many steps are `warm`.
    """
    watched = device.type == "cuda"
    computes = os.environ.get("MIRAI_FAKE_VALUES") != "none"
    losses, norms = [], []
    told = settings.pop("rehearsal", {})
    config = build(settings)
    warm = told.get("warm", WARM if config.train.cuda_graph == "off" else WARM_CAPTURED)
    if watched:
        torch.cuda.empty_cache()  # what is reserved at the end is this case's
        torch.cuda.reset_peak_memory_stats()
    torch._dynamo.reset()  # else the ninth case of a process would run uncompiled: torch stops at eight graphs
    with random_session(config, world, device, warm + TRACED + 1) as session:
        for _ in range(warm):
            one_step(session, losses, norms)
        counts = watch(session, losses, norms) if watched else {}
        if watched:
            counts["reserved"] = torch.cuda.memory_reserved()
        for _ in range(0 if watched else TRACED):
            one_step(session, losses, norms)
        numbers = [[float(value) for value in values] for values in (losses, norms)]
        counts |= {
            "refused": session.engine.confirm_updates(),
            "state": digest(session) if computes else "",
            "plain": session.graphs.problem,
        }
    return {"losses": numbers[0], "norms": numbers[1], **counts}


def digest(session: Session) -> str:
    """sha256 of masters, moments, step counters and average."""
    layout = session.engine.layout
    tensors = [*layout.masters, *layout.moments("exp_avg"), *layout.moments("exp_avg_sq"), *layout.steps()]
    found = hashlib.sha256()
    for tensor in [*tensors, *session.engine.ema.values]:
        found.update(tensor.detach().float().cpu().numpy().tobytes())
    return found.hexdigest()


def one_step(session: Session, losses: list[Any], norms: list[Any]) -> None:
    """A step; its loss and norm stay on the device."""
    record = train_step(session, session.step)
    session.count_step()
    losses.append(record.metrics["loss"])
    norms.append(record.grad_norm)


def watch(session: Session, losses: list[Any], norms: list[Any]) -> dict[str, Any]:
    """The traced steps on a fake device."""
    from tests.gpu.rehearsal.counters import Operators
    from tests.gpu.rehearsal.device import watched
    from tests.gpu.rehearsal.library import Trace

    operators = Operators()
    if session.graphs.problem:  # of a captured step it is the capture that allocates
        torch.cuda.reset_peak_memory_stats()
    with watched(operators) as missing, Trace() as trace:
        for _ in range(TRACED):
            one_step(session, losses, norms)
    return {
        "launches": trace.count("kernel") / TRACED, "graphs": trace.count("graph") / TRACED,
        "copies": (trace.count("copy") + trace.count("memset")) / TRACED,
        "pageable": trace.bytes("copy", "pageable"),
        "pinned": trace.bytes("copy", "pinned") / TRACED,
        "waits": {f"{call} in {who}": count / TRACED for (call, who), count in trace.waits.items()},
        "collectives": trace.count("collective") / TRACED,
        "bytes": {name: count / TRACED for name, count in operators.bytes.most_common()},
        "mixed": dict(operators.mixed), "attention": dict(operators.attention),
        "missing": dict(missing),
        "kernels": {name[:160]: count / TRACED for name, count in trace.launches().most_common(40)},
        "peak": torch.cuda.max_memory_allocated(),
    }  # fmt: skip


if __name__ == "__main__":
    on_cpu = sys.argv[3:] == ["cpu"]
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), torch.device("cpu") if on_cpu else torch.device("cuda", 0))
