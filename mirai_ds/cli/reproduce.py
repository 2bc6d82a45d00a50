"""`mirai-ds reproduce`: a released model's published FID, from its files.  Heavy modules are imported inside."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import click

from mirai_ds.cli.errors import CONTEXT, mistakes_in_one_line

FILE = click.Path(path_type=Path)


@click.command(context_settings=CONTEXT)
@click.argument("name")
@click.option("--weights", type=FILE, required=True, help="The model's released file, e.g. c2i_B_256.pt.")
@click.option("--tokenizer", type=FILE, required=True, help="Its tokenizer's, e.g. vq_ds16_c2i.pt.")
@click.option("--reference", type=FILE, required=True, help="ADM's reference batch, VIRTUAL_imagenet256_labeled.npz.")
@click.option("--inception", type=FILE, required=True, help="The FID Inception network's weights; docs/evaluation.md.")
@click.option("--out", type=FILE, default=Path("reproduced"), show_default=True, help="Folder of samples and scores.")
@click.option(
    "--num", type=click.IntRange(min=2), default=50_000, show_default=True, help="Images; fewer: a rehearsal."
)
@click.option("--ranks", type=click.IntRange(min=1), help="Local ranks that draw; default one a GPU, else one.")
@click.option("--seed", type=int, default=0, show_default=True)
@mistakes_in_one_line
def reproduce(
    name: str, weights: Path, tokenizer: Path, reference: Path, inception: Path, out: Path, num: int,
    ranks: int | None, seed: int,
) -> None:  # fmt: skip
    """Draw 50,000 images of a released LlamaGen model, score them and compare with what its authors publish.

    NAME: llamagen-b-256, llamagen-b-384, llamagen-l-256, llamagen-l-384, llamagen-xl-384, llamagen-xxl-384 or
    llamagen-3b-384.  If the numbers agree, this installation's tokenizer, sampler and judge are right, and scores of
    your own models can be put beside published ones.  It prints the two commands that it runs; killed at any time, the
    same command goes on.  Exit 0: reproduced; 1: another number, or not comparable.

    \b
    Example:
      mirai-ds reproduce llamagen-b-256 --weights c2i_B_256.pt --tokenizer vq_ds16_c2i.pt \\
        --reference VIRTUAL_imagenet256_labeled.npz --inception pt_inception-2015-12-05-6726825d.pth
    """
    from mirai_ds.config.errors import UserError
    from mirai_ds.paper.released import EVALUATED_AT, check_weights, released, verdict

    row = released(name)
    for option, path in (("tokenizer", tokenizer), ("reference", reference), ("inception", inception)):
        if not path.is_file():
            raise UserError(
                f"--{option} {path}: no such file; docs/reproducing.md says where it is, `mirai-ds fetch` brings it"
            )
    check_weights(row, name, weights)
    samples, scores = out / f"{name}.npz", out / f"{name}-scores.json"
    draw = [
        "sample", weights, "--num", num, "--cfg", row.cfg_scale, "--seed", seed, "--tokenizer", tokenizer,
        "--image-size", row.image_size, "--image-size-eval", EVALUATED_AT, "--out", samples,
    ]  # fmt: skip
    _run([*draw, "--ranks", ranks] if ranks else draw)
    _run(["evaluate", samples, reference, "--weights", inception, "--cache", out / "features", "--json", scores])
    judged = verdict(name, json.loads(scores.read_text(encoding="utf-8")))
    click.echo("\n" + "\n".join(judged.lines()))
    sys.exit(0 if judged.reproduced else 1)


def _run(arguments: list[object]) -> None:
    """One of the verbs, as its user would give it; its failure is this command's."""
    words = [str(argument) for argument in arguments]
    click.echo(f"mirai-ds {shlex.join(words)}")
    sys.stdout.flush()
    code = subprocess.run([sys.executable, "-m", "mirai_ds", *words], check=False).returncode
    if code:
        sys.exit(code if code > 0 else 128 - code)
