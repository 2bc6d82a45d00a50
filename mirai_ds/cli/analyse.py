"""`mirai-ds map` and `report`: looking at runs.  Heavy modules are imported inside the verbs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mirai_ds.cli.errors import CONTEXT, mistakes_in_one_line
from mirai_ds.cli.output import JSON, PATH, print_json


@click.command("map", context_settings=CONTEXT)
@click.argument("sources", nargs=-1, required=True, type=PATH, metavar="RUN_OR_FILE...")
@click.option("--image", "wanted", multiple=True, metavar="N|FILE",
              help="Held-out sample, .npz of tokens, or picture; repeatable.  Default held-out 0 to 3.")  # fmt: skip
@click.option("--layer", type=click.IntRange(min=1), help="Block, 1-based; default two thirds of the depth (8 of 12).")
@click.option("--method", type=click.Choice(["tsne", "pca"]), default="tsne", show_default=True)
@click.option("--out", type=PATH, metavar="PNG", help="Default RUN/maps/layer-LL-METHOD.png; the JSON goes beside it.")
@click.option("--weights", type=click.Choice(["raw", "ema"]), help="Default the run's (ema), else what a file has.")
@click.option("--step", type=int, help="Checkpoint of this step; default the newest whole one.")
@click.option("--recipe", help="Of weights files: what trained them; default as they say, or their shapes.")
@click.option("--block-size", type=click.IntRange(min=1), help="Tokens an image, where files say none; default 256.")
@click.option("--tokenizer", type=PATH, help="Its file, to show tokens as pictures and to encode pictures.")
@click.option("--label", type=click.IntRange(min=0), help="Class of given files; default the unconditional one.")
@click.option("--num", "measured", type=click.IntRange(min=1), default=256, show_default=True,
              help="Held-out images whose smoothness is measured.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--slots", type=click.Choice(["input", "predict"]), default="input", show_default=True,
              help="Feature of a token: of the slot that holds it, or predicts it.")  # fmt: skip
@JSON
@mistakes_in_one_line
def map_(sources: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Show token features of runs as colours on the token grid, beside the images (the paper's Figs. 6 and 9).

    RUN_OR_FILE: run folders, exports, released LlamaGen files.  Three t-SNE (or PCA) components of all shown images
    together become red, green and blue, so colours compare within a run, not between runs.  Smoothness compares runs:
    the mean cosine of neighbouring tokens less that of all pairs, over many held-out images, with a 95 % interval.

    \b
    Example:
      mirai-ds map runs/digits-baseline runs/digits-mirai-e
      mirai-ds map LlamaGen-B.pt mine.pt --image tokens.npz --layer 8 --out maps.png
    """
    from mirai_ds.analysis.maps import make_maps

    picture, record = make_maps(sources, **options)
    if as_json:
        print_json({"picture": str(picture), **record})
        return
    for row in record["runs"]:
        spread = f" ± {row['ci95']:.4f}" if row["ci95"] is not None else ""
        line = f"{row['run']}, layer {row['layer']} ({row['weights']}): neighbours {row['neighbour_cosine']:.4f}, "
        line += f"all pairs {row['random_pair_cosine']:.4f}, smoothness {row['smoothness']:.4f}{spread}"
        if row.get("over_first_ci95") is not None:
            line += f", over the first {row['over_first']:+.4f} ± {row['over_first_ci95']:.4f}"
        click.echo(f"{line} ({row['images']} images)")
    click.echo(f"{picture} and {picture.with_suffix('.json').name}")


@click.command(context_settings=CONTEXT)
@click.argument("runs", nargs=-1, required=True, type=PATH)
@click.option("--out", type=PATH, metavar="HTML", default=Path("report.html"), show_default=True)
@mistakes_in_one_line
def report(runs: tuple[Path, ...], out: Path) -> None:
    """Write one HTML page about RUNS: settings that differ, curves, samples over time, maps, scores, how they ended.

    The page needs nothing beside itself: pictures are inside, it loads nothing from anywhere, and it prints.

    \\b
    Example:
      mirai-ds report runs/digits-baseline runs/digits-mirai-e --out report.html
    """
    from mirai_ds.analysis.report_page import write_report

    click.echo(write_report(runs, out))
