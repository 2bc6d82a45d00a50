"""An Inception weights file with random values: the network's shapes and names, nothing of its knowledge."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mirai_ds.eval.metrics.inception import InceptionFeatures, InceptionNetwork

torch.set_num_threads(1)  # on small tensors two threads mostly wait for each other


def random_state() -> dict[str, Tensor]:
    """Values that keep activations near 1 through all layers; no counters, as the published file may have none."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in InceptionNetwork().state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        if key.endswith("num_batches_tracked"):
            continue
        if key.endswith(("running_var", "bn.weight")):
            state[key] = torch.rand(shape, generator=generator) * 0.5 + 0.5
        elif len(shape) < 2:
            state[key] = torch.randn(shape, generator=generator) * 0.1
        else:
            state[key] = torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))
    return state


@pytest.fixture(scope="session")
def inception_state() -> dict[str, Tensor]:
    return random_state()


@pytest.fixture(scope="session")
def inception_file(inception_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(inception_state, path)
    return path


@pytest.fixture(scope="session")
def inception(inception_file: Path) -> InceptionFeatures:
    return InceptionFeatures(inception_file, torch.device("cpu"))
