"""`mirai-ds flops` and `plan`: what a recipe will cost.  Heavy modules are imported inside the verbs."""

from __future__ import annotations

import sys
from typing import Any

import click

from mirai_ds.cli.errors import CONTEXT, mistakes_in_one_line
from mirai_ds.cli.output import JSON, METHODS, print_json, print_parts


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
        print_json(costs.costs_json(rows))
    else:
        print_parts(costs.render(rows))


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

    predicted = planning.make_plan(planning.PlanRequest(recipe, **options))
    if as_json:
        print_json(planning.plan_json(predicted))
    else:
        from mirai_ds.planning.plan_report import render

        print_parts(render(predicted))
    sys.exit(0 if predicted.fits else 1)
