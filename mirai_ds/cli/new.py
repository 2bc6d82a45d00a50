"""`mirai-ds new`: a recipe for one's own images.  Heavy modules are imported inside the verb."""

from __future__ import annotations

from pathlib import Path

import click

from mirai_ds.cli.errors import CONTEXT, mistakes_in_one_line
from mirai_ds.cli.output import PATH


@click.command(context_settings=CONTEXT)
@click.argument("name")
@click.option("--images", type=PATH, required=True, help="A folder of images, of class folders, or of idx files.")
@click.option(
    "--tokenizer", type=PATH, metavar="FILE", help="vq_ds16_c2i.pt or another; default a codebook of patches."
)
@click.option("--size", type=click.IntRange(min=1), help="Pixels a side; default by the images and this machine.")
@click.option("--hours", type=click.FloatRange(min=0, min_open=True), help="What training may take; default 1.")
@click.option("--steps", type=click.IntRange(min=1), help="Its length instead.")
@mistakes_in_one_line
def new(
    name: str, images: Path, tokenizer: Path | None, size: int | None, hours: float | None, steps: int | None
) -> None:
    """Write a recipe NAME.yaml for a folder of images, say what was chosen and why, and which commands are next.

    Without --tokenizer a codebook of pixel patches is learned and written too (NAME.codebook.npz).  Nothing is ever
    overwritten.

    \b
    Example:
      mirai-ds new my-run --images photographs
      mirai-ds new my-run --images imagenet/train --tokenizer vq_ds16_c2i.pt --hours 24
    """
    from mirai_ds.config import UserError
    from mirai_ds.proposal.new import new_run
    from mirai_ds.runtime.log import start_log

    if hours is not None and steps is not None:
        raise UserError("--hours and --steps: both say how long training is; give one of them")
    start_log()
    click.echo(new_run(name, images, tokenizer, size, hours, steps))
