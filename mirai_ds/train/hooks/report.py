"""The end of a run: curves, generated beside real images, a classifier's verdict, a short table, report.json."""

from __future__ import annotations

import json
import math
import os
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mirai_ds.data import TokenSource
from mirai_ds.eval.classifier import ClassifierScore, classifier_score
from mirai_ds.runtime.disk import write_whole
from mirai_ds.tracking.pictures import GREY, labelled_grid, loss_curves, side_by_side
from mirai_ds.train.hooks.log import Sinks, last_values
from mirai_ds.train.hooks.sample import draw_samples
from mirai_ds.train.loop import Hook
from mirai_ds.train.session import Session

_SCORE_SEED_OFFSET = 1  # the judged images are not the ones in the grid


def read_records(run: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


class ReportHook(Hook):
    """Runs last: it reads what the other hooks wrote."""

    def __init__(self, sinks: Sinks) -> None:
        self.sinks = sinks
        self._began = time.monotonic()

    def needs_sync(self, session: Session) -> bool:
        """Only at the end."""
        return False

    def on_end(self, session: Session) -> None:
        """Judge, draw, print."""
        score = self._score(session) if session.config.eval.classifier.enabled else None
        if score is not None:
            values = {"score/accuracy_generated": score.generated, "score/accuracy_real": score.real}
            self.sinks.scalars(values, session)
        if not session.is_main:
            return
        records = read_records(session.run)
        loss_curves(session.run / "loss.png", records, session.config.name)
        self._beside_real(session)
        report = self._summary(session, records, score)
        write_whole(session.run / "report.json", json.dumps(report, indent=2) + "\n")
        print_table(report, session.run)

    def _score(self, session: Session) -> ClassifierScore | None:
        labels = torch.arange(session.config.model.num_classes).repeat_interleave(
            session.config.eval.classifier.per_class
        )
        config = session.config.sampling
        tokens = draw_samples(session, labels, config.weights, session.config.seed + _SCORE_SEED_OFFSET)
        train, held_out = session.dataset.train, session.dataset.held_out
        return classifier_score(
            (pixels(train), train.labels), (pixels(held_out), held_out.labels), (train.decode(tokens), labels.numpy())
        )

    def _beside_real(self, session: Session) -> None:
        config, source = session.config.sampling, session.dataset.train
        path = session.run / "samples" / f"step-{session.step:08d}.png"
        if source.decoder is None or not path.is_file():
            return
        from PIL import Image

        generated = np.asarray(Image.open(path).convert("RGB"))
        real = labelled_grid(_rows_of_classes(source, config.classes, config.per_class), columns=config.per_class)
        title = f"generated (cfg {config.cfg_scale:g}, {config.weights} weights)"
        side_by_side(session.run / "samples.png", generated, real, (title, "real training images"))

    def _summary(
        self, session: Session, records: list[dict[str, Any]], score: ClassifierScore | None
    ) -> dict[str, Any]:
        config = session.config
        out: dict[str, Any] = {
            "recipe": config.name,
            "method": config.foresight.method,
            "ranks": session.world.size,
            "zero_stage": session.engine.stage,
            "steps": session.step,
            "epochs": session.step / session.order.steps_per_epoch,
            "seconds": time.monotonic() - self._began,
        }
        for name in ("held_out/ntp_raw", "held_out/ntp_ema", "loss/ntp", "loss/alignment"):
            having = [r for r in records if name in r]
            # A single measurement is the end, not a start as well.
            first = having[0] if len(having) > 1 else {}
            out[name] = {
                "first": first.get(name), "first_step": first.get("step"), "last": last_values(records, name),
            }  # fmt: skip
            finite = [r for r in having if r[name] is not None and math.isfinite(r[name])]
            if name.startswith("held_out/") and finite:
                lowest = min(finite, key=lambda r: r[name])
                out[name] |= {"lowest": lowest[name], "lowest_step": lowest["step"]}
        speeds = [r["speed/images_per_s"] for r in records if "speed/images_per_s" in r]
        out["images_per_s_median"] = float(np.median(speeds)) if speeds else None
        if score is not None:
            out["accuracy"] = {"generated": score.generated, "real": score.real, "ratio": score.ratio}
        return out


def pixels(source: TokenSource, indices: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
    """uint8 images of the first view of all samples, or of those at `indices`, as the decoder shows them."""
    return source.decode(source.first_view(indices))


def _rows_of_classes(source: TokenSource, classes: int, columns: int) -> np.ndarray[Any, Any]:
    """uint8 (classes * columns, H, W, 3): the first images of each class; dark where a class has fewer."""
    chosen = [np.flatnonzero(source.labels == label)[:columns] for label in range(classes)]
    images = pixels(source, np.concatenate(chosen))
    rows = np.full((classes, columns, *images.shape[1:]), GREY, np.uint8)
    for row, part in enumerate(np.split(images, np.cumsum([len(one) for one in chosen])[:-1])):
        rows[row, : len(part)] = part
    return rows.reshape(-1, *images.shape[1:])


def print_table(report: dict[str, Any], run: Path) -> None:
    """The short table at the end of a run."""
    table = Table(title=f"{report['recipe']}: {report['method']}, ZeRO-{report['zero_stage']}, {report['ranks']} ranks")
    table.add_column("what")
    table.add_column("first measured", justify="right")
    table.add_column("end", justify="right")
    labels = {
        "held_out/ntp_raw": "held-out loss, raw weights", "held_out/ntp_ema": "held-out loss, EMA weights",
        "loss/ntp": "training loss (next token)", "loss/alignment": "alignment loss",
    }  # fmt: skip
    for name, label in labels.items():
        entry = report[name]
        if entry["last"] is not None:
            began = "" if entry["first"] is None else f"{entry['first']:.4f} (step {entry['first_step']})"
            table.add_row(label, began, f"{entry['last']:.4f}")
            if entry.get("lowest", entry["last"]) < entry["last"]:
                table.add_row("    lowest", f"(step {entry['lowest_step']})", f"{entry['lowest']:.4f}")
    if "accuracy" in report:
        accuracy = report["accuracy"]
        table.add_row("recognised digits: real held out", "", f"{accuracy['real']:.3f}")
        table.add_row("recognised digits: generated", "", f"{accuracy['generated']:.3f}")
    table.add_row("steps", "", str(report["steps"]))
    if report["images_per_s_median"]:
        table.add_row("images/s (median)", "", f"{report['images_per_s_median']:.0f}")
    table.add_row("seconds (of this start)", "", f"{report['seconds']:.0f}")
    console = Console(width=None if os.isatty(1) else 100)
    console.print(table)
    console.print(f"pictures and numbers: {run}/", highlight=False, soft_wrap=True)
    if (run / "tensorboard").is_dir():  # by itself it opens on what comes first in the alphabet
        losses = f"tensorboard --logdir {shlex.quote(str(run.parent))}, and http://localhost:6006/#custom_scalars"
        console.print(f"curves: {losses}", highlight=False, soft_wrap=True)
