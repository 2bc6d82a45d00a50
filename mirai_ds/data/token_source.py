"""Samples as training sees them: codes with labels, the views' pixels, and what shows codes as pictures."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mirai_ds.config import UserError
from mirai_ds.data.meaning import Meaning
from mirai_ds.data.stacked import StackedCodes
from mirai_ds.data.views import ViewSource

Array = np.ndarray[Any, Any]


class TokenDecoder(Protocol):
    """The half of a tokenizer that shows tokens."""

    vocab_size: int
    downsampling: int
    digest: str

    def decode(self, tokens: Tensor, size: int | None = None) -> Array:
        """tokens (B, N) int64 -> uint8 images (B, H, W, 3), resized to `size` pixels a side."""
        ...


@dataclass(frozen=True)
class TokenSource:
    """codes (m, views, N) integer, perhaps mapped from files; labels (n,) of this source's samples; rows (n,) their
    places among the m (None: n = m, in order); images: pixels of those m; max_code: the largest code, if known; seal:
    digest of all codes, if known; meaning: what codes and labels stand for, if known."""

    codes: Array | StackedCodes
    labels: Array
    images: ViewSource | None = None
    decoder: TokenDecoder | None = None
    rows: Array | None = None
    max_code: int | None = None
    seal: str | None = None
    meaning: Meaning | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_views(self) -> int:
        """Stored crops of each image."""
        return int(self.codes.shape[1])

    def largest_code(self) -> int:
        """The largest code; reads all of them where it is not known."""
        return int(self.codes.max()) if self.max_code is None else self.max_code

    def digest(self) -> str:
        """sha256 that changes with any code, label or choice of samples; reads all codes where no seal is known."""
        digest = hashlib.sha256((self.seal or "").encode())
        if self.seal is None and isinstance(self.codes, np.ndarray):
            digest.update(f"{self.codes.dtype} {self.codes.shape}".encode())
            digest.update(np.ascontiguousarray(self.codes).data)
        for array in (self.labels, self.rows):
            if array is not None:
                digest.update(np.ascontiguousarray(array).astype(np.int64).data)
        return digest.hexdigest()

    def subset(self, indices: Array) -> TokenSource:
        """The samples at `indices`; codes and images stay where they are."""
        rows = indices if self.rows is None else self.rows[indices]
        return replace(self, labels=self.labels[indices], rows=rows)

    def places(self, indices: Array) -> Array:
        """Where the samples at `indices` lie among all codes."""
        return indices if self.rows is None else self.rows[indices]

    def first_view(self, indices: Array | None = None) -> Tensor:
        """(n, N) int64 tokens of the first view of all samples, or of those at `indices`."""
        places = self.places(np.arange(len(self)) if indices is None else indices)
        return torch.from_numpy(self.codes[places, 0].astype(np.int64))

    def gather(self, indices: Tensor, views: Tensor, images: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """tokens (B, N) int64, labels (B,) int64, images (B, 3, H, W) uint8 (None unless asked for) of samples (B,) and
        their views (B,).  Raises UserError for codes beyond `max_code` and for pixels that cannot be read."""
        places, v = self.places(indices.numpy()), views.numpy()
        codes = self.codes[places, v].astype(np.int64)
        if self.max_code is not None and codes.size and int(codes.max()) > self.max_code:
            where = int(places[int(codes.max(axis=1).argmax())])
            raise UserError(
                f"the codes of image {where} go up to {codes.max()}, their manifest says {self.max_code}: the store is "
                "damaged; `mirai-ds inspect STORE --verify` tells where"
            )
        labels = torch.from_numpy(self.labels[indices.numpy()].astype(np.int64))
        pixels = None
        if images:
            if self.images is None:
                raise UserError("data.images: this data has no images")
            pixels = torch.from_numpy(self.images.gather(places, v))
        return torch.from_numpy(codes), labels, pixels

    def decode(self, tokens: Tensor) -> Array:
        """tokens (B, N) -> uint8 images (B, H, W, 3); raises ValueError without a decoder."""
        if self.decoder is None:
            raise ValueError("this data has no codebook or tokenizer, so its tokens cannot be shown as images")
        return self.decoder.decode(tokens)


@dataclass(frozen=True)
class Dataset:
    """A fixed split into training and held-out samples; the latter may be none."""

    train: TokenSource
    held_out: TokenSource
