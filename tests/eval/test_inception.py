"""The network with random weights: which layer gives what, whose files it takes, what it leaves alone."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mirai_ds.eval.metrics.inception import InceptionFeatures, load_inception
from tests.one_line import one_line


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Three images of other sides than the network's, with structure and noise."""
    noise = torch.randint(0, 256, (3, 40, 56, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    noise[1, 5:20] = 255
    noise[2, :, 10:30] = 0
    return noise


@pytest.fixture(scope="module")
def found(inception: InceptionFeatures, images: Tensor) -> tuple[Tensor, Tensor]:
    return inception.features(images)


def test_it_is_the_network_that_torch_fidelity_has(
    inception: InceptionFeatures, images: Tensor, found: tuple[Tensor, Tensor]
) -> None:
    """Its own extractor, with its own resize and forward pass, on the same values: the same features and classes."""
    from torch_fidelity import FeatureExtractorInceptionV3

    buffer = io.BytesIO()
    torch.save(inception.network.state_dict(), buffer)
    buffer.seek(0)
    other = FeatureExtractorInceptionV3("other", ["2048", "logits_unbiased"], feature_extractor_weights_path=buffer)
    pooled, logits = other(images.permute(0, 3, 1, 2))
    torch.testing.assert_close(found[0], pooled, rtol=1e-5, atol=1e-6)
    assert found[0].std(dim=0).mean() > 1e-3  # images differ, so equality says something
    ours = inception.probabilities(found[0].numpy())
    np.testing.assert_allclose(ours, logits.softmax(dim=1).numpy(), rtol=1e-4)
    biased = (logits + other.fc.bias).softmax(dim=1).numpy()
    assert not np.allclose(ours, biased, rtol=1e-2)
    assert list(other.state_dict()) == list(inception.network.state_dict())


def test_spatial_features_are_of_mixed_6d(
    inception: InceptionFeatures, images: Tensor, found: tuple[Tensor, Tensor]
) -> None:
    """The 1x1 branch of Mixed_6d as it is within a plain pass, its first 7 channels by rows, columns, channels."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name in ("Mixed_6c", "Mixed_6d", "Mixed_6e"):
        branch = getattr(inception.network, name).branch1x1
        keep = lambda module, args, output, name=name: seen.setdefault(name, output.clone())  # noqa: E731
        handles.append(branch.register_forward_hook(keep))
    inception.features(images)
    for handle in handles:
        handle.remove()
    assert {tensor.shape for tensor in seen.values()} == {(3, 192, 17, 17)}
    wanted = np.zeros((3, 17 * 17 * 7), np.float32)
    for row in range(17):
        for column in range(17):
            for channel in range(7):
                wanted[:, (row * 17 + column) * 7 + channel] = seen["Mixed_6d"][:, channel, row, column]
    np.testing.assert_array_equal(found[1].numpy(), wanted)
    assert found[1].min() == 0  # after the ReLU
    for name in ("Mixed_6c", "Mixed_6e"):
        assert not np.array_equal(seen[name][:, :7].permute(0, 2, 3, 1).reshape(3, -1).numpy(), wanted)


def test_batches_do_not_show(inception: InceptionFeatures, images: Tensor, found: tuple[Tensor, Tensor]) -> None:
    """Kernels may choose another order of sums for another batch: 1e-5 of features near 1."""
    alone = [inception.features(images[i : i + 1]) for i in range(3)]
    for part in (0, 1):
        torch.testing.assert_close(torch.cat([f[part] for f in alone]), found[part], rtol=1e-4, atol=1e-5)


def test_training_is_left_alone(inception_file: Path, inception: InceptionFeatures, images: Tensor) -> None:
    """No random number is drawn, autocast and precision switches of the caller neither act nor change."""
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    load_inception(inception_file)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            within = inception.features(images[:1])[0]
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert within.dtype == torch.float32
    assert torch.equal(within, inception.features(images[:1])[0])
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_file_gives_its_network(
    inception: InceptionFeatures, inception_state: dict[str, Tensor], tmp_path: Path
) -> None:
    """A torch file without the counters that older torch did not have, and .safetensors with them."""
    from safetensors.torch import save_file

    counters = {key: torch.tensor(7) for key in inception.network.state_dict() if key.endswith("num_batches_tracked")}
    save_file(inception_state | counters, tmp_path / "a.safetensors")
    for network in (inception.network, load_inception(tmp_path / "a.safetensors")):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert len(network.state_dict()) == len(inception_state) + len(counters)
        for key, value in inception_state.items():
            assert torch.equal(network.state_dict()[key], value), key


def changed(state: dict[str, Tensor], **values: Tensor | None) -> dict[str, Tensor]:
    """`state` with one value for each tensor, which makes a small file, and with `values`."""
    names = {key.replace("__", "."): value for key, value in values.items()}
    small = {key: torch.ones(1).expand(value.shape) for key, value in state.items()}
    return {key: value for key, value in (small | names).items() if value is not None}


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"Mixed_6d__branch1x1__bn__running_var": None}, "lacks 1 of"),
        ({"extra__weight": torch.zeros(1)}, "holds 1 tensors that are not the network's, e.g. extra.weight"),
        ({"fc__weight": torch.zeros(1000, 2048)}, "fc.weight (1000, 2048), not (1008, 2048)"),
        ({"fc__bias": torch.full((1008,), torch.nan)}, "fc.bias holds NaN"),
        ({"fc__bias": torch.zeros(1008, dtype=torch.int64)}, "fc.bias holds NaN, infinity or integers"),
        ({"AuxLogits__fc__weight": torch.zeros(1)}, "torchvision's ImageNet network"),
    ],
)
def test_other_files_are_refused(
    values: dict[str, Tensor | None], part: str, inception_state: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "other.pth"
    torch.save(changed(inception_state, **values), path)
    one_line(lambda: load_inception(path), "other.pth", part, "pt_inception-2015-12-05-6726825d.pth")


class Bomb:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> object:
        return Path.touch, (self.proof,)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    torch.save({"fc.weight": Bomb(proof)}, tmp_path / "bomb.pth")
    one_line(lambda: load_inception(tmp_path / "bomb.pth"), "nothing in it was executed")
    assert not proof.exists()
    (tmp_path / "cut.pth").write_bytes(b"PK")
    one_line(lambda: load_inception(tmp_path / "cut.pth"), "cut.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    one_line(lambda: load_inception(tmp_path / "list.pth"), "not a state dict", "github.com/mseitzer/pytorch-fid")
    one_line(lambda: load_inception(tmp_path / "none.pth"), "no such file", "github.com/mseitzer/pytorch-fid")


def test_facts_say_whether_the_file_is_the_published_one(
    inception: InceptionFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert inception.facts() | {"file": ""} == {
        "network": "inception-2015-12-05", "file": "", "sha256": inception.digest, "published": False,
        "input": 299, "interpolation": "TF1 bilinear", "precision": "fp32",
    }  # fmt: skip
    assert len(inception.digest) == 64
    monkeypatch.setattr(inception, "digest", "6726825d" + "0" * 56)
    assert inception.facts()["published"] is True
