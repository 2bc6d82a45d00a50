"""What is better known before the first step than after a night: disk, data, ranks, devices, clocks."""

from __future__ import annotations

import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mirai_ds.checkpoint.format import FP32_COPIES
from mirai_ds.checkpoint.store import half_done
from mirai_ds.config import UserError
from mirai_ds.data import check_files
from mirai_ds.runs.lock import path_of
from mirai_ds.runtime.environment import code_version, package_versions
from mirai_ds.runtime.log import LOG
from mirai_ds.train.session import Session

BESIDE = 64 * 2**20  # logs, pictures, manifests


@dataclass(frozen=True)
class RankFacts:
    """What one rank found on its node.  clock: seconds since 1970; problem: what the user must mend, "" if nothing."""

    rank: int
    host: str
    code: str
    packages: dict[str, str]
    teacher: str
    device: str
    clock: float
    problem: str = ""


def checkpoint_bytes(session: Session) -> int:
    """Size of one checkpoint of this run, all ranks together."""
    numel = sum(p.numel() if not hasattr(p, "ds_numel") else p.ds_numel for p in session.engine.ds.module.parameters())
    return FP32_COPIES * 4 * int(numel)


def preflight(session: Session) -> None:
    """Collective, before the first step.  Raises UserError on every rank with what the user must mend; what only
    deserves a look becomes a note."""
    session.beat("preflight")
    session.control.barrier()  # so that clocks are read at one moment
    everyone = session.control.gather(_look(session))
    for facts in everyone:
        if facts.problem:
            raise UserError(f"preflight: rank {facts.rank} on {facts.host}: {facts.problem}")
    first = everyone[0]
    for facts in everyone[1:]:
        where = f"rank {facts.rank} on {facts.host}"
        if facts.code != first.code:
            raise UserError(f"preflight: {where} runs code {facts.code[:16]}, rank 0 on {first.host} {first.code[:16]}")
        if facts.teacher != first.teacher:
            raise UserError(
                f"preflight: {where} has other teacher weights than rank 0 on {first.host} "
                f"({session.config.foresight.teacher_weights}); give all the same"
            )
        for name, theirs in facts.packages.items():
            if theirs != first.packages[name]:
                raise UserError(
                    f"preflight: {where} has {name} {theirs}, rank 0 on {first.host} {first.packages[name]}"
                )
    devices = sorted({facts.device for facts in everyone})
    if len(devices) > 1:
        LOG.info("preflight: ranks run on different devices: %s", ", ".join(devices))
    clocks = [facts.clock for facts in everyone]
    skew, most = max(clocks) - min(clocks), session.config.guard.max_clock_skew_seconds
    if skew > most:
        late, early = (everyone[clocks.index(edge)].host for edge in (max(clocks), min(clocks)))
        raise UserError(
            f"preflight: the clocks of {late} and {early} are {skew:.0f} s apart (guard.max_clock_skew_seconds = "
            f"{most:g}): logs and requeueing would lie; synchronise them"
        )


def _look(session: Session) -> RankFacts:
    clock, rank = time.time(), session.world.rank
    problem = ""
    try:
        _check_folder(session)
        check_device(session.device)
        if rank == 0:
            _check_space(session)
            check_files(session.config.data)
    except (UserError, OSError, RuntimeError) as error:
        problem = str(error)
    return RankFacts(
        rank, socket.gethostname(), code_version(), package_versions(), session.checkpoints.origin.teacher,
        _device_name(session.device), clock, problem,
    )  # fmt: skip


def _check_folder(session: Session) -> None:
    """This rank sees the run's folder, and may write there."""
    run = session.run
    if not path_of(run, session.run_lock.mine.number).is_file():
        raise UserError(
            f"{run}: rank 0 wrote here and this rank does not see it; put it on a file system all nodes share"
        )
    probe = run / f".probe-{uuid.uuid4().hex}"
    try:
        probe.write_bytes(b"mirai")
        if probe.read_bytes() != b"mirai":
            raise UserError(f"{run}: what is written there is not what is read back")
    except OSError as error:
        raise UserError(f"{run}: cannot be written ({error})") from None
    finally:
        probe.unlink(missing_ok=True)


def _check_space(session: Session) -> None:
    """Room for two more checkpoints: a new one is whole before an old one goes."""
    config = session.config.checkpoint
    if config.every_steps is None and not config.keep_steps and not config.at_end:
        return
    # What the start removes before it saves counts as free.
    waste = sum(path.stat().st_size for folder in half_done(session.run) for path in folder.rglob("*"))
    free, size = shutil.disk_usage(session.run).free + waste, checkpoint_bytes(session)
    if free < 2 * size + BESIDE:
        raise UserError(
            f"{session.run}: {_gib(free)} free, two checkpoints need {_gib(2 * size + BESIDE)}; make room, or choose "
            "another --run-dir"
        )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def check_device(device: torch.device, multiply: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> None:
    """It computes: small integers, whose product is exact in any precision."""
    side = 64
    left = (torch.arange(side * side) % 3).view(side, side).float()
    expected = left @ left
    product = multiply(left.to(device), left.to(device)).cpu()
    if not torch.equal(product, expected):
        raise UserError(f"device {device} multiplies matrices wrongly; take the node out of service")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {os.cpu_count()} cores"
