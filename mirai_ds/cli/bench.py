"""`mirai-ds bench`: measurements, each as ratios within one run, printed as a table and appended to a CSV file."""

from __future__ import annotations

import importlib
import sys

import click

from mirai_ds.cli.errors import CONTEXT, mistakes_in_one_line

BENCHMARKS = {
    "step": "The training step against a plain baseline: time, parts, memory.",
    "sampling": "Images a second against loops without and with a plain cache.",
    "data": "Extraction and loading against the peers' way.",
    "safety": "What guards and checkpoints cost, the stall of a save among it.",
    "startup": "From `mirai-ds train` to the first step.",
    "memory": "Peak memory of real steps beside what `plan` says.",
    "kernels": "Fused operations against eager and compiled PyTorch.",
    "traffic": "What else of a step is memory traffic.",
}


@click.group(context_settings=CONTEXT)
def bench() -> None:
    """Measure this machine: time and memory as ratios, both sides in one run.

    \b
    Example:
      mirai-ds bench step                      baseline, Mirai-E, two ranks
      mirai-ds bench step switches --batch 8   one switch at a time
      mirai-ds bench sampling --help           each has options of its own
    """


def _add(name: str, text: str) -> None:
    @bench.command(name, help=text, context_settings={"ignore_unknown_options": True, "help_option_names": []})
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    @mistakes_in_one_line
    def run(arguments: tuple[str, ...]) -> None:
        sys.exit(importlib.import_module(f"mirai_ds.benchmarks.{name}").main(list(arguments)))


for _name, _text in BENCHMARKS.items():
    _add(_name, _text)
