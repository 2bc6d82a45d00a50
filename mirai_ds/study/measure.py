"""A finished run as a row: its curve, its samples before the judge, the smoothness of its features."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mirai_ds.analysis.maps import smoothness
from mirai_ds.checkpoint.weights import load_weights
from mirai_ds.data import load_dataset
from mirai_ds.eval.metrics.distances import GaussianStatistics, frechet_distance, gaussian_statistics
from mirai_ds.eval.metrics.manifold import precision_recall
from mirai_ds.model import SamplingRules, gpt_from_weights, token_features
from mirai_ds.model.rules import image_labels
from mirai_ds.sampling.grid import draw_in_batches
from mirai_ds.study.arms import ARMS, Planned, Study, run_config
from mirai_ds.study.images import Pixels
from mirai_ds.study.networks import judged, open_judge
from mirai_ds.study.rows import CurveRow, RunRow

Array = np.ndarray[Any, Any]
SAMPLE_SEED = 0  # the same labels and random numbers for every run
SMOOTHED = 256  # held-out images whose features are measured


def curve(study: Study, planned: Planned, run: Path) -> list[CurveRow]:
    """Held-out losses of a run, from its metrics.jsonl."""
    rows = []
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if "held_out/ntp_raw" in record:
            losses = record["held_out/ntp_raw"], record["held_out/ntp_ema"]
            rows.append(CurveRow(study.name, planned.arm.name, planned.seed, record["step"], record["epoch"], *losses))
    return rows


@cache
def reference(study: Study, folder: Path) -> tuple[Array, GaussianStatistics]:
    """The judge's features of real images as their tokens show them: held-out ones first, then training images."""
    config = run_config(study, ARMS[0], 0, folder)
    data = load_dataset(config.data, config.model)
    parts, wanted = [], study.reference
    for source in (data.held_out, data.train):
        chosen = np.arange(len(source))[:wanted]
        if len(chosen):
            pixels = Pixels(source.decode(source.first_view(chosen))[..., 0], source.labels[chosen])
            parts.append(judged(open_judge(folder), pixels)[0])
        wanted -= len(chosen)
    features = np.concatenate(parts)
    return features, gaussian_statistics(features)


def measure(study: Study, planned: Planned, run: Path, folder: Path) -> RunRow:
    """The row of a finished run in the study's `folder`."""
    loaded = load_weights(run, "ema")
    config = loaded.config
    gpt = gpt_from_weights(config.model, {name: value.float() for name, value in loaded.gpt.items()})
    data = load_dataset(config.data, config.model)
    labels = image_labels("balanced", range(config.model.num_classes), SAMPLE_SEED, torch.arange(study.samples))
    tokens = draw_in_batches(gpt, labels, SamplingRules(), SAMPLE_SEED, torch.device("cpu"))
    features, right = judged(open_judge(folder), Pixels(data.train.decode(tokens)[..., 0], labels.numpy()))
    real, statistics = reference(study, folder)
    near = precision_recall(torch.from_numpy(real), torch.from_numpy(features), "exact")
    chosen = np.arange(min(SMOOTHED, len(data.held_out)))
    shown, classes = data.held_out.first_view(chosen), torch.from_numpy(data.held_out.labels[chosen].astype(np.int64))
    layer = max(1, round(config.model.depth * 8 / 12))  # the aligned one, of the arms that align
    held, predicted = (smoothness(token_features(gpt, shown, classes, layer, slots)) for slots in ("input", "predict"))
    last = curve(study, planned, run)[-1]
    return RunRow(
        study.name, planned.arm.name, planned.seed, last.step, last.ntp_raw, last.ntp_ema,
        frechet_distance(gaussian_statistics(features), statistics), near.precision, near.recall, float(right.mean()),
        held.difference, predicted.difference, held.neighbours, held.random_pairs,
    )  # fmt: skip


def reference_facts(study: Study, folder: Path) -> dict[str, float]:
    """What real images get from the judge: the scale of the numbers.  `frechet_real`: of two halves of them."""
    features, _ = reference(study, folder)
    first, second = features[::2], features[1::2]
    near = precision_recall(torch.from_numpy(first), torch.from_numpy(second), "exact")
    return {
        "reference_images": float(len(features)),
        "frechet_real": frechet_distance(gaussian_statistics(first), gaussian_statistics(second)),
        "precision_real": near.precision, "recall_real": near.recall,
    }  # fmt: skip
