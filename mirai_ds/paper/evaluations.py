"""What `mirai-ds evaluate --json RUN/evaluations/NAME.json` wrote, and whether it is the paper's protocol."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirai_ds.config import RunConfig, SamplingConfig, UserError
from mirai_ds.paper.published import METRICS

FOLDER = "evaluations"
SCORES = (*METRICS, "frechet_distance")  # the last: of another network than Inception
NUM_SAMPLES = 50_000
LABELS = "random"  # LlamaGen's; as many of each class give another FID


@dataclass(frozen=True)
class Evaluation:
    """One file of scores.

    protocol: how they were computed; sampling: how the samples were drawn, from the record beside them, which the
    protocol holds as `sampling`, or the protocol itself.  step: of the weights that drew them, None where not recorded.
    """

    path: Path
    values: dict[str, float]
    num_samples: int | None
    reference: dict[str, Any]
    protocol: dict[str, Any]
    sampling: dict[str, Any]
    samples: str | None
    step: int | None


def read_evaluations(run: Path) -> tuple[list[Evaluation], list[str]]:
    """All evaluations of a run in order of name, and what could not be read."""
    evaluations, problems = [], []
    for path in sorted((run / FOLDER).glob("*.json")):
        try:
            evaluations.append(_read(path))
        except UserError as error:
            problems.append(str(error))
    return evaluations, problems


def _read(path: Path) -> Evaluation:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: is not what `mirai-ds evaluate --json` writes")
    values = {name: float(data[name]) for name in SCORES if _is_number(data.get(name))}
    if not values:
        raise UserError(f"{path}: holds none of {', '.join(SCORES)}")
    protocol, reference = _section(data, "protocol"), _section(data, "reference")
    sampling = {**protocol, **_section(protocol, "sampling")}
    step = next((sampling[name] for name in ("checkpoint_step", "step") if name in sampling), None)
    return Evaluation(
        path, values, _whole(data.get("num_samples")), reference, protocol, sampling,
        data["samples_sha256"] if isinstance(data.get("samples_sha256"), str) else None, _whole(step),
    )  # fmt: skip


def _section(data: dict[str, Any], name: str) -> dict[str, Any]:
    section = data.get(name)
    return section if isinstance(section, dict) else {}


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
    differences = []
    if evaluation.reference.get("standard") is not True:
        differences.append(f"reference {evaluation.reference.get('name', 'not recorded')} is not the standard one")
    if evaluation.num_samples != NUM_SAMPLES:
        differences.append(f"{_said(evaluation.num_samples)} samples, not {NUM_SAMPLES}")
    if not differences and isinstance(evaluation.protocol.get("departures"), list):
        differences += [str(departure) for departure in evaluation.protocol["departures"]]
    given = evaluation.sampling
    asked = ["cfg_scale", "weights"]
    asked += [name for name in ("temperature", "top_k", "top_p", "cfg_interval") if name in given]
    for name in asked:
        ours, theirs = given.get(name), getattr(wanted, name)
        differences += [f"{name} {_said(ours)}, not {_said(theirs)}"] if ours != theirs else []
    if given.get("policy", LABELS) != LABELS:
        differences.append(f"{_said(given['policy'])} labels, not {LABELS} ones")
    return differences


def _said(value: object) -> str:
    return "not recorded" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
