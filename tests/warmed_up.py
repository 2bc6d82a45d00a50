"""Imported in the process that others are forked from (`tests/warm.py`), before the first of them: what each of them
would import, and what costs more the first time.  Nothing here may start a thread: after a fork it would be missing.
"""

from __future__ import annotations

import gc
import importlib
import io
import os

os.environ["DS_ACCELERATOR"] = "cpu"  # a GPU that was looked at could not be used after a fork

MODULES = [
    "torch", "deepspeed", "mirai_ds.train.session", "mirai_ds.train.hooks.registry",
    "mirai_ds.train.preflight", "sklearn.datasets", "torch.utils.tensorboard", "matplotlib.pyplot", "torchvision",
    "torch._dynamo", "timm", "deepspeed.runtime.zero.muon.muon_optimizer",  # the last brings torch's compiler along
    "mirai_ds.cli.main", "tests.fault.faulty_ranks", "tests.rank_pool", "tests.warm_start",
]  # fmt: skip
for name in MODULES:
    importlib.import_module(name)


def draw_once() -> None:
    """Fonts are looked for and renderers imported with the first figure."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    figure.subplots().plot([1, 2], label="a")
    figure.savefig(io.BytesIO(), format="png")


draw_once()
importlib.import_module("deepspeed.ops").__compatible_ops__  # noqa: B018 which of them could be compiled: 9 programs
# Cases, and ZeRO-3 itself, collect garbage; looking through a million objects of imported modules each time would be
# half of their time, and would copy the pages they are on.
gc.collect()
gc.freeze()
