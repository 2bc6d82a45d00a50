"""`mirai-ds extract ...`: from image files to stores.  Heavy modules are imported inside the verb that needs them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mirai_ds.cli.errors import CONTEXT, mistakes_in_one_line
from mirai_ds.cli.output import world_or_launch

if TYPE_CHECKING:
    from mirai_ds.extract import Options
    from mirai_ds.runtime.distributed import World

FOLDER = click.Path(path_type=Path)


def _views(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options on which views are cut."""
    for option in (
        click.option("--crop-range", type=click.FloatRange(min=1), default=1.1, show_default=True,
                     help="ten: the views are cut from SIZE * this."),
        click.option("--crops", type=click.Choice(["ten", "flip", "one"]), default="ten", show_default=True,
                     help="LlamaGen's ten crops, the centre and its mirror, or the centre."),
        click.option("--size", type=click.IntRange(min=1), required=True, help="Pixels a side of a view."),
    ):  # fmt: skip
        function = option(function)
    return function


UPRIGHT = click.option("--upright", is_flag=True, help="Turn photographs by their orientation tag; LlamaGen does not.")


def _running(most: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options on how the work is shared out."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in (
            click.option("--out", type=FOLDER, required=True, help="The store; an unfinished one is gone on with."),
            click.option("--split", type=click.Choice(["train", "t10k"]), help="Of idx files; default train."),
            click.option("--strict", is_flag=True, help="Stop at the first image that cannot be read."),
            click.option("--processes", type=click.IntRange(min=1), help="Default one a GPU, else one."),
            click.option("--workers", type=click.IntRange(min=1), help="Reading threads a process; default its cores."),
            click.option("--block", type=click.IntRange(min=1),
                         help=f"Images done whole or not at all, what a kill can cost; default a 64th up to {most}."),
            UPRIGHT,
        ):  # fmt: skip
            function = option(function)
        return function

    return add


@click.group(context_settings=CONTEXT)
def extract() -> None:
    """Make token and image stores from image files.

    IMAGES is a folder with one folder for each class (torchvision's ImageFolder), or one with the four idx files of
    MNIST or Fashion-MNIST.  Every command can be killed at any time and goes on when it is given again.
    """


@extract.command("codes")
@click.option("--images", type=FOLDER, required=True)
@click.option("--tokenizer", type=FOLDER, required=True, help="vq_ds16_c2i.pt or .safetensors; or a codebook (.npz).")
@_views
@_running(most=256)
@click.option("--precision", type=click.Choice(["fp32", "tf32", "bf16"]), default="fp32", show_default=True,
              help="Of the tokenizer; less than fp32 flips codes that are nearly ties.")  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Views encoded at once.")
@mistakes_in_one_line
def codes(tokenizer: Path, precision: str, batch: int, **options: Any) -> None:
    """Every view of every image through a tokenizer: a token store.

    \b
    Example:
      mirai-ds extract codes --images imagenet/train --tokenizer vq_ds16_c2i.pt --size 256 --out stores/codes-256
      srun --ntasks-per-node 8 mirai-ds extract codes ...        on many GPUs
    """
    world = world_or_launch("extract", options.pop("processes"))
    from mirai_ds.extract import extract_codes

    made = extract_codes(_options(options, world), world, tokenizer, precision, batch)
    if made is not None:
        content = f"{made.num_images} images x {made.num_views} views x {made.tokens_per_image} tokens"
        click.echo(f"{options['out']}: {content}; {_problems(made, options['out'])}")


@extract.command("images")
@click.option("--images", type=FOLDER, required=True)
@_views
@_running(most=1024)
@click.option("--format", "encoding", type=click.Choice(["webp", "png", "jpeg"]), default="webp", show_default=True,
              help="webp and png are lossless.")  # fmt: skip
@click.option("--quality", type=click.IntRange(1, 100), help="Of jpeg; default 95.")
@mistakes_in_one_line
def images(encoding: Any, quality: int | None, **options: Any) -> None:
    """The S x S crop of every image: an image store, for Mirai-I.  Give the same views as for the codes.

    \b
    Example:
      mirai-ds extract images --images imagenet/train --size 256 --out stores/images-256
    """
    world = world_or_launch("extract", options.pop("processes"))
    from mirai_ds.extract import extract_images

    made = extract_images(_options(options, world), world, encoding, quality)
    if made is not None:
        from mirai_ds.analysis.inspect_store import size_text

        content = f"{made.num_images} images, {size_text(sum(made.shard_bytes))}"
        click.echo(f"{options['out']}: {content}; {_problems(made, options['out'])}")


@extract.command("codebook")
@click.option("--images", type=FOLDER, required=True)
@click.option("--size", type=click.IntRange(min=1), required=True, help="Pixels a side.")
@click.option("--patch", type=click.IntRange(min=1), required=True, help="Pixels a side of a patch: one token.")
@click.option("--codes", type=click.IntRange(2, 65536), default=512, show_default=True)
@click.option("--channels", type=click.Choice(["1", "3"]), help="Default 1 where all images are grey.")
@click.option("--max-images", type=click.IntRange(min=1), default=5000, show_default=True, help="Images to learn from.")
@UPRIGHT
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--split", type=click.Choice(["train", "t10k"]), help="Of idx files; default train.")
@click.option("--out", type=FOLDER, required=True, help="File to write, .npz.")
@mistakes_in_one_line
def codebook(channels: str | None, **options: Any) -> None:
    """Learn a patch codebook by k-means: a tokenizer for small images.

    \b
    Example:
      mirai-ds extract codebook --images /usr/share/datasets/fashion-mnist --size 28 --patch 2 --out fashion.npz
    """
    from mirai_ds.extract.codebook import learn_codebook
    from mirai_ds.runtime.log import start_log

    start_log()
    click.echo(learn_codebook(channels=None if channels is None else int(channels), **options))


@extract.command("import-llamagen")
@click.argument("folder", type=FOLDER)
@click.option("--out", type=FOLDER, required=True, help="The store to write.")
@click.option(
    "--images", type=FOLDER, help="The folder that was extracted: gives names and classes (Mirai-I needs them)."
)
@click.option("--tokenizer", type=FOLDER, help="The tokenizer that was used, to have it recorded.")
@click.option("--size", type=click.IntRange(min=1), default=256, show_default=True, help="Pixels a side of a view.")
@click.option("--crops", type=click.Choice(["ten", "flip", "one"]), default="ten", show_default=True)
@click.option("--crop-range", type=click.FloatRange(min=1), default=1.1, show_default=True)
@click.option("--drop-padding", is_flag=True, help="Leave out the sampler's copies of the first images at the end.")
@click.option("--keep-duplicates", is_flag=True, help="Allow images with the same codes.")
@click.option("--workers", type=click.IntRange(min=1), default=16, show_default=True, help="Reading threads.")
@click.option("--block", type=click.IntRange(min=1), help="Images read whole or not at all.")
@mistakes_in_one_line
def import_llamagen(folder: Path, images: Path | None, tokenizer: Path | None, drop_padding: bool,
                    keep_duplicates: bool, **options: Any) -> None:  # fmt: skip
    """LlamaGen's `..._codes/<i>.npy` and `..._labels/<i>.npy` in FOLDER: a token store.  Holes and copies are refused.

    \b
    Example:
      mirai-ds extract import-llamagen imagenet_code_c2i_flip_ten_crop --out stores/codes-256 --drop-padding
    """
    from mirai_ds.extract import Options
    from mirai_ds.extract.llamagen import Import, import_llamagen
    from mirai_ds.runtime.log import start_log

    start_log()
    request = Import(folder, Options(images=folder, **options), images, tokenizer, drop_padding, keep_duplicates)
    made = import_llamagen(request)
    content = f"{made.num_images} images x {made.num_views} views x {made.tokens_per_image} tokens"
    click.echo(f"{options['out']}: {content}")


def _options(options: dict[str, Any], world: World) -> Options:
    from mirai_ds.extract import Options

    if options["workers"] is None:
        options["workers"] = max(1, len(os.sched_getaffinity(0)) // world.local_size)
    return Options(**options)


def _problems(made: Any, out: Path) -> str:
    if not made.failed and not made.converted:
        return "no problems"
    from mirai_ds.data.image_sets import TAG
    from mirai_ds.data.stores.files import PROBLEMS

    lying = (out / PROBLEMS).read_text(encoding="utf-8").count(f"not turned by {TAG}")
    turn = f" ({lying} lie turned: --upright turns them)" if lying else ""
    return f"{made.failed} could not be read, {made.converted} were converted{turn}: see problems.jsonl"


if __name__ == "__main__":  # one rank, under any launcher
    extract(prog_name="python -m mirai_ds.cli.extract")
