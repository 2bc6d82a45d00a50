"""A tiny model's weights file with its recipe, and a codebook that shows its 4 x 4 tokens as 8 x 8 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mirai_ds.checkpoint.llamagen import write_llamagen
from mirai_ds.config import ModelConfig
from mirai_ds.model import GPT
from mirai_ds.runtime.distributed import World
from mirai_ds.sampling import SamplingRequest
from mirai_ds.tokenizer import PatchCodebook
from tests.model import plain_gpt as plain

# One of two ranks of a machine: a rank alone would take all cores, whose threads wait for each other on small tensors.
ALONE = World(0, 0, 1, 2)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights.pt, recipe.yaml and book.npz."""
    folder = tmp_path_factory.mktemp("tiny")
    model = GPT(ModelConfig(size="custom", **plain.TINY))
    weights = plain.ruled({k: tuple(v.shape) for k, v in model.state_dict().items()}, seed=5)
    weights["output.weight"] *= 3.0
    write_llamagen(folder / "weights.pt", weights, {k: v + 0.01 for k, v in weights.items()}, steps=7)
    fields = ", ".join(f"{name}: {value}" for name, value in plain.TINY.items())
    (folder / "recipe.yaml").write_text(f"name: tiny\nmodel: {{size: custom, {fields}}}\ndata: {{source: digits}}\n")
    patches = np.random.default_rng(0).integers(0, 256, (48, 2, 2, 3), dtype=np.uint8)
    PatchCodebook(patches).save(folder / "book.npz")
    return folder


def request_of(tiny: Path, out: Path, **others: Any) -> SamplingRequest:
    """21 images in batches of 4."""
    files = {"source": tiny / "weights.pt", "recipe": str(tiny / "recipe.yaml"), "tokenizer": tiny / "book.npz"}
    return SamplingRequest(**{**files, "out": out, "num": 21, "batch": 4, "cfg_scale": 2.0, **others})


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
