"""A step whose loss or gradient is not finite: nothing was updated; find out where it began, keep what explains it.

The step is simply done again with instruments on every module.  Data, dropout and weights are the same, so a fault of
the numbers shows itself again (and is again not applied), and a fault of the machine does not: then the second attempt
is the step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirai_ds.config import UserError
from mirai_ds.engine.compiled import eager
from mirai_ds.runtime.disk import write_whole
from mirai_ds.runtime.log import LOG
from mirai_ds.runtime.weight_files import write_safetensors
from mirai_ds.train.session import Session
from mirai_ds.train.step import StepRecord, train_step

FOLDER = "nonfinite"
MAX_SAMPLES = 64


@dataclass
class Finding:
    """What one rank saw first, in the order of execution."""

    rank: int
    order: int = -1  # the how-manyth module call (or gradient); -1: nothing seen
    what: str = ""  # output, gradient, weight, teacher's features
    module: str = ""
    micro_batch: int = -1
    samples: list[int] = field(default_factory=list)  # places in the data, of rows that were not finite


def confirm_step(session: Session, record: StepRecord) -> StepRecord:
    """Collective, after a step: ask whether the updates since the last time were made, which waits for the device.

    If not, the session is back where the first of them was refused, which was examined and, were it finite when done
    again, made: then `session.step` may be less than it was, and the record is that step's.  Raises UserError when too
    many fail in a row.
    """
    missing = session.engine.confirm_updates()
    if missing:
        session.go_back(missing)
        record = _handle_skipped_step(session, session.step)
        session.count_step(record.applied)
    return record


def _handle_skipped_step(session: Session, step: int) -> StepRecord:
    record, findings = _examine(session, step)
    record.applied = session.engine.confirm_updates() == 0
    if record.applied:
        LOG.warning("step %d: not finite, but finite when repeated: a fault of a device or of memory", step + 1)
        return record
    skipped = session.skipped
    skipped.add(step)
    keep_state = skipped.states < session.config.guard.nonfinite_states
    skipped.states += int(keep_state)
    folder = _save(session, step, record, findings, keep_state)
    first = _first(findings)
    allowed = session.config.guard.nonfinite_skips
    text = f"step {step + 1}: {first}; no update was applied; see {folder}"
    if skipped.in_a_row > allowed:
        raise UserError(f"{text}; {skipped.in_a_row} in a row, guard.nonfinite_skips = {allowed}")
    LOG.warning("%s; skipped", text)
    return record


def _first(findings: list[Finding]) -> str:
    """The earliest finding of any rank, in words."""
    seen = [f for f in findings if f.order >= 0]
    if not seen:
        return "loss or gradient not finite, though every module's output and its gradient are"
    first = min(seen, key=lambda f: f.order)
    where = f" of {first.module}" if first.module else ""
    samples = sorted({s for f in seen if (f.order, f.module) == (first.order, first.module) for s in f.samples})
    of = f", samples {samples[:8]}{'...' if len(samples) > 8 else ''}" if samples else ""
    return f"the first value that is not finite: {first.what}{where} on rank {first.rank}{of}"


def _examine(session: Session, step: int) -> tuple[StepRecord, list[Finding]]:
    """Collective: the step once more with instruments."""
    session.beat("examining a step that was not finite")
    finding = Finding(session.world.rank)
    bad = [name for name, fine in _weights(session) if not fine]
    with eager(), instruments(session, step, finding):  # hooks are no part of compiled graphs
        record = train_step(session, step, plainly=True)
    if bad:
        finding.order, finding.what, finding.module, finding.samples = 0, "weight", bad[0], []
    return record, session.control.gather(finding)


def _weights(session: Session) -> Iterator[tuple[str, bool]]:
    """(name, whether finite) of this rank's slices of the fp32 masters."""
    for shard in session.engine.layout.shards:
        flat = shard.master.detach().flatten()
        for piece in shard.pieces():
            yield piece.name, bool(torch.isfinite(flat[piece.local : piece.local + piece.length]).all())


@contextmanager
def instruments(session: Session, step: int, finding: Finding) -> Iterator[None]:
    """Watch every module's output and, when all were finite, the gradients that arrive at them."""
    module: nn.Module = session.engine.ds.module
    calls = [0]
    batches = _MicroBatches(session, step)

    def see(value: Any, what: str, name: str, backward: bool) -> None:
        calls[0] += 1
        if finding.order >= 0:
            return
        for tensor in _tensors(value):
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                finding.order, finding.what, finding.module = calls[0], what, name
                finding.micro_batch = batches.number
                finding.samples = batches.samples(tensor)
                return
            if not backward and tensor.requires_grad:
                tensor.register_hook(lambda g: see(g, "gradient of the output", name, True))

    def before(_: nn.Module, arguments: Any, named: Any) -> None:
        batches.number += 1
        if finding.order < 0 and any(
            t.is_floating_point() and not torch.isfinite(t).all() for t in _tensors(arguments)
        ):
            finding.order, finding.what, finding.micro_batch = 0, "the teacher's features", batches.number

    handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
    handles += [
        part.register_forward_hook(lambda _m, _i, out, name=name or "objective": see(out, "output", name, False))
        for name, part in module.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _MicroBatches:
    """Which samples a row of the current micro-batch is."""

    def __init__(self, session: Session, step: int) -> None:
        self.session, self.step, self.number = session, step + session.progress.batch_offset, -1

    def samples(self, tensor: Tensor) -> list[int]:
        """Places in the data of the rows of (B, ...) `tensor` with a value that is not finite; [] for other shapes."""
        cut = self.session.loader.cut
        if tensor.dim() < 2 or len(tensor) != cut.micro:
            return []
        rows = (~torch.isfinite(tensor.detach().flatten(1))).any(dim=1).nonzero().flatten().cpu()
        start = (max(self.number, 0) * cut.world + cut.rank) * cut.micro
        indices, _ = cut.order.batch(self.step, start, start + cut.micro)
        return [int(place) for place in cut.source.places(indices[rows].numpy())[:MAX_SAMPLES]]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _save(session: Session, step: int, record: StepRecord, findings: list[Finding], keep_state: bool) -> Path:
    """Collective: report.json, every rank's batch, and the whole state while there is room for it by configuration.

    A full disk must not end a run whose weights are fine: it is told and the run goes on.
    """
    folder = session.run / FOLDER / f"step-{step + 1:08d}"
    problem = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_batches(session, step, folder / f"batch-rank{session.world.rank:05d}.safetensors")
        if session.is_main:
            metrics = {name: value.double().flatten().tolist() for name, value in record.metrics.items()}
            report = {
                "step": step + 1, "summary": _first(findings), "findings": [asdict(f) for f in findings],
                "lr": record.lr, "lambda": record.multiplier, "grad_norm": float(record.grad_norm),
                "metrics_of_rank_0": metrics, "batch_offset": session.progress.batch_offset,
            }  # fmt: skip
            text = json.dumps(_named_numbers(report), indent=1)
            write_whole(folder / "report.json", text + "\n")
    except Exception as error:
        problem = f"rank {session.world.rank}: {type(error).__name__}: {error}"
    problems = [p for p in session.control.gather(problem) if p]
    if keep_state and not problems:
        problems = session.checkpoints.save_aside(folder / "state")
    if problems:
        LOG.warning("%s could not be written (%s)", folder, problems[0])
    return folder


def _write_batches(session: Session, step: int, path: Path) -> None:
    tensors = {}
    for number, batch in enumerate(session.loader.micro_batches(step + session.progress.batch_offset)):
        for name, tensor in batch._asdict().items():
            if tensor is not None:
                tensors[f"{number}/{name}"] = tensor.cpu().contiguous()
    write_safetensors(path, tensors)


def _named_numbers(value: Any) -> Any:
    """JSON has no NaN and no infinity: their names instead."""
    if isinstance(value, dict):
        return {key: _named_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_named_numbers(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
