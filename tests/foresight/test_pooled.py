"""A timm network as a judge: its pooled features are timm's own, its file must be exactly its, nothing is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mirai_ds.eval.timm_features import PooledFeatures
from tests.one_line import one_line

NAME = "resnet10t"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of ten classes with random values, as training one on Fashion-MNIST leaves it."""
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "resnet10t.pth"
    torch.save({"state_dict": timm.create_model(NAME, num_classes=10).state_dict()}, path)
    return path


def test_features_are_timms(weights: Path) -> None:
    """Resized to the model's side with antialias, its mean and std, and the input of its classifier."""
    import timm

    judge = PooledFeatures(NAME, weights, CPU)
    images = torch.randint(0, 256, (2, 28, 30, 3), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    pooled, spatial = judge.features(images)
    model = timm.create_model(NAME, num_classes=10)
    model.load_state_dict(torch.load(weights, weights_only=True)["state_dict"])
    config = timm.data.resolve_model_data_config(model)
    x = F.interpolate(images.permute(0, 3, 1, 2) / 255.0, (176, 176), mode="bicubic", antialias=True).clamp(0, 1)
    x = (x - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)
    model.eval()
    with torch.inference_mode():
        wanted = model.forward_head(model.forward_features(x), pre_logits=True)
    assert spatial is None
    assert pooled.shape == (2, 512)
    torch.testing.assert_close(pooled, wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(pooled[0], pooled[1], rtol=1e-3)
    facts = judge.facts()
    assert (facts["network"], facts["input"], facts["interpolation"]) == ("timm:resnet10t", 176, "bicubic")
    assert facts["sha256"] == judge.digest


def test_no_random_number_is_drawn(weights: Path) -> None:
    before = torch.get_rng_state()
    PooledFeatures(NAME, weights, CPU).features(torch.zeros(1, 28, 28, 3, dtype=torch.uint8))
    assert torch.equal(torch.get_rng_state(), before)


def test_names_and_files_that_do_not_fit(weights: Path, tmp_path: Path) -> None:
    one_line(lambda: PooledFeatures("resnet10", weights, CPU), "--features timm:resnet10", "no such model")
    one_line(lambda: PooledFeatures("resnet10t.none", weights, CPU), "no such weights", "did you mean 'resnet10t'")
    one_line(lambda: PooledFeatures("resnet14t", weights, CPU), "timm:resnet14t", "resnet10t.pth", "lacks")
    one_line(lambda: PooledFeatures(NAME, tmp_path / "none.pth", CPU), "none.pth", "no such file")
    state = torch.load(weights, weights_only=True)["state_dict"]
    torch.save(state | {"layer9.weight": torch.zeros(1)}, tmp_path / "more.pth")
    one_line(lambda: PooledFeatures(NAME, tmp_path / "more.pth", CPU), "holds 1 tensors", "layer9.weight")
