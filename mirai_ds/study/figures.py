"""Pictures of a study: curves from its rows; samples side by side and feature maps from its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from mirai_ds.study.arms import ARMS, BASELINE, Planned, Study, StudyArm
from mirai_ds.study.costs import compute_spent
from mirai_ds.study.results import Results, estimate
from mirai_ds.tracking.pictures import save_figure

Array = np.ndarray[Any, Any]
SHOWN_CLASSES, SHOWN_EACH = 10, 4
SHOWN_FROM = 2  # point of a curve: those before would flatten it
MAPPED = 4  # held-out images of the maps


def draw_curves(results: Results, path: Path) -> None:
    """Held-out loss of the main arms over epochs and over compute, and paired differences to the baseline, mean and
    95 % interval over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    arms = [arm for arm in ARMS if arm.main and arm.name in results.arms]
    largest, highest = 0.0, 0.0
    for number, arm in enumerate(arms):
        style = {"label": arm.title, "marker": ".", "color": f"C{number}"}
        epochs, losses = results.curves(arm.name, "ntp_ema")
        mean = losses.mean(0)
        highest = max(highest, float(mean[SHOWN_FROM]))
        axes[0].plot(epochs, mean, **style)
        if arm.name in results.costs:
            steps = results.steps(arm.name)
            total = float(results.steps(BASELINE)[-1])
            axes[1].plot(compute_spent(results.costs[arm.name], steps) / total, mean, **style)
        if arm.name == BASELINE:
            axes[2].axhline(0, **(style | {"marker": None}))
            continue
        estimates = [estimate(list(column)) for column in results.curve_differences(arm.name, "ntp_ema").T]
        middle, half = (np.array([one[k] for one in estimates]) for k in (0, 1))
        largest = max(largest, float(np.abs(middle).max()))
        axes[2].plot(epochs, middle, **style)
        axes[2].fill_between(epochs, middle - half, middle + half, alpha=0.15, color=style["color"], linewidth=0)
    lowest = min(float(line.get_ydata().min()) for line in axes[0].lines)
    for axis in axes[:2]:
        axis.set_ylim(lowest - 0.03 * (highest - lowest), highest + 0.03 * (highest - lowest))
    axes[2].set_ylim(-2.5 * largest, 2.5 * largest)  # wider intervals are cut
    axes[0].set(xlabel="epoch", ylabel="held-out loss, EMA (nats a token)", title="equal epochs")
    axes[1].set(xlabel="compute (the baseline's run = 1)", title="equal compute")
    axes[2].set(xlabel="epoch", title="difference to the baseline, 95 %")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save_figure(path, figure, dpi=90, metadata={"Software": None})


def draw_samples(study: Study, folder: Path, arms: list[StudyArm], path: Path) -> None:
    """Samples of seed 0's runs side by side, same labels and random numbers, after real images."""
    from matplotlib.figure import Figure

    from mirai_ds.checkpoint.weights import load_weights
    from mirai_ds.data import load_dataset
    from mirai_ds.model import SamplingRules, gpt_from_weights
    from mirai_ds.sampling.grid import draw_in_batches
    from mirai_ds.study.arms import run_config, runs_folder
    from mirai_ds.study.measure import SAMPLE_SEED
    from mirai_ds.tracking.pictures import labelled_grid

    config = run_config(study, arms[0], 0, folder)
    data = load_dataset(config.data, config.model)
    chosen = [np.flatnonzero(data.held_out.labels == c)[:SHOWN_EACH] for c in range(SHOWN_CLASSES)]
    pictures = [("real, as tokens", data.held_out.decode(data.held_out.first_view(np.concatenate(chosen))))]
    labels = torch.arange(SHOWN_CLASSES).repeat_interleave(SHOWN_EACH)
    for arm in arms:
        loaded = load_weights(runs_folder(folder, Planned(arm, 0)), "ema")
        gpt = gpt_from_weights(config.model, {name: value.float() for name, value in loaded.gpt.items()})
        tokens = draw_in_batches(gpt, labels, SamplingRules(), SAMPLE_SEED, torch.device("cpu"))
        pictures.append((arm.title, data.train.decode(tokens)))
    figure = Figure(figsize=(2.1 * len(pictures), 5.2), layout="constrained")
    for axis, (title, images) in zip(figure.subplots(1, len(pictures)), pictures, strict=True):
        axis.imshow(labelled_grid(images, columns=SHOWN_EACH, min_side=28), interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    save_figure(path, figure, dpi=80, bbox_inches="tight")


def draw_maps(folder: Path, arms: list[StudyArm], path: Path) -> None:
    """Draws what `mirai-ds map` draws, of the runs with seed 0."""
    from mirai_ds.analysis.maps import make_maps
    from mirai_ds.study.arms import runs_folder

    sources = [runs_folder(folder, Planned(arm, 0)) for arm in arms]
    wanted = [str(i) for i in range(MAPPED)]
    make_maps(sources, wanted, None, "pca", path, "ema", None, None, None, None, None, 256, 0, "input")
    path.with_suffix(".json").unlink()
