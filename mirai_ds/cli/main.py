"""`mirai-ds`: one verb for each thing a user does.  Heavy modules are imported inside the verb that needs them."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from mirai_ds.cli.analyse import map_, report
from mirai_ds.cli.bench import bench
from mirai_ds.cli.config import config
from mirai_ds.cli.errors import CONTEXT, mistakes_in_one_line
from mirai_ds.cli.evaluate import evaluate, reference
from mirai_ds.cli.extract import extract
from mirai_ds.cli.fetch import fetch
from mirai_ds.cli.new import new
from mirai_ds.cli.plan import flops, plan
from mirai_ds.cli.recipes import recipes, table
from mirai_ds.cli.reproduce import reproduce
from mirai_ds.cli.runs import compare, inspect
from mirai_ds.cli.sample import sample
from mirai_ds.cli.study import study
from mirai_ds.cli.submit import submit
from mirai_ds.train.options import TrainOptions, train_options
from mirai_ds.version import __version__


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="mirai-ds")
def main() -> None:
    """Train autoregressive image models with Mirai foresight alignment on DeepSpeed.

    \b
    mirai-ds new NAME --images DIR        a recipe for your own images
    mirai-ds extract codes --help         from images to tokens
    mirai-ds recipes list                 what can be trained
    mirai-ds train digits-mirai-e         train it here, on all devices
    mirai-ds sample runs/digits-mirai-e   draw images from it
    mirai-ds COMMAND --help               explains a command, with an example
    """


@main.command()
@train_options
@click.option(
    "--ranks",
    type=click.IntRange(min=1),
    help="Local ranks; default one a GPU (fewer where the batch cannot be shared), else launch.cpu_ranks.",
)
@mistakes_in_one_line
def train(options: TrainOptions, ranks: int | None) -> None:
    """Train RECIPE (a name from `recipes list`, or a .yaml file) on all local devices.

    Starts DeepSpeed's launcher itself.  Under deepspeed, torchrun or srun (one task a GPU) it is one of the ranks.

    \b
    Example:
      mirai-ds train digits-mirai-e --set train.epochs=10 --deepspeed ds_configs/zero1.json
      deepspeed --hostfile hosts --module mirai_ds.train recipe.yaml    the same on several nodes
    """
    from mirai_ds.checkpoint.store import check_run_folder
    from mirai_ds.config.deepspeed_file import ranks_that_fit, resolve
    from mirai_ds.config.errors import UserError
    from mirai_ds.config.load import load
    from mirai_ds.runs.outcome import VARIABLE, exit_code
    from mirai_ds.runs.outcome import read as read_outcome
    from mirai_ds.runtime.launch import launch, visible_gpus
    from mirai_ds.runtime.launcher import check_asked, recognise
    from mirai_ds.runtime.signals import STOP_FILE, STOP_FILE_VARIABLE

    if options.fresh and options.resume:
        raise UserError("--fresh and --resume: the one starts anew, the other continues; give one of them")
    found = recognise()
    check_asked(ranks, found)
    if found.world is not None:
        from mirai_ds.train.__main__ import run_rank

        run_rank(options)
        return
    config = load(options.recipe, options.overrides, options.deepspeed)
    gpus = visible_gpus()
    count = ranks or gpus or config.launch.cpu_ranks
    if gpus and not ranks:
        count, why = ranks_that_fit(config, gpus)
        if why:
            click.echo(f"mirai-ds: training on {count} of {gpus} GPUs: {why}", err=True)
    resolve(config, count, cpu=gpus == 0)  # mistakes are cheaper to hear of before ranks start
    run = options.run_dir or Path(config.output_dir) / config.name
    check_run_folder(run, options.resume, options.fresh)
    with tempfile.TemporaryDirectory(prefix="mirai-ds-") as private:  # this start's own: nobody else's run is touched
        stop, said = Path(private) / STOP_FILE, os.environ.setdefault(VARIABLE, f"{private}/outcome")
        os.environ[STOP_FILE_VARIABLE] = str(stop)
        code = launch("mirai_ds.train", options.arguments(), count, gpus, stop)
        outcome = read_outcome(Path(said))
    sys.exit(exit_code(outcome, code))


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File or, of hf, new folder to write.")
@click.option(
    "--format",
    "layout",
    type=click.Choice(["llamagen", "safetensors", "hf"]),
    help="Default by --out: .pt, .safetensors, or a folder.",
)
@click.option("--weights", type=click.Choice(["raw", "ema", "both"]), help="Default all that SOURCE has; of hf one.")
@click.option("--step", type=int, help="Checkpoint of this step; default the newest whole one.")
@click.option("--projectors", is_flag=True, help="Keep the alignment heads too (samplers do not need them).")
@click.option("--recipe", help="Of a weights file: what trained it; default as it says, or its shapes.")
@mistakes_in_one_line
def export(
    source: Path, out: Path, layout: str | None, weights: Any, step: int | None, projectors: bool, recipe: str | None
) -> None:  # fmt: skip
    """Write the weights of SOURCE, a run or a weights file, for others.

    llamagen: a .pt file that LlamaGen's own samplers load.  `both` puts raw weights under "model" and the average under
    "ema"; those samplers read "model", so use `--weights ema` to sample the average there.  safetensors: the same in
    such a file.  hf: a folder with configuration, weights and a model card filled from the run, which
    `mirai_ds.ImageModel.from_pretrained` loads and a model hub shows.  Weights are fp32 under LlamaGen's keys.

    \b
    Example:
      mirai-ds export runs/digits-mirai-e --weights ema --out digits.pt
      mirai-ds export runs/digits-mirai-e --format hf --out digits-mirai-e
    """
    from mirai_ds.config.errors import UserError

    endings = {"llamagen": (".pt", ".pth", ".bin"), "safetensors": (".safetensors",), "hf": ("",)}
    told = next((name for name, ends in endings.items() if out.suffix in ends), None)
    if layout is None and told is None:
        raise UserError(f"--out {out}: ends in {out.suffix}; write .pt, .safetensors, or --format hf for a folder")
    if layout not in (None, "hf", told):
        raise UserError(f"--format {layout}: writes {' or '.join(endings[str(layout)])}, --out is {out}")
    if (layout or told) != "hf":
        from mirai_ds.checkpoint.export import export_weights

        click.echo(export_weights(source, out, weights, step, projectors, recipe))
        return
    if weights == "both":
        raise UserError("--weights both: a folder holds one model; say raw or ema")
    from mirai_ds.library.export import export_folder

    click.echo(export_folder(source, out, weights, step, projectors, recipe))


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--tolerance", type=float, default=1e-5, show_default=True, help="Largest max|a-b| / max|b| of an array.")
@mistakes_in_one_line
def verify(files: tuple[Path, ...], tolerance: float) -> None:
    """Recompute reference vectors (.npz) with this model and objective; exit 1 when an array is off.

    \b
    Example:
      mirai-ds verify tests/fixtures/*.npz
    """
    from rich.console import Console

    from mirai_ds.selfcheck.check import render, verify_files

    results = verify_files(list(files), tolerance)
    Console(width=None if sys.stdout.isatty() else 120).print(render(results))
    sys.exit(0 if all(result.ok for result in results) else 1)


@main.command()
@click.option("--self-test/--no-self-test", default=None, help="Let every device compute too; default where GPUs are.")
@mistakes_in_one_line
def doctor(self_test: bool | None) -> None:
    """Check this machine: versions, devices, compilers, what will run; exit 1 when training cannot work.

    On GPUs a process each also multiplies, runs the alignment kernel beside its reference, meets the others and takes
    two training steps, in about twenty seconds.

    \b
    Example:
      mirai-ds doctor
    """
    from mirai_ds.selfcheck.doctor import examine

    lines, healthy = examine(self_test)
    click.echo("\n".join(lines))
    sys.exit(0 if healthy else 1)


main.add_command(bench)
main.add_command(config)
main.add_command(evaluate)
main.add_command(extract)
main.add_command(fetch)
main.add_command(compare)
main.add_command(flops)
main.add_command(inspect)
main.add_command(map_)
main.add_command(new)
main.add_command(plan)
main.add_command(reference)
main.add_command(report)
main.add_command(reproduce)
main.add_command(sample)
main.add_command(study)
main.add_command(submit)
main.add_command(recipes)
main.add_command(table)

if __name__ == "__main__":
    main()
