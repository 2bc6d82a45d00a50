"""The Inception network of FID (TensorFlow's graph of 2015-12-05, 1008 classes), with weights from a local file.

Its blocks are torch-fidelity's, which follow the graph where torchvision's do not: averages without padding, and a
maximum in the last block's pool branch.  Which layer is which of the graph's (mixed_6 = Mixed_6d) is from the naming
table of the public conversion of the graph (pytorch-fid).
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mirai_ds.config import UserError
from mirai_ds.runtime.disk import digest_of_file
from mirai_ds.runtime.precision import float32_products
from mirai_ds.runtime.weight_files import read_weight_file

if TYPE_CHECKING:
    from collections.abc import Iterator

Array = np.ndarray[Any, Any]

SIDE, POOLED, SPATIAL = 299, 2048, 17 * 17 * 7  # input, pool_3, and seven channels of mixed_6/conv
SPATIAL_CHANNELS = 7
PUBLISHED = "6726825d"  # how the sha256 of the published file begins: both projects have it in the file's name
WHERE = (
    "the file is pt_inception-2015-12-05-6726825d.pth of github.com/mseitzer/pytorch-fid (release fid_weights), or "
    "weights-inception-2015-12-05-6726825d.pth of github.com/toshas/torch-fidelity (release v0.2.0)"
)
COUNTER = ".num_batches_tracked"  # unused in evaluation; older files are without


def resize_bilinear_tf1(images: Tensor, side: int = SIDE) -> Tensor:
    """fp32 (..., H, W) -> (..., side, side) as TensorFlow 1 resizes: no half-pixel centres, corners not aligned.

    scale = H / side and position = i * scale in fp32, the upper neighbour cut off at the last pixel; along the rows
    first, then along the columns, each a + (b - a) * t in fp32.  This is TensorFlow's result bit for bit.
    """
    for dim in (-1, -2):
        length = images.shape[dim]
        low, high, share = _positions(length, side, images.device)
        if dim == -2:
            share = share[:, None]
        a, b = images.index_select(dim, low), images.index_select(dim, high)
        images = a + (b - a) * share
    return images


def _positions(length: int, side: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper index and the upper one's share, each (side,)."""
    scale = np.float32(length) / np.float32(side)
    position = np.arange(side, dtype=np.float32) * scale
    low = np.floor(position)
    share = position - low
    index = low.astype(np.int64)
    high = np.minimum(index + 1, length - 1)
    return tuple(torch.from_numpy(array).to(device) for array in (index, high, share))  # type: ignore[return-value]


class InceptionNetwork(nn.Module):
    """Parameter names are the published file's."""

    def __init__(self) -> None:
        super().__init__()
        import torch_fidelity.feature_extractor_inceptionv3 as blocks

        self.Conv2d_1a_3x3 = blocks.BasicConv2d(3, 32, kernel_size=3, stride=2)
        self.Conv2d_2a_3x3 = blocks.BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = blocks.BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.MaxPool_1 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Conv2d_3b_1x1 = blocks.BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = blocks.BasicConv2d(80, 192, kernel_size=3)
        self.MaxPool_2 = nn.MaxPool2d(kernel_size=3, stride=2)
        self.Mixed_5b = blocks.InceptionA(192, pool_features=32)
        self.Mixed_5c = blocks.InceptionA(256, pool_features=64)
        self.Mixed_5d = blocks.InceptionA(288, pool_features=64)
        self.Mixed_6a = blocks.InceptionB(288)
        self.Mixed_6b = blocks.InceptionC(768, channels_7x7=128)
        self.Mixed_6c = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6d = blocks.InceptionC(768, channels_7x7=160)
        self.Mixed_6e = blocks.InceptionC(768, channels_7x7=192)
        self.Mixed_7a = blocks.InceptionD(768)
        self.Mixed_7b = blocks.InceptionE_1(1280)
        self.Mixed_7c = blocks.InceptionE_2(POOLED)
        self.fc = nn.Linear(POOLED, 1008)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) fp32 in 0..255 -> pooled (B, 2048) and spatial (B, 2023) features.

        spatial: the first 7 channels of Mixed_6d's 1x1 branch after its ReLU, flattened as (row, column, channel).
        """
        x = (resize_bilinear_tf1(images) - 128) / 128
        spatial = x
        for name, layer in self.named_children():
            if name == "fc":
                break
            if name == "Mixed_6d":
                spatial = self.Mixed_6d.branch1x1(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
            x = layer(x)
        return x.mean(dim=(2, 3)), spatial


class InceptionFeatures:
    """The network with weights of a file, on a device, in fp32; TF32 for its products only where asked."""

    name = "inception"
    metrics: tuple[str, ...] = ("fid", "sfid", "is", "pr")

    def __init__(self, path: Path, device: torch.device, tf32: bool = False) -> None:
        """Raises UserError when the file is not exactly this network's."""
        self.network = load_inception(path).to(device)
        self.path, self.digest, self.device, self.tf32 = path, digest_of_file(path), device, tf32

    @torch.inference_mode()
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, H, W, 3) -> pooled (B, 2048) and spatial (B, 2023) fp32 on the device."""
        x = images.to(self.device).permute(0, 3, 1, 2).float()
        with _plain_arithmetic(self.device, self.tf32):
            return self.network(x)

    @torch.inference_mode()
    def probabilities(self, pooled: Array, batch: int = 512) -> Array:
        """pooled (n, 2048) fp32 -> class probabilities (n, 1008) fp32: softmax of the last layer without its bias."""
        parts = []
        with _plain_arithmetic(self.device, self.tf32):
            for start in range(0, len(pooled), batch):
                rows = torch.from_numpy(pooled[start : start + batch]).to(self.device)
                parts.append((rows @ self.network.fc.weight.T).softmax(dim=1).cpu().numpy())
        return np.concatenate(parts)

    def facts(self) -> dict[str, Any]:
        """For the protocol: the file and whether its digest is the published one's."""
        published = self.digest.startswith(PUBLISHED)
        return {
            "network": "inception-2015-12-05", "file": self.path.name, "sha256": self.digest, "published": published,
            "input": SIDE, "interpolation": "TF1 bilinear", "precision": "tf32" if self.tf32 else "fp32",
        }  # fmt: skip


@contextmanager
def _plain_arithmetic(device: torch.device, tf32: bool) -> Iterator[None]:
    """fp32 whatever mode the caller trains in; its modes are back afterwards."""
    with torch.autocast(device.type, enabled=False), float32_products("tf32" if tf32 else "ieee"):
        yield


def load_inception(path: Path) -> InceptionNetwork:
    """The network on CPU in evaluation mode with the file's weights: every tensor, of its shape, and no other.

    Nothing in the file is executed and no random number drawn.  Raises UserError.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; {WHERE}")
    data = read_weight_file(path)
    if not isinstance(data, dict) or not data or not all(isinstance(value, Tensor) for value in data.values()):
        raise UserError(f"{path}: is not a state dict of tensors; {WHERE}")
    with torch.device("meta"):
        network = InceptionNetwork()
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items() if not key.endswith(COUNTER)}
    given = {str(key): value for key, value in data.items() if not str(key).endswith(COUNTER)}
    _check(path, given, wanted)
    state = {key: value.detach().float().clone() for key, value in given.items()}
    counters = {key: torch.zeros((), dtype=torch.int64) for key in network.state_dict() if key.endswith(COUNTER)}
    network.load_state_dict(state | counters, assign=True)
    return network.eval().requires_grad_(False)


def _check(path: Path, given: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> None:
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in wanted]
    bent = [key for key in wanted if key in given and tuple(given[key].shape) != wanted[key]]
    problem = None
    if missing:
        problem = f"lacks {len(missing)} of {len(wanted)} tensors, e.g. {missing[0]}"
    elif unexpected:
        problem = f"holds {len(unexpected)} tensors that are not the network's, e.g. {unexpected[0]}"
    elif bent:
        problem = f"has {bent[0]} {tuple(given[bent[0]].shape)}, not {wanted[bent[0]]}"
    if problem is not None:
        other = "; it looks like torchvision's ImageNet network, which gives other numbers"
        known = other if any(key.startswith("AuxLogits.") for key in given) else ""
        raise UserError(f"{path}: {problem}{known}; {WHERE}")
    bad = next((k for k, v in given.items() if not v.is_floating_point() or not bool(torch.isfinite(v).all())), None)
    if bad is not None:
        raise UserError(f"{path}: {bad} holds NaN, infinity or integers; the file is damaged; {WHERE}")
