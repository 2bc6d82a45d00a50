"""Figures of a report as data URIs: curves as SVG, pictures as PNG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

Points = Mapping[int, float] | Mapping[float, float]  # step, or epoch -> value
Curves = Mapping[str, Points]

MOST_POINTS = 1000  # of a curve; more are thinned to every n-th and the last
MOST_PIXELS = 720  # of a picture's longer side


def thinned(points: Points, most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """Finite points in order of step, every n-th and the last."""
    finite = sorted((float(step), value) for step, value in points.items() if math.isfinite(value))
    stride = -(-len(finite) // most) if finite else 1
    chosen = finite[::stride]
    if finite and chosen[-1] != finite[-1]:
        chosen.append(finite[-1])
    return [step for step, _ in chosen], [value for _, value in chosen]


def chart(
    title: str, curves: Curves, unit: str, log: bool = False, xlabel: str = "step", paper: Curves | None = None
) -> str | None:
    """One chart as an SVG data URI; None where no curve has two finite points.

    paper: published points beside the curve of the same label, drawn as crosses; they count as points of the curve.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    drawn = {label: thinned(points) for label, points in curves.items()}
    drawn = {label: points for label, points in drawn.items() if points[0]}
    printed = {label: thinned((paper or {}).get(label, {})) for label in drawn}
    if all(len({*steps, *printed[label][0]}) < 2 for label, (steps, _) in drawn.items()):
        return None
    # The default salt is random: the same run must give the same page.
    with rc_context({"svg.hashsalt": "mirai_ds", "svg.fonttype": "path"}):
        figure = Figure(figsize=(6.2, 3.5), layout="constrained")
        axis = figure.subplots()
        for label, (steps, values) in drawn.items():
            # matplotlib leaves labels that begin with an underscore out of legends, and reads $...$ as mathematics.
            marker = "." if len(steps) < 30 else None
            (line,) = axis.plot(steps, values, label=_plain(label), marker=marker, linewidth=1.4)
            if printed[label][0]:
                beside = _plain(f"{label}, the paper's")
                axis.plot(*printed[label], linestyle="", marker="x", markersize=8, color=line.get_color(), label=beside)
        axis.set(xlabel=xlabel, ylabel=unit, title=_plain(title))
        if log:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _uri("image/svg+xml", buffer.getvalue())


def _plain(text: str) -> str:
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def picture(path: Path) -> str | None:
    """A picture file as a PNG data URI, made smaller when it is large; None where it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    if max(image.size) > MOST_PIXELS:
        image.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return _uri("image/png", buffer.getvalue())


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def spread(items: Sequence[Path], most: int) -> list[Path]:
    """At most `most` of them, evenly, the first and the last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
