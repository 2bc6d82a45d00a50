"""Uninterrupted runs, made once, that interrupted ones are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fault.faulty_ranks import run_ranks
from tests.once import once


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mirai-E, ZeRO-2, recompute every second block, dropout on: 24 steps without a fault."""

    def train(folder: Path) -> None:
        ended = run_ranks(folder / "whole")
        assert ended.codes == [0, 0], ended.out[-3000:]
        assert ended.outcome == "finished at step 24\n"

    return once(tmp_path_factory, "fault", train) / "whole"


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings that make the run Mirai-I with a small frozen encoder."""
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    torch.save(timm.create_model("test_vit", num_classes=0, img_size=128).state_dict(), path)
    watched = f"encoder: {{name: test_vit, weights: {path}}}"
    return [
        f"foresight={{method: mirai-i, projector_dim: 32, kernel: reference, {watched}}}",
        "train.max_steps=12", "train.recompute={policy: full}",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def whole_i(encoder: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same under Mirai-I, every block recomputed: 12 steps."""
    run = tmp_path_factory.mktemp("fault-i") / "whole"
    ended = run_ranks(run, settings=encoder, recipe="digits-baseline")
    assert ended.codes == [0, 0], ended.out[-3000:]
    return run
