"""The teacher of a run, with its weights where they are not the run's own."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from mirai_ds.checkpoint.gpt_file import read_gpt_file
from mirai_ds.checkpoint.llamagen import check_gpt_weights, check_told
from mirai_ds.checkpoint.model_folder import weights_file
from mirai_ds.checkpoint.weights import checkpoint_of, checkpoint_weights
from mirai_ds.config import ConfigError, RunConfig, UserError
from mirai_ds.foresight import EmaTeacher, Teacher, method_of

FIELD = "foresight.teacher_weights"


def build_teacher(config: RunConfig, device: torch.device) -> tuple[Teacher | None, str, list[str]]:
    """The teacher of the configured method (mirai-e's own average without weights yet), the digest of a frozen one's
    weights or nothing, and what to tell the user of them."""
    method = method_of(config.foresight)
    if method is None:
        return None, "", []
    ranks = config.foresight.desynchronised_ranks
    if ranks is not None:
        _check_one_rank(ranks)
        note = f"experiment: {ranks} teachers that began at different random weights, as in the authors' code"
        return method.teacher(config, device), "", [note]
    teacher = method.teacher(config, device)
    if config.foresight.teacher_weights is None:
        return teacher, "", []
    assert isinstance(teacher, EmaTeacher)
    weights, origin = pretrained(config)
    held = {name: weights[name] for name in teacher.names}
    teacher.load(held.items())
    digest = digest_of_tensors(held)
    return teacher, digest, [f"frozen teacher: {origin}, digest {digest[:12]}"]


def _check_one_rank(ranks: int) -> None:
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world > 1:
        problem = f"is emulated by one rank, this run has {world}; start it with --ranks 1"
        raise ConfigError("foresight.desynchronised_ranks", ranks, problem)


def pretrained(config: RunConfig) -> tuple[dict[str, Tensor], str]:
    """The weights `foresight.teacher_weights` names, the average where there is one, and where they come from.

    A weights file, a run folder (its newest whole checkpoint) or a checkpoint's folder.  Raises UserError.
    """
    given = config.foresight.teacher_weights or ""
    path = weights_file(Path(given))
    try:
        if path.is_dir():
            run, step = _run_and_step(path)
            folder, steps, trained = checkpoint_of(run, step)
            theirs = trained.model
            if theirs.grid != config.model.grid:  # shapes do not tell
                raise UserError(f"is of a {theirs.grid}x{theirs.grid} grid, this run has {config.model.grid}")
            check_told(theirs.model_dump(), config.model, path)
            weights, origin = checkpoint_weights(folder, "ema", heads=False), f"EMA of {run} at step {steps}"
        else:
            file = read_gpt_file(path, "ema", or_other=True)
            check_told(file.model, config.model, path)
            weights, origin = file.weights, f"{given} ({file.kind} weights)"
        check_gpt_weights(weights, config.model, path)
    except UserError as error:
        raise ConfigError(FIELD, given, str(error)) from None
    return weights, origin


def _run_and_step(path: Path) -> tuple[Path, str]:
    """(run, `auto`) of a run's folder, (run, step) of a checkpoint's."""
    number = path.name.removeprefix("step-")
    if path.parent.name == "checkpoints" and number.isdigit():
        return path.parent.parent, str(int(number))
    return path, "auto"


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names and fp32 values in the names' order: the same for a run's weights and for their export."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].float().contiguous().numpy().tobytes())
    return digest.hexdigest()
