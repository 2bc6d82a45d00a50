"""What `mirai-ds evaluate --json RUN/evaluations/NAME.json` wrote, and whether it is the paper's protocol."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirai_ds.config import RunConfig, SamplingConfig, UserError
from mirai_ds.config.paper_rows import METRICS

FOLDER = "evaluations"
NUM_SAMPLES = 50_000


@dataclass(frozen=True)
class Evaluation:
    """One file of scores.  step: of the weights that drew the samples, None where it is not recorded."""

    path: Path
    values: dict[str, float]
    num_samples: int | None
    reference: dict[str, Any]
    protocol: dict[str, Any]
    samples: str | None
    step: int | None


def read_evaluations(run: Path) -> tuple[list[Evaluation], list[str]]:
    """All of a run, by name, and what could not be read."""
    found, problems = [], []
    for path in sorted((run / FOLDER).glob("*.json")):
        try:
            found.append(_read(path))
        except UserError as error:
            problems.append(str(error))
    return found, problems


def _read(path: Path) -> Evaluation:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: is not what `mirai-ds evaluate --json` writes")
    values = {name: float(data[name]) for name in METRICS if _is_number(data.get(name))}
    if not values:
        raise UserError(f"{path}: holds none of {', '.join(METRICS)}")
    protocol, reference = (data[k] if isinstance(data.get(k), dict) else {} for k in ("protocol", "reference"))
    step = protocol.get("step", data.get("step"))
    return Evaluation(
        path, values, _whole(data.get("num_samples")), reference, protocol,
        data["samples_sha256"] if isinstance(data.get("samples_sha256"), str) else None, _whole(step),
    )  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def last_step(config: RunConfig, steps_per_epoch: int) -> int:
    """The step at which a run ends."""
    steps = round(config.train.epochs * steps_per_epoch)
    return min(steps, config.train.max_steps) if config.train.max_steps else steps


def protocol_differences(evaluation: Evaluation, wanted: SamplingConfig) -> list[str]:
    """In what an evaluation is not the table's: reference, number of samples, guidance, weights, sampling rules."""
    found = []
    if evaluation.reference.get("standard") is not True:
        found.append(f"reference {evaluation.reference.get('name', 'not recorded')} is not the standard one")
    if evaluation.num_samples != NUM_SAMPLES:
        found.append(f"{_said(evaluation.num_samples)} samples, not {NUM_SAMPLES}")
    given = evaluation.protocol
    for name in ("cfg_scale", "weights"):
        if given.get(name) != getattr(wanted, name):
            found.append(f"{name} {_said(given.get(name))}, not {_said(getattr(wanted, name))}")
    for name in ("temperature", "top_k", "top_p", "cfg_interval"):  # else LlamaGen's, which are the recipe's
        if name in given and given[name] != getattr(wanted, name):
            found.append(f"{name} {_said(given[name])}, not {_said(getattr(wanted, name))}")
    return found


def _said(value: object) -> str:
    return "not recorded" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
