"""Where tokens come from: arrays of codes with labels, and what is needed to show them as images."""

from __future__ import annotations

import zipfile
import zlib
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
    if not zipfile.is_zipfile(file):
        raise ConfigError("data.path", path, "is not a whole .npz file; write it again with numpy.savez")
    try:
        with np.load(file, allow_pickle=False) as data:
            arrays = {name: value for name in data.files if isinstance(value := data[name], np.ndarray)}
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError("data.path", path, f"is not a readable .npz file ({reason}); write it again") from None
    for name in ("codes", "labels"):
        if name not in arrays:
            raise ConfigError("data.path", path, f"has no array `{name}`; it holds {sorted(arrays) or 'nothing'}")
    codes, labels = arrays["codes"], arrays["labels"]
    if codes.dtype.kind not in "iu" or codes.ndim not in (2, 3):
        found = f"{codes.dtype} {codes.shape}"
        raise ConfigError("data.path", path, f"codes must be integers (n, [views,] tokens), not {found}")
    codes = codes if codes.ndim == 3 else codes[:, None]
    if codes.size == 0:
        raise ConfigError("data.path", path, f"codes are empty: {arrays['codes'].shape}; write at least two images")
    if labels.dtype.kind not in "iu" or labels.shape != (len(codes),):
        raise ConfigError("data.path", path, f"labels must be {len(codes)} integers, not {labels.dtype} {labels.shape}")
    for name, array in (("codes", codes), ("labels", labels)):
        if int(array.min()) < 0:
            raise ConfigError("data.path", path, f"{name} must not be negative; the smallest is {array.min()}")
    return TokenSource(codes, labels.astype(np.int64), _images(arrays, codes.shape[1], path), _codebook(arrays, path))


def _images(arrays: dict[str, Array], views: int, path: str) -> Array | None:
    images = arrays.get("images")
    if images is None:
        return None
    if images.dtype != np.uint8:
        raise ConfigError("data.path", path, f"images must be uint8, not {images.dtype}")
    if images.ndim and images.shape[-1] != 3:
        images = np.repeat(images[..., None], 3, axis=-1)
    if images.ndim == 4:
        images = images[:, None]
    if images.ndim != 5 or images.shape[:2] != (len(arrays["codes"]), views):
        shape, codes = arrays["images"].shape, arrays["codes"].shape
        raise ConfigError("data.path", path, f"images must be (n, [views,] H, W[, 3]) as codes {codes}, not {shape}")
    return np.ascontiguousarray(np.moveaxis(images, -1, 2))


def _codebook(arrays: dict[str, Array], path: str) -> Array | None:
    codebook = arrays.get("codebook")
    if codebook is None:
        return None
    square = codebook.ndim == 4 and codebook.shape[1] == codebook.shape[2] and codebook.shape[3] == 3
    if not square or codebook.dtype != np.uint8:
        found = f"{codebook.dtype} {codebook.shape}"
        raise ConfigError("data.path", path, f"codebook must be uint8 (V, p, p, 3), not {found}")
    return codebook


def check_fits(source: TokenSource, model: ModelConfig) -> None:
    """Codes, labels and token count within the model's; raises ConfigError naming the field to change."""
    if source.codes.shape[2] != model.block_size:
        problem = f"the data has {source.codes.shape[2]} tokens an image; use that"
        raise ConfigError("model.block_size", model.block_size, problem)
    codes, labels = int(source.codes.max()), int(source.labels.max())
    if codes >= model.vocab_size:
        problem = f"the data's codes go up to {codes}; use at least {codes + 1}"
        raise ConfigError("model.vocab_size", model.vocab_size, problem)
    if labels >= model.num_classes:
        problem = f"the data's labels go up to {labels}; use at least {labels + 1}"
        raise ConfigError("model.num_classes", model.num_classes, problem)
    if source.codebook is not None and len(source.codebook) != model.vocab_size:
        problem = f"the data's codebook has {len(source.codebook)} entries; use that"
        raise ConfigError("model.vocab_size", model.vocab_size, problem)


def load_dataset(data: DataConfig, model: ModelConfig) -> Dataset:
    """The configured source, checked against the model and split by class with a fixed seed."""
    from sklearn.model_selection import train_test_split

    source = digits() if data.source == "digits" else from_npz(data.path or "")
    if len(source) < 2:
        raise ConfigError("data.path", data.path, f"holds {len(source)} images; it must hold at least 2")
    check_fits(source, model)
    counts = np.unique(source.labels, return_counts=True)[1]
    held = min(max(1, round(len(source) * data.held_out_fraction)), len(source) - 1)
    # By class where every class can be in both parts.
    possible = counts.min() > 1 and min(held, len(source) - held) >= len(counts)
    stratify = source.labels if possible else None
    train, held_out = train_test_split(
        np.arange(len(source)), test_size=held, random_state=data.split_seed, stratify=stratify
    )
    return Dataset(source.subset(np.sort(train)), source.subset(np.sort(held_out)))
