"""`mirai-ds submit`: a Slurm job from a recipe.  Heavy modules are imported inside the verb that needs them."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mirai_ds.cli.errors import CONTEXT, mistakes_in_one_line

if TYPE_CHECKING:
    from mirai_ds.submit import SlurmJob

TEMPLATES = ["train", "array", "extract", "sample_evaluate", "smoke"]


@click.command(context_settings=CONTEXT)
@click.argument("recipe")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.option("--template", type=click.Choice(TEMPLATES), default="train", show_default=True)
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--gpus-per-node", type=click.IntRange(min=0), help="Default all that the cluster file says; one rank each."
)
@click.option("--time", metavar="H:MM:SS", help="Time limit, also D-HH:MM:SS; a run may take many, it is requeued.")
@click.option("--partition", metavar="NAME")
@click.option("--account", metavar="NAME")
@click.option("--qos", metavar="NAME")
@click.option("--constraint", metavar="FEATURE", help="Features of the nodes, as Slurm writes them.")
@click.option("--cluster", metavar="FILE|a100", default="a100", show_default=True, help="What this site has otherwise.")
@click.option(
    "--set", "overrides", multiple=True, metavar="SECTION.FIELD=VALUE", help="Override one field; repeatable."
)
@click.option("--deepspeed", metavar="FILE", help="A DeepSpeed JSON file, or the name of one in ds_configs/.")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Run folder; default OUTPUT_DIR/NAME of the recipe.")
@click.option("--name", metavar="NAME", help="The job's name; default the recipe's.")
@click.option("--chain", type=click.IntRange(min=1), default=1, show_default=True,
              help="Jobs one after the other, for sites that do not requeue; each resumes.")  # fmt: skip
@click.option("--dependency", metavar="afterok:ID", help="Start after other jobs; cancelled when that cannot be.")
@click.option("--at-once", type=click.IntRange(min=1), help="array: tasks that run at the same time.")
@click.option("--reference", type=click.Path(path_type=Path), help="sample_evaluate: ADM's .npz to compare with.")
@click.option("--inception", type=click.Path(path_type=Path), help="sample_evaluate: weights of its network.")
@click.option("--container", metavar="IMAGE", help="Run in an image: a .sif or .sqsh file, or docker://NAME.")
@click.option("--container-runtime", type=click.Choice(["apptainer", "singularity", "pyxis"]),
              help="What runs the image; default the cluster file's container_runtime.")  # fmt: skip
@click.option("--no-check", "check", flag_value=False, default=True,
              help="Do not look for files: only compute nodes see them, or an earlier job makes them.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Show the script and submit nothing; needs no Slurm.")
@mistakes_in_one_line
def submit(dry_run: bool, **options: Any) -> None:
    """Submit RECIPE to Slurm; it is requeued and resumed until it is finished.

    \b
    Other templates:
      array            RECIPE is a list: a recipe with its --set options a line, one run each
      extract          RECIPE is codes or images; after -- the options of `mirai-ds extract`
      sample_evaluate  RECIPE is a run; after -- the options of `mirai-ds sample`, with --num on all ranks
      smoke            a short run, killed, resumed and compared: the first thing on a new cluster

    \b
    Example:
      mirai-ds submit digits-mirai-e --template smoke --nodes 2 --time 0:30:00 --partition gpu
      mirai-ds submit mine.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 --partition gpu --account me
      mirai-ds submit codes --template extract --nodes 2 -- --images in/train --tokenizer vq.pt --size 256 --out codes
    """
    from mirai_ds.submit import SubmitOptions, plan, read_cluster, render, send
    from mirai_ds.submit.send import script_path

    asked = SubmitOptions(**options)
    cluster = read_cluster(asked.cluster)
    job = plan(asked, cluster)
    script = script_path(job)
    text = render(job, cluster, script)
    _show(text)
    if dry_run:
        click.echo("mirai-ds: nothing was written or submitted (--dry-run)", err=True)
        return
    _report(job, script, send(job, script, text))


def _show(text: str) -> None:
    """Coloured on a terminal, as it is elsewhere."""
    if not sys.stdout.isatty():
        click.echo(text, nl=False)
        return
    from rich.console import Console
    from rich.syntax import Syntax

    Console().print(Syntax(text, "bash", theme="ansi_dark", background_color="default"))


def _report(job: SlurmJob, script: Path, ids: list[str]) -> None:
    from mirai_ds.submit.send import log_path

    lines = [f"job {' -> '.join(ids)}: {job.name}, {job.nodes} x {job.ranks_per_node} ranks, {job.time} each start"]
    lines += [f"script  {shlex.quote(str(script))}", f"log     tail -F {log_path(job, ids[0])}"]
    if job.template in ("train", "array", "smoke"):
        below = job.folder if len(job.tasks) == 1 else str(Path(job.tasks[0].run_dir).parent)
        lines.append(f"curves  tensorboard --logdir {shlex.quote(below)}")
    if job.evaluate:
        lines.append(f"scores  {shlex.quote(job.evaluate[-1])}")
    lines += [f"watch   squeue --jobs {','.join(ids)}", f"stop    scancel {' '.join(ids)}"]
    click.echo("\n".join(lines), err=False)
