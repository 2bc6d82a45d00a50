"""Where tokens come from: arrays of codes with labels, and what is needed to show them as images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirai_ds.config import ConfigError, DataConfig, ModelConfig

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TokenSource:
    """codes (n, views, N) integer; labels (n,) int64; images (n, views, 3, H, W) uint8 or None;
    codebook (V, p, p, 3) uint8 or None: the pixel patch each code stands for."""

    codes: Array
    labels: Array
    images: Array | None = None
    codebook: Array | None = None

    def __len__(self) -> int:
        return int(self.codes.shape[0])

    @property
    def num_views(self) -> int:
        """Stored crops of each image."""
        return int(self.codes.shape[1])

    def subset(self, indices: Array) -> TokenSource:
        """The samples at `indices`."""
        images = None if self.images is None else self.images[indices]
        return TokenSource(self.codes[indices], self.labels[indices], images, self.codebook)

    def gather(self, indices: Tensor, views: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """tokens (B, N) int64, labels (B,) int64, images (B, 3, H, W) uint8 or None of samples and their views."""
        i, v = indices.numpy(), views.numpy()
        tokens = torch.from_numpy(self.codes[i, v].astype(np.int64))
        labels = torch.from_numpy(self.labels[i].astype(np.int64))
        images = None if self.images is None else torch.from_numpy(self.images[i, v])
        return tokens, labels, images

    def decode(self, tokens: Tensor) -> Array:
        """tokens (B, N) -> uint8 images (B, g*p, g*p, 3) by the codebook; raises ValueError without one."""
        if self.codebook is None:
            raise ValueError("this data has no codebook, so its tokens cannot be shown as images")
        patches = self.codebook[tokens.numpy()]
        batch, cells, height, width, channels = patches.shape
        side = round(cells**0.5)
        grid = patches.reshape(batch, side, side, height, width, channels).transpose(0, 1, 3, 2, 4, 5)
        return np.ascontiguousarray(grid.reshape(batch, side * height, side * width, channels))


@dataclass(frozen=True)
class Dataset:
    """A fixed split into training and held-out samples."""

    train: TokenSource
    held_out: TokenSource


def digits() -> TokenSource:
    """scikit-learn's handwritten digits: 1,797 of 8x8 pixels with 17 grey levels, so the pixels *are* the code."""
    from sklearn.datasets import load_digits

    data = load_digits()
    codes = data.images.astype(np.uint8)
    grey = np.round(np.arange(17) * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[codes][:, None, None], 3, axis=2)
    codebook = np.broadcast_to(grey[:, None, None, None], (17, 1, 1, 3)).copy()
    return TokenSource(codes.reshape(len(codes), 1, 64), data.target.astype(np.int64), images, codebook)


def from_npz(path: str) -> TokenSource:
    """A user's file: `codes` (n, N) or (n, views, N), `labels` (n,), optional `images` (n, [views,] H, W[, 3]) uint8
    and `codebook` (V, p, p, 3) uint8.  Raises ConfigError when something does not fit."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError("data.path", path, "no such file")
    try:
        with np.load(file, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError("data.path", path, f"is not a readable .npz file ({error})") from None
    for name in ("codes", "labels"):
        if name not in arrays:
            raise ConfigError("data.path", path, f"has no array `{name}`; it holds {sorted(arrays) or 'nothing'}")
    codes, labels = arrays["codes"], arrays["labels"]
    if codes.dtype.kind not in "iu" or codes.ndim not in (2, 3):
        raise ConfigError("data.path", path, f"codes must be integers (n, [views,] tokens), not {codes.dtype} {codes.shape}")
    codes = codes if codes.ndim == 3 else codes[:, None]
    if labels.dtype.kind not in "iu" or labels.shape != (len(codes),):
        raise ConfigError("data.path", path, f"labels must be {len(codes)} integers, not {labels.dtype} {labels.shape}")
    return TokenSource(codes, labels.astype(np.int64), _images(arrays, codes.shape[1], path), _codebook(arrays, path))


def _images(arrays: dict[str, Array], views: int, path: str) -> Array | None:
    images = arrays.get("images")
    if images is None:
        return None
    if images.dtype != np.uint8:
        raise ConfigError("data.path", path, f"images must be uint8, not {images.dtype}")
    if images.shape[-1] != 3:
        images = np.repeat(images[..., None], 3, axis=-1)
    if images.ndim == 4:
        images = images[:, None]
    if images.ndim != 5 or images.shape[:2] != (len(arrays["codes"]), views):
        raise ConfigError("data.path", path, f"images {arrays['images'].shape} do not fit codes {arrays['codes'].shape}")
    return np.ascontiguousarray(np.moveaxis(images, -1, 2))


def _codebook(arrays: dict[str, Array], path: str) -> Array | None:
    codebook = arrays.get("codebook")
    if codebook is not None and (codebook.ndim != 4 or codebook.shape[-1] != 3 or codebook.dtype != np.uint8):
        raise ConfigError("data.path", path, f"codebook must be uint8 (V, p, p, 3), not {codebook.dtype} {codebook.shape}")
    return codebook


def check_fits(source: TokenSource, model: ModelConfig) -> None:
    """Codes, labels and token count within the model's; raises ConfigError naming the field to change."""
    if source.codes.shape[2] != model.block_size:
        raise ConfigError("model.block_size", model.block_size, f"the data has {source.codes.shape[2]} tokens an image")
    if int(source.codes.max()) >= model.vocab_size or int(source.codes.min()) < 0:
        raise ConfigError(
            "model.vocab_size", model.vocab_size, f"the data's codes span {source.codes.min()}..{source.codes.max()}"
        )
    if int(source.labels.max()) >= model.num_classes or int(source.labels.min()) < 0:
        raise ConfigError(
            "model.num_classes", model.num_classes, f"the data's labels span {source.labels.min()}..{source.labels.max()}"
        )
    if source.codebook is not None and len(source.codebook) != model.vocab_size:
        raise ConfigError("model.vocab_size", model.vocab_size, f"the data's codebook has {len(source.codebook)} entries")


def load_dataset(data: DataConfig, model: ModelConfig) -> Dataset:
    """The configured source, checked against the model and split by class with a fixed seed."""
    from sklearn.model_selection import train_test_split

    source = digits() if data.source == "digits" else from_npz(data.path or "")
    if len(source) < 2:
        raise ConfigError("data.path", data.path, f"holds {len(source)} images; training needs more")
    check_fits(source, model)
    counts = np.bincount(source.labels)
    held = max(1, round(len(source) * data.held_out_fraction))
    stratify = source.labels if counts[counts > 0].min() > 1 and held >= (counts > 0).sum() else None
    train, held_out = train_test_split(
        np.arange(len(source)), test_size=held, random_state=data.split_seed, stratify=stratify
    )
    return Dataset(source.subset(np.sort(train)), source.subset(np.sort(held_out)))
