"""What ranks run: a few steps of a small session with two micro-batches a step, a checkpoint and its continuation."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mirai_ds.config import load
from mirai_ds.model import next_token_loss
from mirai_ds.runs.lock import RunLock
from mirai_ds.runtime.distributed import World
from mirai_ds.runtime.signals import StopRequests
from mirai_ds.train.build import build_session
from mirai_ds.train.hooks.eval_loss import held_out_loss
from mirai_ds.train.nonfinite import confirm_step
from mirai_ds.train.session import Session
from mirai_ds.train.step import mean_over_ranks, train_step

SETTINGS = [
    "model.dim=32", "model.n_layer=3", "model.n_head=2", "train.epochs=3", "train.global_batch_size=16",
    "foresight.warmup_epochs=0", "foresight.projector_dim=32", "foresight.kernel=reference", "optimizer.lr=2e-3",
    "eval.classifier.enabled=false", "ema.decay=0.9", "model.token_dropout=0.05", "model.resid_dropout=0.1",
    "eval.loss.max_samples=9", "eval.loss.batch_size=3",
]  # fmt: skip


def _session(run: Path, accumulation: int) -> Session:
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = [RunLock.take(run).mine if rank == 0 else None]
    dist.broadcast_object_list(mine, src=0)
    config = load("digits-mirai-e", [*SETTINGS, f"train.grad_accum_steps={accumulation}"], "zero2")
    run_lock = RunLock(run, mine[0], main=rank == 0)  # type: ignore[arg-type]
    return build_session(config, run, World(rank, rank, world, world), torch.device("cpu"), run_lock, StopRequests())


def _release(session: Session) -> None:
    session.run_lock.release("finished")
    session.engine.destroy()
    del session
    gc.collect()
    dist.barrier()


def _step(session: Session) -> dict[str, list[float]]:
    """The metrics of the next step, over all ranks."""
    record = train_step(session, session.step)
    session.count_step()
    return mean_over_ranks(confirm_step(session, record).metrics)


def metrics_case(folder: str, accumulation: int) -> dict[str, list[float]]:
    """The metrics of the second step, whose global batch is the same in any number of micro-batches."""
    session = _session(Path(folder) / str(accumulation), accumulation)
    _step(session)
    metrics = _step(session)
    _release(session)
    return metrics


def held_out_case(folder: str) -> dict[str, Any]:
    """The held-out loss of nine images (five and four a rank, in batches of three) after three steps, and the same in
    one batch."""
    session = _session(Path(folder), 2)
    for _ in range(3):
        _step(session)
    shared, source = held_out_loss(session, "raw"), session.dataset.held_out
    nine = torch.arange(9)
    tokens, labels, _ = source.gather(nine, torch.zeros_like(nine))
    with session.plain_gpt("raw") as gpt, torch.inference_mode():
        logits = gpt(tokens[:, :-1], labels).logits
        whole = float(next_token_loss(logits, tokens))
        parts = [float(next_token_loss(logits[part], tokens[part])) for part in nine.split(3)]
    _release(session)
    return {"shared": shared, "whole": whole, "parts": parts}


def teacher_case(folder: str) -> list[list[str]]:
    """Before each of three steps the run's average; the teacher's tensors that differ from it in that step."""
    session = _session(Path(folder), 2)
    differ = []
    assert session.teacher is not None
    for _ in range(3):
        average = session.engine.gather_weights("ema")
        _step(session)
        trunk = session.teacher.trunk.named_parameters()  # type: ignore[attr-defined]
        differ.append([name for name, value in trunk if not torch.equal(value, average[name])])
    _release(session)
    return differ


def left_out_case(folder: str) -> list[bool]:
    """Of three steps, the last two after a rollback that left two batches out: whether this rank trained on its part of
    batches 0, 3 and 4."""
    session = _session(Path(folder), 2)
    seen: list[Any] = []
    forward, cut = session.engine.forward, session.loader.cut

    def watched(*arguments: Any) -> Any:
        seen[-1].append(arguments[2])
        return forward(*arguments)

    session.engine.forward = watched  # type: ignore[method-assign]
    right = []
    for left_out in (0, 2, 2):
        seen.append([])
        session.progress.batch_offset = left_out
        keys = cut.order.batch(session.step + left_out)[1].view(cut.accumulation, cut.world, cut.micro)[:, cut.rank]
        _step(session)
        right.append(torch.equal(torch.stack(seen[-1]), keys))
    _release(session)
    return right


def resume_case(folder: str) -> dict[str, Any]:
    """A checkpoint after an odd step of a run that skipped one, with random generators that are each rank's own; then
    one more step, from there and by a session that resumes there."""
    run, rank = Path(folder), dist.get_rank()
    session = _session(run, 2)
    session.run_lock.note_start(0, None)
    _step(session)
    torch.manual_seed(100 + rank)
    session.progress.applied_steps = 0
    session.save_checkpoint()
    went_on = {"metrics": _step(session), "drawn": torch.rand(3).tolist(), "applied": session.progress.applied_steps}
    _release(session)
    session = _session(run, 2)
    torch.manual_seed(7)
    session.checkpoints.resume("auto")
    resumed = {"metrics": _step(session), "drawn": torch.rand(3).tolist(), "applied": session.progress.applied_steps}
    _release(session)
    return {"went_on": went_on, "resumed": resumed}
