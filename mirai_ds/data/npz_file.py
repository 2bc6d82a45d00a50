"""A user's .npz file of codes, labels and what shows them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mirai_ds.config import ConfigError
from mirai_ds.data.meaning import Meaning
from mirai_ds.data.token_source import TokenSource
from mirai_ds.data.views import ArrayViews
from mirai_ds.tokenizer import PatchCodebook

Array = np.ndarray[Any, Any]


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
    except Exception as error:  # bytes from anywhere: NumPy's header parser raises nearly any type on them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError("data.path", path, f"is not a readable .npz file ({reason}); write it again") from None
    for name in ("codes", "labels"):
        if name not in arrays:
            raise ConfigError("data.path", path, f"has no array `{name}`; it holds {sorted(arrays) or 'nothing'}")
    codes, labels = arrays["codes"], arrays["labels"]
    if codes.dtype.kind not in "iu" or codes.ndim not in (2, 3):
        given = f"{codes.dtype} {codes.shape}"
        raise ConfigError("data.path", path, f"codes must be integers (n, [views,] tokens), not {given}")
    codes = codes if codes.ndim == 3 else codes[:, None]
    if codes.size == 0:
        raise ConfigError("data.path", path, f"codes are empty: {arrays['codes'].shape}; write at least two images")
    if labels.dtype.kind not in "iu" or labels.shape != (len(codes),):
        raise ConfigError("data.path", path, f"labels must be {len(codes)} integers, not {labels.dtype} {labels.shape}")
    for name, array in (("codes", codes), ("labels", labels)):
        if int(array.min()) < 0:
            raise ConfigError("data.path", path, f"{name} must not be negative; the smallest is {array.min()}")
    images, codebook = _images(arrays, codes.shape[1], path), _codebook(arrays, path)
    decoder = None if codebook is None else PatchCodebook(codebook)
    return TokenSource(
        codes, labels.astype(np.int64), None if images is None else ArrayViews(images), decoder,
        meaning=None if decoder is None else Meaning(tokenizer=(decoder.name, decoder.digest)),
    )  # fmt: skip


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
        given = f"{codebook.dtype} {codebook.shape}"
        raise ConfigError("data.path", path, f"codebook must be uint8 (V, p, p, 3), not {given}")
    return codebook
