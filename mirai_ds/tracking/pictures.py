"""Pictures of a run: grids of images, curves."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mirai_ds.runtime.disk import write_whole

Array = np.ndarray[Any, Any]

GAP, GREY, TEXT = 2, 64, 12  # pixels between images, their colour, height of letters
MOST_GUTTER = 160  # pixels for the names of rows


def labelled_grid(
    images: Array, columns: int, rows: Sequence[str] = (), captions: Sequence[str] = (), min_side: int = 64
) -> Array:
    """uint8 images (n, H, W, 3) in raster order -> one uint8 picture; small images are enlarged without smoothing.

    rows: a name for each row, left of it.  captions: one for each image, below it.  Names that are too long are cut.
    """
    scale = max(1, -(-min_side // images.shape[1]))
    big = np.repeat(np.repeat(images, scale, axis=1), scale, axis=2)
    height, width = big.shape[1:3]
    if captions:
        strips = [_text_strip(text, width, TEXT + 5, centred=True) for text in captions]
        big = np.concatenate([big, np.stack(strips)], axis=1)
    columns = min(columns, len(big))
    high, wide = big.shape[1] + GAP, width + GAP
    grid = np.full((GAP + -(-len(big) // columns) * high, GAP + columns * wide, 3), GREY, np.uint8)
    for n, image in enumerate(big):
        top, start = GAP + n // columns * high, GAP + n % columns * wide
        grid[top : top + high - GAP, start : start + width] = image
    if not rows:
        return grid
    gutter = min(MOST_GUTTER, 2 * GAP + max(int(_font().getlength(text)) + 1 for text in rows))
    strips = [_text_strip(text, gutter, height, centred=False) for text in rows]
    edge = np.full((GAP, gutter, 3), GREY, np.uint8)
    left = np.concatenate([edge, *(part for strip in strips for part in (strip, edge))])
    return np.concatenate([left, grid], axis=1)


def _text_strip(text: str, width: int, height: int, centred: bool) -> Array:
    """uint8 (height, width, 3) with one line of text, centred or at the right, cut where it is too long."""
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (width, height), (GREY,) * 3)
    font, room = _font(), width - 2 * GAP
    if font.getlength(text) > room:
        while text and font.getlength(text + "…") > room:
            text = text[:-1]
        text += "…"
    x = (width - font.getlength(text)) / 2 if centred else width - GAP - font.getlength(text)
    ImageDraw.Draw(strip).text((x, height / 2), text, (240,) * 3, font, anchor="lm")
    return np.asarray(strip)


@cache
def _font() -> Any:
    """The font that comes with matplotlib: Latin, Greek and Cyrillic letters."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", TEXT)


def save_png(path: Path, picture: Array) -> None:
    """Write a uint8 (H, W, 3) picture, whole or not at all, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, png_of(picture))


def save_figure(path: Path, figure: Any, **options: Any) -> None:
    """Write a matplotlib figure as a PNG, whole or not at all.  options: of its `savefig`."""
    content = io.BytesIO()
    figure.savefig(content, format="png", **options)
    write_whole(path, content.getvalue())


def png_of(picture: Array) -> bytes:
    """A uint8 (H, W, 3) picture as a PNG file's content."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    return content.getvalue()


def side_by_side(path: Path, left: Array, right: Array, titles: tuple[str, str]) -> None:
    """Two pictures beside each other, uint8 (H, W, 3) of the same height, each below its title; no margins."""
    parts = []
    for picture, title in zip((left, right), titles, strict=True):
        strip = _text_strip(title, picture.shape[1], 2 * TEXT, centred=True)
        parts.append(np.concatenate([strip, picture]))
    gap = np.full((parts[0].shape[0], 4 * GAP, 3), GREY, np.uint8)
    save_png(path, np.concatenate([parts[0], gap, parts[1]], axis=1))


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
    save_figure(path, figure, dpi=120)


def _curve(axis: Any, records: list[dict[str, Any]], name: str, label: str) -> None:
    points = [(record["step"], record[name]) for record in records if name in record]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
