"""`mirai-ds map`, `flops`, `plan`, `report`: looking inside and ahead.  Heavy modules are imported inside the verbs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mirai_ds.cli.errors import CONTEXT, mistakes_in_one_line

if TYPE_CHECKING:
    from rich.console import RenderableType

PATH = click.Path(path_type=Path)
METHODS = ("none", "mirai-e", "mirai-i")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")


@click.command("map", context_settings=CONTEXT)
@click.argument("sources", nargs=-1, required=True, type=PATH, metavar="RUN_OR_FILE...")
@click.option("--image", "wanted", multiple=True, metavar="N|FILE",
              help="Held-out sample, .npz of tokens, or picture; repeatable.  Default held-out 0 to 3.")  # fmt: skip
@click.option("--layer", type=click.IntRange(min=1), help="Block, 1-based; default two thirds of the depth (8 of 12).")
@click.option("--method", type=click.Choice(["tsne", "pca"]), default="tsne", show_default=True)
@click.option("--out", type=PATH, metavar="PNG", help="Default RUN/maps/layer-LL-METHOD.png; the JSON goes beside it.")
@click.option("--weights", type=click.Choice(["raw", "ema"]), help="Default the run's (ema); of a file raw.")
@click.option("--step", type=int, help="Checkpoint of this step; default the newest whole one.")
@click.option("--recipe", help="For bare weights files: the recipe they were trained with; default by their shapes.")
@click.option("--block-size", type=click.IntRange(min=1), default=256, show_default=True,
              help="Tokens an image, for files without a recipe.")  # fmt: skip
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
        _print_json({"picture": str(picture), **record})
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
@click.argument("recipes", nargs=-1)
@click.option("--size", "sizes", multiple=True, help="A LlamaGen size instead of recipes, e.g. GPT-L; repeatable.")
@click.option("--method", "methods", multiple=True, type=click.Choice([*METHODS, "mtp"]),
              help="With --size; default the first three.")  # fmt: skip
@click.option("--block-size", type=click.IntRange(min=1), default=256, show_default=True, help="Tokens; with --size.")
@click.option("--batch", type=click.IntRange(min=1), default=256, show_default=True, help="Images; with --size.")
@JSON
@mistakes_in_one_line
def flops(
    recipes: tuple[str, ...], sizes: tuple[str, ...], methods: tuple[str, ...], block_size: int, batch: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Count the floating-point operations of training, as the paper does (Table 13) and as they are done.

    RECIPES are names from `recipes list` or .yaml files; without any, the sizes are counted (default GPT-B).

    \b
    Example:
      mirai-ds flops
      mirai-ds flops --size GPT-L --size GPT-XL --method mirai-e
      mirai-ds flops digits-baseline digits-mirai-e --json
    """
    from mirai_ds.config import UserError, load
    from mirai_ds.planning import costs

    if recipes and (sizes or methods):
        raise UserError("--size and --method are for counting without recipes; leave out one of the two")
    rows = [costs.costs_of(load(name)) for name in recipes] or costs.costs_of_sizes(
        sizes or ("GPT-B",), methods or METHODS, block_size, batch
    )
    if as_json:
        _print_json(costs.costs_json(rows))
    else:
        _print(costs.render(rows))


@click.command(context_settings=CONTEXT)
@click.argument("recipe")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--gpus", type=click.IntRange(min=1), default=8, show_default=True, help="Of each node.")
@click.option("--device", required=True, metavar="NAME|cpu:GIB", help="E.g. a100-80g; another name lists them.")
@click.option("--deepspeed", metavar="FILE", help="A DeepSpeed JSON file, or the name of one in ds_configs/.")
@click.option("--micro-batch", type=click.IntRange(min=1), help="Sequences a rank runs at once; default the recipe's.")
@click.option("--mfu", type=float, help="Share of the device's peak; default what was measured there, else 0.45.")
@click.option("--images", type=click.IntRange(min=1), help="Training images; default ImageNet's 1,281,167.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.FIELD=VALUE", help="As in train; repeatable.")
@JSON
@mistakes_in_one_line
def plan(recipe: str, as_json: bool, **options: Any) -> None:
    """Predict what RECIPE needs on a cluster: memory a rank, step time, days, traffic, disk.  No GPU is needed.

    Exit 1 when the configuration as it is does not fit the device.

    \b
    Example:
      mirai-ds plan digits-mirai-e --set model.size=GPT-XL --nodes 2 --gpus 8 --device a100-80g
    """
    from mirai_ds.planning import plan as planning

    found = planning.make_plan(planning.Request(recipe, **options))
    if as_json:
        _print_json(planning.plan_json(found))
    else:
        _print(planning.render(found))
    sys.exit(0 if found.fits else 1)


def _print(parts: list[RenderableType]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, Text))  # sentences stay one line, for grep


def _print_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, indent=1, allow_nan=False))


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
