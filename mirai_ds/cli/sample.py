"""`mirai-ds sample`: a grid to look at, or a file of many images for evaluators.  Heavy modules are imported inside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from mirai_ds.cli.errors import CONTEXT, mistakes_in_one_line
from mirai_ds.cli.output import world_or_launch

FILE = click.Path(path_type=Path)
SWITCH = click.Choice(["auto", "on", "off"])
# Options that mean something in one of the two modes only.
GRID_ONLY = ("per_class",)
NUM_ONLY = ("policy", "image_size", "image_size_eval", "precision", "batch", "compile", "cuda_graphs", "png", "ranks",
            "stall_timeout", "patience")  # fmt: skip


def _many(function: Callable[..., Any]) -> Callable[..., Any]:
    """Options of --num."""
    for option in (
        click.option("--patience", type=click.FloatRange(min=1), hidden=True),  # what --stall-timeout was called
        click.option("--stall-timeout", type=click.FloatRange(min=1), default=300.0, show_default=True,
                     help="Seconds without a heartbeat of the other ranks, after which rank 0 gives up."),
        click.option("--ranks", type=click.IntRange(min=1), help="Local ranks; default one a GPU, else one."),
        click.option("--png", is_flag=True, help="Also one PNG an image, numbered, in a folder."),
        click.option("--cuda-graphs", type=SWITCH, default="auto", show_default=True, help="auto: on GPUs."),
        click.option("--compile", type=SWITCH, default="auto", show_default=True,
                     help="torch.compile of the step; auto: on GPUs."),
        click.option("--batch", type=click.IntRange(min=1), help="Images at a time; default 64 on GPUs, 16 on CPUs."),
        click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Default bf16 on GPUs, fp32 on CPUs."),
        click.option("--image-size-eval", type=click.IntRange(min=1), help="Resize to this, bicubically; e.g. 256."),
        click.option("--image-size", type=click.IntRange(min=1), help="Pixels the tokens decode to; e.g. 384."),
        click.option("--policy", type=click.Choice(["random", "balanced"]), default="random", show_default=True,
                     help="random: each class as likely; balanced: each as often."),
        # torchrun and deepspeed take `--num` for the beginning of an option of theirs, wherever it stands.
        click.option("--num", "--num-images", "num", type=click.IntRange(min=1),
                     help="Draw so many into one .npz, on all ranks."),
    ):  # fmt: skip
        function = option(function)
    return function


@click.command(context_settings=CONTEXT)
@click.argument("source", type=FILE)
@_many
@click.option("--out", type=FILE, help="Output folder, with --num an .npz file; default below SOURCE or ./samples.")
@click.option("--per-class", type=click.IntRange(min=1), help="Images of each class; default the run's.")
@click.option("--classes", metavar="0,3,7", help="Classes to draw; default the run's, with --num all.")
@click.option("--weights", type=click.Choice(["raw", "ema"]), help="Default the run's (ema), else what a file has.")
@click.option("--step", type=int, help="Checkpoint of this step; default the newest whole one.")
@click.option("--cfg", "cfg_scale", type=float, help="Guidance scale; 1 = none.")
@click.option("--cfg-interval", type=int, help="Guide decode steps 0..N only; -1 = all.")
@click.option("--temperature", type=float)
@click.option("--top-k", type=int, help="0 = off.")
@click.option("--top-p", type=float, help="1 = off.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--tokenizer", type=FILE, help="Its file, to show tokens of any run as pictures.")
@click.option("--recipe", help="Of a weights file: what trained it; default as it says, or its shapes.")
@click.option("--block-size", type=click.IntRange(min=1), help="Tokens an image, where a file says none; default 256.")
@click.option("--local_rank", "--local-rank", type=int, hidden=True, expose_value=False)  # from the deepspeed command
@mistakes_in_one_line
def sample(source: Path, num: int | None, ranks: int | None, patience: float | None, **options: Any) -> None:
    """Draw images from SOURCE: a run folder, an export, or a released LlamaGen file.

    A few, to look at: writes tokens.npz (tokens, labels, and images where the data can decode them) and grid.png.
    With --num many, on all GPUs: an .npz with arr_0 as ADM's evaluator reads it, its protocol, labels and tokens, a
    contact sheet.  Image i depends on the seed and i alone; killed at any time, the same command goes on.

    \b
    Example:
      mirai-ds sample runs/digits-mirai-e --cfg 1.5 --per-class 4 --out /tmp/digits
      mirai-ds sample runs/mine --num 50000 --cfg 2.0 --tokenizer vq_ds16_c2i.pt --out mine.npz
      srun --ntasks-per-node 8 mirai-ds sample runs/mine --num 50000 ...        on several nodes
      torchrun --nproc-per-node 8 -m mirai_ds.cli.sample runs/mine --num-images 50000 ...
    """
    _check_mode(num is not None)
    if num is None:
        _grid(source, options)
        return
    world = world_or_launch("sample", ranks)
    from mirai_ds.sampling import SamplingRequest, draw_archive

    del options["per_class"]
    if patience is not None:
        options["stall_timeout"] = _renamed_patience(patience, world.rank)
    said = draw_archive(SamplingRequest(source, num, **options), world)
    if said is not None:
        click.echo(said)


def _grid(source: Path, options: dict[str, Any]) -> None:
    """One process draws it, whoever started how many."""
    from mirai_ds.runtime.distributed import read_world
    from mirai_ds.sampling.grid import sample_to_folder

    world = read_world()
    if world is None or world.rank == 0:
        click.echo(sample_to_folder(source, **{k: v for k, v in options.items() if k not in NUM_ONLY}))


def _given(name: str) -> bool:
    """Whether the user wrote this option."""
    return click.get_current_context().get_parameter_source(name) == ParameterSource.COMMANDLINE


def _check_mode(many: bool) -> None:
    from mirai_ds.config.errors import UserError

    for name in GRID_ONLY if many else NUM_ONLY:
        if _given(name):
            where = "with --num; --classes and --policy choose labels" if many else "without --num"
            raise UserError(f"--{name.replace('_', '-')}: has no meaning {where}")


def _renamed_patience(seconds: float, rank: int) -> float:
    """--patience is --stall-timeout under the name of an earlier version; rank 0 says so."""
    from mirai_ds.config.errors import UserError

    if _given("stall_timeout"):
        raise UserError("--patience and --stall-timeout: are the old and the new name of one option; keep the new one")
    if rank == 0:
        click.echo("mirai-ds: --patience is now --stall-timeout; the old name still works", err=True)
    return seconds


# One rank, under any launcher: the deepspeed command puts --local_rank right after the module.
if __name__ == "__main__":
    sample(prog_name="python -m mirai_ds.cli.sample")
