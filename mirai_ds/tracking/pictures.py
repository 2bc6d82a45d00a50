"""Pictures of a run: grids of images, curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]


def labelled_grid(images: Array, columns: int, min_side: int = 32) -> Array:
    """uint8 images (n, H, W, 3) in raster order -> one uint8 picture; small images are enlarged without smoothing."""
    from torchvision.utils import make_grid

    scale = max(1, -(-min_side // images.shape[1]))
    big = np.repeat(np.repeat(images, scale, axis=1), scale, axis=2)
    tensor = torch.from_numpy(np.ascontiguousarray(big.transpose(0, 3, 1, 2)))
    return make_grid(tensor, nrow=columns, padding=2, pad_value=64).permute(1, 2, 0).numpy()


def save_png(path: Path, picture: Array) -> None:
    """Write a uint8 (H, W, 3) picture, making the folder."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def side_by_side(path: Path, left: Array, right: Array, titles: tuple[str, str]) -> None:
    """Two pictures beside each other with titles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), layout="constrained")
    for axis, picture, title in zip(figure.subplots(1, 2), (left, right), titles, strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(title, fontsize=11)
        axis.axis("off")
    figure.savefig(path, dpi=120)


def loss_curves(path: Path, records: list[dict[str, Any]], title: str) -> None:
    """Next-token loss (training and held out) and, where there are heads, their cosines or entropies over steps."""
    from matplotlib.figure import Figure

    heads = sorted({name for record in records for name in record if name.startswith(("cosine/", "entropy/"))})
    figure = Figure(figsize=(10 if heads else 6, 4), layout="constrained")
    axes = figure.subplots(1, 2 if heads else 1, squeeze=False)[0]
    names = {
        "loss/ntp": "training batch",
        "held_out/ntp_raw": "held out, raw weights",
        "held_out/ntp_ema": "held out, EMA",
    }
    for name, label in names.items():
        _curve(axes[0], records, name, label)
    axes[0].set(xlabel="step", ylabel="next-token loss (nats a token)", title=title)
    for name in heads:
        _curve(axes[-1], records, name, name.partition("/")[2].replace("_", " "))
    if heads:
        tokens = heads[0].startswith("entropy/")
        ylabel = "later-token loss (nats a token)" if tokens else "cosine with the teacher"
        axes[-1].set(xlabel="step", ylabel=ylabel, title="foresight at the output" if tokens else "foresight alignment")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def _curve(axis: Any, records: list[dict[str, Any]], name: str, label: str) -> None:
    points = [(record["step"], record[name]) for record in records if name in record]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
