"""`mirai-ds evaluate`: scores of generated images.  Heavy modules are imported inside the verb."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mirai_ds.cli.errors import CONTEXT, mistakes_in_one_line

if TYPE_CHECKING:
    import torch

    from mirai_ds.eval.features import FeatureNetwork

FILE = click.Path(path_type=Path)


@click.command(context_settings=CONTEXT)
@click.argument("samples", type=FILE)
@click.argument("reference", type=FILE)
@click.option("--weights", type=FILE, metavar="FILE", help="The FID Inception network's weights; docs/evaluation.md.")
@click.option("--features", metavar="timm:NAME:FILE", help="A timm network instead, with its weights from FILE.")
@click.option("--metrics", metavar="fid,sfid,is,pr", help="Default all that network and reference allow.")
@click.option("--exact-pr", is_flag=True, help="Precision and recall in fp64, not in ADM's fp16.")
@click.option("--cache", type=FILE, metavar="DIR", help="Keep features here: a reference is computed once.")
@click.option("--json", "json_file", type=FILE, metavar="FILE", help="Also write the scores and protocol here.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="ADM's is 64.")
@click.option("--tf32", is_flag=True, help="Allow TF32 in the network: faster, other last digits.")
@mistakes_in_one_line
def evaluate(
    samples: Path, reference: Path, weights: Path | None, features: str | None, metrics: str | None, exact_pr: bool,
    cache: Path | None, json_file: Path | None, device: str, batch_size: int, tf32: bool,
) -> None:  # fmt: skip
    """FID, sFID, Inception Score, precision and recall of SAMPLES against REFERENCE, as ADM's evaluator has them.

    SAMPLES is an .npz with arr_0 (uint8, n x height x width x 3) or a folder of images.  REFERENCE is ADM's reference
    .npz (its stored statistics are used), one of `mirai-ds reference`, or anything SAMPLES can be; a folder or a store
    of your images is brought to the samples' size.  The whole protocol is printed with the scores, and what makes them
    differ from published ones.

    \b
    Example:
      mirai-ds evaluate samples.npz VIRTUAL_imagenet256_labeled.npz --weights pt_inception-2015-12-05-6726825d.pth
      mirai-ds evaluate samples.npz stores/mine --features timm:resnet18.a1_in1k:resnet18.safetensors
    """
    from mirai_ds.eval.evaluation import EvaluationRequest, all_metrics, evaluate_files
    from mirai_ds.eval.report import render, write_json

    asked = all_metrics(metrics)
    write = None if json_file is None else write_json(json_file, (samples, reference))
    place = _device(device)
    network = _network(weights, features, place, tf32)
    request = EvaluationRequest(samples, reference, asked, "exact" if exact_pr else None, cache, batch_size)
    row = evaluate_files(request, network, _progress)
    click.echo(render(row))
    if write is not None:
        write(row)
        click.echo(f"\n{json_file}: written")


@click.command(context_settings=CONTEXT)
@click.argument("source", type=FILE)
@click.option("--out", type=FILE, required=True, metavar="FILE.npz", help="File to write; never overwritten.")
@click.option("--weights", type=FILE, metavar="FILE", help="The FID Inception network's, for mu and sigma.")
@click.option("--size", type=click.IntRange(min=1), help="Pixels a side; default the store's, or what all images have.")
@click.option("--images", "most", type=click.IntRange(min=2), default=10_000, show_default=True,
              help="Images to keep for precision and recall; statistics are of all.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@mistakes_in_one_line
def reference(source: Path, out: Path, weights: Path | None, size: int | None, most: int, device: str) -> None:
    """Make a reference file in ADM's layout (arr_0, mu, sigma, mu_s, sigma_s) of SOURCE, a store or a folder of images.

    `mirai-ds evaluate` takes it as REFERENCE.  Without --weights it holds images only, and they are evaluated.

    \b
    Example:
      mirai-ds reference stores/mine --out ref.npz --weights pt_inception-2015-12-05-6726825d.pth
    """
    from mirai_ds.eval.make_reference import make_reference
    from mirai_ds.eval.metrics.inception import InceptionFeatures
    from mirai_ds.runtime.log import start_log

    start_log()
    network = None if weights is None else InceptionFeatures(weights, _device(device))
    click.echo(make_reference(source, out, size, network, most, _progress))


def _network(weights: Path | None, features: str | None, device: torch.device, tf32: bool) -> FeatureNetwork:
    from mirai_ds.config import UserError
    from mirai_ds.eval.metrics.inception import WHERE, InceptionFeatures

    if features is None:
        if weights is None:
            raise UserError(f"--weights: give the Inception network's weights ({WHERE}), or use --features")
        return InceptionFeatures(weights, device, tf32)
    if weights is not None:
        raise UserError("--weights and --features: the one is Inception, the other another network; give one of them")
    kind, _, rest = features.partition(":")
    name, _, file = rest.partition(":")
    if kind != "timm" or not name or not file:
        raise UserError(f"--features {features}: write timm:NAME:FILE, e.g. timm:resnet18:weights.safetensors")
    from mirai_ds.eval.timm_features import PooledFeatures

    return PooledFeatures(name, Path(file), device, tf32)


def _device(name: str) -> torch.device:
    import torch

    from mirai_ds.config import UserError

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: use auto, cpu, cuda or cuda:N") from None
    count = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"--device {name}: this machine has {count} CUDA devices; use cpu" if not count else
                        f"--device {name}: this machine has cuda:0 to cuda:{count - 1}")  # fmt: skip
    return device


def _progress(title: str, total: int) -> Callable[[int], None]:
    """A line on stderr, rewritten on a terminal only."""
    import sys
    import time

    done, begun, shown = 0, time.monotonic(), 0.0

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        now = time.monotonic()
        if done < total and now - shown < (1 if sys.stderr.isatty() else 30):
            return
        shown = now
        line = f"{title}: {done} of {total} images, {done / max(now - begun, 1e-9):.1f} images/s"
        click.echo(f"\r{line}" if sys.stderr.isatty() else line, err=True, nl=not sys.stderr.isatty() or done >= total)

    return advance
