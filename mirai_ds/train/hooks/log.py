"""Metrics to metrics.jsonl, the trackers and the terminal, every `logging.every_steps` steps."""

from __future__ import annotations

import math
import resource
import time
from typing import Any

import numpy as np
import torch

from mirai_ds.config import dump
from mirai_ds.foresight import method_of, offsets
from mirai_ds.planning.flops import training_flops
from mirai_ds.tracking.json_lines import JsonLines
from mirai_ds.tracking.registry import close_trackers, find_trackers, open_trackers
from mirai_ds.tracking.tracker import BackgroundTracker, TrackedRun
from mirai_ds.train.agree import on_every_rank
from mirai_ds.train.hooks.progress import TrainingProgress
from mirai_ds.train.loop import Hook
from mirai_ds.train.session import Session
from mirai_ds.train.step import StepRecord, mean_over_ranks


class Sinks:
    """The main rank's metrics.jsonl and trackers; on other ranks writing does nothing."""

    def __init__(self) -> None:
        self.jsonl: JsonLines | None = None
        self._trackers: list[BackgroundTracker] = []

    def open(self, session: Session) -> None:
        """Open for appending after `session.step`."""
        if not session.is_main or self.jsonl is not None:
            return
        self.jsonl = JsonLines(session.run / "metrics.jsonl", session.step, session.progress.log_bytes)
        session.checkpoints.log_position = self.jsonl.position
        config = session.config
        run = TrackedRun(
            config.name, session.run, session.step, self.jsonl.position(), config.model_dump(mode="json")
        )  # fmt: skip
        self._trackers = open_trackers(find_trackers(config.tracking), run)

    def rewind(self, session: Session) -> None:
        """Take back what came after the checkpoint that was returned to."""
        self.close()
        self.jsonl = None
        self.open(session)

    def machine(self, values: dict[str, float], session: Session) -> None:
        """Write scalars that tell of the machine; they are no part of the curve that a resume repeats."""
        for tracker in self._trackers:
            if tracker.machine_values:
                tracker.scalars(values, session.step)

    def scalars(self, values: dict[str, float], session: Session) -> None:
        """Write named scalars of the current step.  Raises RunTakenOverError when another start holds the run."""
        if self.jsonl is not None:
            session.run_lock.check()
            epoch = session.step / session.order.steps_per_epoch
            self.jsonl.write({"step": session.step, "epoch": round(epoch, 6), **values})
        for tracker in self._trackers:
            tracker.scalars(values, session.step)

    def image(self, name: str, image: np.ndarray[Any, Any], session: Session) -> None:
        """Show a uint8 (H, W, 3) picture of the current step."""
        for tracker in self._trackers:
            tracker.image(name, image, session.step)

    def text(self, name: str, text: str, session: Session) -> None:
        """Show preformatted text."""
        for tracker in self._trackers:
            tracker.text(name, text, session.step)

    def close(self) -> None:
        """Close all."""
        if self.jsonl is not None:
            self.jsonl.close()
        close_trackers(self._trackers)
        self._trackers = []


class LogHook(Hook):
    """Losses, cosines, rates, gradient norm, throughput and memory.

    A logged loss is the global batch's at that step, not an average since the last log: curves of a resumed run are
    the same numbers.
    """

    def __init__(self, sinks: Sinks) -> None:
        self.sinks = sinks
        self._since, self._step = 0.0, 0
        self._flops_done = 0.0
        self.progress: TrainingProgress | None = None

    def check(self, session: Session) -> None:
        """Whether the trackers can be had: a package may be missing."""
        on_every_rank(lambda: find_trackers(session.config.tracking if session.is_main else []))

    def on_start(self, session: Session) -> None:
        """Open the sinks, describe the run."""
        self.sinks.open(session)
        if session.is_main and session.step == 0:
            self.sinks.text("config/run", dump(session.config), session)
            self.sinks.text("config/deepspeed", (session.run / "deepspeed.json").read_text(encoding="utf-8"), session)
        self._step, self._since = session.step, time.perf_counter()
        if session.is_main:
            self.progress = TrainingProgress(
                session.config.name, session.step, session.total_steps, session.config.logging.progress
            )

    def needs_sync(self, session: Session) -> bool:
        """At the interval and at the last step."""
        return session.step % session.config.logging.every_steps == 0 or session.step == session.total_steps

    def after_step(self, session: Session, record: StepRecord) -> None:
        """Count FLOPs always; reduce and write when it is time."""
        feature_dim = session.teacher.feature_dim if session.teacher else 0
        per_image = training_flops(session.config.model, session.config.foresight, feature_dim, record.aligned)
        self._flops_done += per_image * session.config.train.global_batch_size
        if not self.needs_sync(session):
            return
        values = self._values(session, record)
        self.sinks.scalars(values, session)
        if self.progress is not None:
            self.progress.show(session.step, record.epoch, values)
        self._since, self._step, self._flops_done = time.perf_counter(), session.step, 0.0
        session.hook_seconds = 0.0

    def on_rewind(self, session: Session) -> None:
        """Start counting and writing from the step that was returned to."""
        self.sinks.rewind(session)
        self._step, self._since, self._flops_done = session.step, time.perf_counter(), 0.0

    def on_end(self, session: Session) -> None:
        """Close the progress line."""
        if self.progress is not None:
            self.progress.close()

    def _values(self, session: Session, record: StepRecord) -> dict[str, float]:
        means = mean_over_ranks(record.metrics)  # waits for the device, so the clock below is right
        seconds = time.perf_counter() - self._since - session.hook_seconds
        images = (session.step - self._step) * session.config.train.global_batch_size
        values: dict[str, float] = {"loss/total": means["loss"][0], "loss/ntp": means["ntp"][0]}
        foresight = session.config.foresight
        weights = foresight.weights or []
        heads = [
            f"head{k + 1}_down{down}_{'left' if right < 0 else 'right'}{abs(right)}"
            for k, (down, right) in enumerate(offsets(foresight))
        ]
        if record.aligned:
            values["loss/alignment"] = means["alignment"][0]
            method = method_of(foresight)
            assert method is not None
            values |= {f"{method.metric}/{head}": means[method.metric][k] for k, head in enumerate(heads)}
            values |= _diagnostics(means, heads)
        values |= {
            "foresight/schedule": record.multiplier,  # loss/total = loss/ntp + this * loss/alignment
            **{f"foresight/lambda/{head}": record.multiplier * weights[k] for k, head in enumerate(heads)},
            "optimizer/lr": record.lr,
            "optimizer/grad_norm": float(record.grad_norm),
            **_clipping(session, float(record.grad_norm)),
            "optimizer/skipped_steps": float(session.step - session.progress.applied_steps),
            "speed/images_per_s": images / seconds,
            "speed/tokens_per_s": images * session.config.model.block_size / seconds,
            "speed/model_tflops_per_s_per_rank": self._flops_done / seconds / session.world.size / 1e12,
            "memory/peak_gib": peak_memory(session.device) / 2**30,
        }
        return values


def _diagnostics(means: dict[str, list[float]], heads: list[str]) -> dict[str, float]:
    """What `logging.diagnostics` measures: nothing without it."""
    values = {}
    if "tap_gradients" in means:
        ntp, alignment, product = means["tap_gradients"]
        lengths = math.sqrt(max(ntp, 0.0)), math.sqrt(max(alignment, 0.0))
        values = {"foresight/gradient_ntp": lengths[0], "foresight/gradient_alignment": lengths[1]}
        if min(lengths) > 0:
            values["foresight/gradient_cosine"] = product / (lengths[0] * lengths[1])
    centred = means.get("centred_cosine", [])
    return values | {f"centred_cosine/{head}": value for head, value in zip(heads, centred, strict=False)}


def _clipping(session: Session, norm: float) -> dict[str, float]:
    """What clipping multiplied the gradients by, as torch has it; nothing without diagnostics or clipping."""
    limit = session.config.optimizer.grad_clip
    if not session.config.logging.diagnostics or not limit:
        return {}
    return {"optimizer/clip_factor": min(1.0, limit / (norm + 1e-6))}


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on a GPU, the process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def last_values(run_records: list[dict[str, Any]], name: str) -> float | None:
    """The newest value of a metric among JSONL records, or None."""
    return next((float(r[name]) for r in reversed(run_records) if name in r), None)
