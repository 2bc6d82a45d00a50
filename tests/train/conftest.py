"""One short real run through the command line, shared by the tests of this folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.once import once
from tests.warm_start import Done, warm_mirai_ds

SMALL = [
    "model.dim=64", "model.n_layer=3", "model.n_head=2", "train.epochs=1.5", "foresight.warmup_epochs=0.25",
    "foresight.projector_dim=64", "logging.every_steps=1", "checkpoint.every_steps=11", "checkpoint.keep_last=6",
    "eval.loss.every_steps=33", "sampling.per_class=2", "sampling.every_steps=33", "eval.classifier.per_class=3",
    "optimizer.warmup_steps=5", "ema.decay=0.9", "train.global_batch_size=32", "model.token_dropout=0.05",
    "model.resid_dropout=0.1", "model.ffn_dropout=0.1", "optimizer.lr=2e-3",
]  # fmt: skip


def mirai_ds(*arguments: str, timeout: float = 300, env: dict[str, str] | None = None, cwd: Path | None = None) -> Done:
    """Run the command line as a user would, in a process of its own; `warm_mirai_ds` is quicker."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_"))}
    command = [sys.executable, "-m", "mirai_ds", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**clean, **(env or {})}, check=False, cwd=cwd
    )
    return Done(done.returncode, done.stdout, done.stderr)


def small_train(run: Path, *extra: str, recipe: str = "digits-mirai-e", overrides: list[str] | None = None) -> Done:
    """Train the small variant of a recipe into `run`."""
    settings = [part for o in (SMALL if overrides is None else overrides) for part in ("--set", o)]
    return warm_mirai_ds("train", recipe, *settings, "--run-dir", str(run), *extra)


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def numbers(run: Path, first: int = 0) -> list[dict[str, Any]]:
    """Records after step `first` without what depends on the clock or the machine."""
    timed = ("speed/", "memory/")
    return [{k: v for k, v in r.items() if not k.startswith(timed)} for r in records(run) if r["step"] > first]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished Mirai-E run of 66 steps on 2 ranks, ZeRO-2, recompute every second block: from a shell's command, by
    DeepSpeed's launcher."""

    def train(folder: Path) -> None:
        run = folder / "small"
        settings = [part for o in SMALL for part in ("--set", o)]
        done = mirai_ds("train", "digits-mirai-e", *settings, "--run-dir", str(run))
        assert done.code == 0, done.out[-2000:] + done.err[-3000:]
        (run / "stdout.txt").write_text(done.out)

    return once(tmp_path_factory, "finished", train) / "small"
