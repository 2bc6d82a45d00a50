"""Shared by the tests of encoders."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of timm's test_vit for 64 pixels."""
    from tests.foresight.test_encoders import make_encoder

    path = tmp_path_factory.mktemp("encoder") / "weights.safetensors"
    save_file(make_encoder("test_vit", img_size=64).state_dict(), path)
    return path
