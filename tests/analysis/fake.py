"""Run folders made by writing files: what a trained run leaves, without training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from mirai_ds.cli.main import main
from mirai_ds.config import RunConfig, dump, load

ENVIRONMENT = {
    "mirai_ds": "0.1.0", "code": "a" * 40, "python": "3.11.7", "packages": {"torch": "2.15.0", "numpy": "2.4.6"},
    "platform": "Linux", "cpu": "AMD EPYC", "gpus": [], "cuda": "13.2", "world_size": 2,
    "command": ["__main__.py", "digits-mirai-e"],
}  # fmt: skip
Change = Callable[[dict[str, Any]], None]


def cli(*arguments: object) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)


def curve(steps: int = 8, every: int = 10) -> list[dict[str, Any]]:
    """Records as the trainer writes them: several lines a step, speed and memory among them."""
    out: list[dict[str, Any]] = []
    for i in range(1, steps + 1):
        step = i * every
        out.append({"step": step, "epoch": step / 40, "loss/total": 3.0 - i / 8, "loss/ntp": 2.0 + 1 / i,
                    "optimizer/lr": 1e-3, "speed/images_per_s": 100.0 + i, "memory/peak_gib": 1.0})  # fmt: skip
        if i % 4 == 0:
            out.append({"step": step, "epoch": step / 40, "held_out/ntp_ema": 2.5 - i / 16})
    return out


def config(**changes: Any) -> RunConfig:
    """The demo's configuration with dotted changes (a__b for a.b)."""
    return load("digits-mirai-e", [f"{name.replace('__', '.')}={value}" for name, value in changes.items()])


def write_run(
    run: Path, records: list[dict[str, Any]] | None = None, environment: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """config.yaml, environment.json, starts.jsonl and metrics.jsonl of a run."""
    run.mkdir(parents=True)
    told = {**ENVIRONMENT, **(environment or {})}
    (run / "config.yaml").write_text(dump(config(**changes)))
    (run / "environment.json").write_text(json.dumps(told))
    (run / "starts.jsonl").write_text(json.dumps({"unix_time": 1_790_000_000, **told}) + "\n")
    write_curve(run, curve() if records is None else records)
    return run


def write_curve(run: Path, records: list[dict[str, Any]], end: str = "") -> None:
    """metrics.jsonl, with `end` after the last line."""
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + end)


def changed(records: list[dict[str, Any]], step: int, **values: float) -> list[dict[str, Any]]:
    """The records with other values at a step (loss_total for loss/total)."""
    values = {name.replace("_", "/", 1): value for name, value in values.items()}
    out = []
    for record in records:
        new = {name: values[name] for name in values if name in record and record["step"] == step}
        out.append({**record, **new})
    return out


def write_checkpoint(run: Path, step: int, ranks: int = 2, **info: Any) -> Path:
    """A whole checkpoint with small files of bytes for tensors."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    told = {
        "step": step, "global_batch_size": 32, "seed": 0, "samples_in_epoch": 0, "world_size": ranks, "zero_stage": 2,
        "precision": "fp32", "method": "mirai-e", "code": "a" * 40, "applied_steps": step, "format": 1, **info,
    }  # fmt: skip
    (folder / "info.json").write_text(json.dumps(told))
    for rank in range(ranks):
        (folder / f"state-rank{rank:05d}.safetensors").write_bytes(bytes([rank, step % 256]) * 500)
    files = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    (run / "checkpoints" / "latest").write_text(folder.name)
    return folder


def write_incarnation(run: Path, number: int, **changes: Any) -> Path:
    """What a start writes when it takes a run."""
    told = {
        "number": number, "id": f"{number}", "host": "node7", "space": "elsewhere", "pid": 42, "pid_started": "1",
        "job": "", "restart": 0, "started": 1_790_000_000.0, "resumed_after": None, "resumed_from": None,
        "ended": None, **changes,
    }  # fmt: skip
    path = run / "incarnations" / f"{number:05d}.json"
    path.write_text(json.dumps(told))
    return path
