"""A tokenizer for small images: each patch of p x p pixels becomes the nearest patch of a codebook."""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mirai_ds.config import UserError
from mirai_ds.config.errors import shown
from mirai_ds.runtime.disk import write_whole

if TYPE_CHECKING:
    from mirai_ds.tokenizer.interface import Tokenizer

Array = np.ndarray[Any, Any]

KIND = "patch-codebook"
DISTANCE_ENTRIES = 4 * 2**20  # of a (patches, codes) float64 matrix: 32 MB
MAX_PATCHES = 100_000  # distinct ones that k-means sees


class PatchCodebook:
    """Patches of pixels and their numbers.

    name: "patch-codebook".  vocab_size: patches, V.  downsampling: pixels of a patch on a side, p.  channels: C, any
    number.  patches: uint8 (V, p, p, C).  digest: sha256 over shape and values.
    """

    name = KIND

    def __init__(self, patches: Array) -> None:
        """patches: uint8 (V, p, p, C).  Raises UserError when they are anything else."""
        square = patches.ndim == 4 and patches.size > 0 and patches.shape[1] == patches.shape[2]
        if not square or patches.dtype != np.uint8:
            raise UserError(f"a patch codebook is uint8 (V, p, p, C), not {patches.dtype} {patches.shape}")
        self.patches = np.ascontiguousarray(patches)
        self.vocab_size, self.downsampling, _, self.channels = (int(n) for n in patches.shape)
        self.digest = hashlib.sha256(f"{patches.shape}\n".encode() + self.patches.tobytes()).hexdigest()
        self._flat = self.patches.reshape(self.vocab_size, -1).astype(np.float64)
        self._length = np.square(self._flat).sum(1)

    def grid(self, image_size: int) -> int:
        """Patches on a side of an image of `image_size` pixels.  Raises UserError when that is not a whole number."""
        if image_size < 1 or image_size % self.downsampling:
            raise UserError(f"image size {image_size}: must be a multiple of the codebook's patch, {self.downsampling}")
        return image_size // self.downsampling

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, g * g) int64 numbers in raster order, of uint8 images (B, H, W, C) on CPU, H = W = g * p.

        The nearest patch by squared distance, of equally near ones the lowest number; exact, so no result depends on
        the batch, the threads or the library.  Raises UserError when the images do not fit.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != pixels.shape[2]:
            raise UserError(f"images must be square, uint8 (B, H, W, C), not {pixels.dtype} {tuple(pixels.shape)}")
        if pixels.shape[3] != self.channels:
            raise UserError(f"images have {pixels.shape[3]} channels, the codebook's patches have {self.channels}")
        cells = self.grid(pixels.shape[1]) ** 2
        numbers, _ = self._nearest(_cut(pixels.numpy(), self.downsampling))
        return torch.from_numpy(numbers.reshape(len(pixels), cells))

    def decode(self, tokens: Tensor, size: int | None = None) -> Array:
        """uint8 images (B, H, W, 3) of int64 numbers (B, g * g): the first three channels, the last repeated to three.

        size: pixels a side, resized to (bicubic, no antialias, in float64, rounded).  Raises UserError when they are no
        square grid or not numbers of this codebook.
        """
        side = math.isqrt(tokens.shape[1]) if tokens.ndim == 2 else 0
        if tokens.is_floating_point() or not side or side * side != tokens.shape[1]:
            given = f"{tokens.dtype} {tuple(tokens.shape)}"
            raise UserError(f"a patch codebook decodes square grids of codes, int64 (B, g * g), not {given}")
        numbers = tokens.cpu().numpy()
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < self.vocab_size:
            spread = f"{numbers.min()}..{numbers.max()}"
            raise UserError(f"codes span {spread}, the codebook has 0..{self.vocab_size - 1}: they are another's")
        visible = self.patches[..., [min(i, self.channels - 1) for i in range(3)]]
        p, whole = self.downsampling, side * self.downsampling
        tiles = visible[numbers].reshape(-1, side, side, p, p, 3)
        images = np.ascontiguousarray(tiles.transpose(0, 1, 3, 2, 4, 5)).reshape(-1, whole, whole, 3)
        return images if size is None or size == whole else _resized(images, size)

    def _nearest(self, flat: Array) -> tuple[Array, Array]:
        """Number of and squared distance to the nearest patch, int64 (n,) each, of uint8 patches (n, p * p * C).

        All sums are integers below 2**53, which float64 holds exactly in any order of summation.
        """
        numbers, distances = np.empty(len(flat), np.int64), np.empty(len(flat), np.int64)
        rows = max(1, DISTANCE_ENTRIES // self.vocab_size)
        for start in range(0, len(flat), rows):
            x = flat[start : start + rows].astype(np.float64)
            beyond = x @ self._flat.T
            beyond *= -2
            beyond += self._length  # the squared distance, less |x|^2
            best = beyond.argmin(1)
            numbers[start : start + rows] = best
            distances[start : start + rows] = beyond[np.arange(len(x)), best] + np.square(x).sum(1)
        return numbers, distances

    @classmethod
    def learn(
        cls, images: Array, patch: int, codes: int, seed: int = 0, max_patches: int = MAX_PATCHES
    ) -> PatchCodebook:
        """A codebook of `codes` patches by k-means over the patches of `images`, uint8 (n, H, W, C), in lexical order.

        k-means sees the distinct patches weighted by their counts; of more than `max_patches`, a random choice by
        `seed`.  With at most `codes` distinct patches the codebook is these: smaller than asked for, and lossless on
        `images`.  Never holds a patch twice.  Deterministic, whatever the number of threads.  Raises UserError.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.size == 0:
            raise UserError(f"images to learn from must be uint8 (n, H, W, C), not {images.dtype} {images.shape}")
        if patch < 1 or images.shape[1] % patch or images.shape[2] % patch:
            raise UserError(f"patch = {patch}: must divide the images' sides, {images.shape[1]} x {images.shape[2]}")
        if codes < 1 or max_patches < codes:
            raise UserError(f"codes = {codes}: must be at least 1 and at most max_patches = {max_patches}")
        flat, counts = np.unique(_cut(images, patch), axis=0, return_counts=True)
        if len(flat) > max_patches:
            chosen = np.sort(np.random.default_rng(seed).permutation(len(flat))[:max_patches])
            flat, counts = flat[chosen], counts[chosen]
        if len(flat) > codes:
            flat = _without_doubles(_centroids(flat, counts, codes, seed), flat, codes)
        return cls(flat.reshape(-1, patch, patch, images.shape[3]))

    def save(self, path: Path) -> None:
        """Write a .npz with `codebook` and `kind`, whole or not at all: the same bytes each time.  Raises UserError."""
        if path.suffix != ".npz":
            raise UserError(f"{path}: a patch codebook's file must end in .npz")
        content = io.BytesIO()
        np.savez(content, codebook=self.patches, kind=np.array(KIND))
        try:
            write_whole(path, content.getvalue())
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None

    @classmethod
    def load(cls, path: Path) -> PatchCodebook:
        """The codebook in a .npz with `codebook` uint8 (V, p, p, C) and, if any, `kind` = "patch-codebook".

        Raises UserError when the file is missing, damaged or something else.
        """
        if not path.is_file():
            raise UserError(
                f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; give a codebook's .npz file"
            )
        try:
            if not zipfile.is_zipfile(path):
                raise ValueError("another kind of file, or cut short")
            with np.load(path, allow_pickle=False) as data:
                if "codebook" not in data.files:
                    held = ", ".join(data.files[:6]) or "nothing"
                    raise UserError(f"{path}: has no array `codebook`; it holds {held}")
                patches, kind = data["codebook"], str(data["kind"]) if "kind" in data.files else KIND
                if not isinstance(patches, np.ndarray):
                    raise ValueError("codebook is not an array")
        except UserError:
            raise
        except Exception as error:  # bytes from anywhere: NumPy's header parser raises nearly any type on them
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path}: is not a readable .npz file of plain arrays ({reason})") from None
        if kind != KIND:
            raise UserError(f"{path}: kind = {shown(kind)}: is not {KIND!r}")
        try:
            return cls(patches)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None


def _cut(images: Array, p: int) -> Array:
    """Patches (B * h * w, p * p * C) in raster order of images (B, h * p, w * p, C)."""
    b, height, width, c = images.shape
    tiles = images.reshape(b, height // p, p, width // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return np.ascontiguousarray(tiles).reshape(-1, p * p * c)


def _resized(images: Array, size: int) -> Array:
    """uint8 (B, H, W, 3) -> (B, size, size, 3), bicubic as torch's `interpolate` without antialias."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).double()
    out = torch.nn.functional.interpolate(pixels, size=(size, size), mode="bicubic")
    return out.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _centroids(flat: Array, counts: Array, codes: int, seed: int) -> Array:
    """uint8 (codes, d): k-means of distinct patches (n, d), n > codes, by their counts, rounded."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1):  # threads add up in any order, and the last bit decides where a centroid goes
        # Whole k-means, not the mini-batch one: on photographs 0.6 to 1.9 dB better in one to five times the time.
        means = KMeans(codes, random_state=seed, n_init=1, max_iter=30)
        means.fit(flat.astype(np.float32), sample_weight=counts.astype(np.float64))
    return np.rint(means.cluster_centers_).clip(0, 255).astype(np.uint8)


def _without_doubles(book: Array, flat: Array, codes: int) -> Array:
    """`book` (n, d) with each patch once, filled up to `codes` by those of `flat` that it shows worst."""
    book = np.unique(book, axis=0)
    if len(book) < codes:
        _, distances = PatchCodebook(book[:, None, None, :])._nearest(flat)
        worst = np.argsort(-distances, kind="stable")[: codes - len(book)]
        book = np.unique(np.concatenate([book, flat[worst]]), axis=0)
    return book


class ReconstructionError(NamedTuple):
    """How far decoded images are from their originals."""

    rms: float  # grey levels of 0..255
    psnr: float  # dB, infinite without any error


def reconstruction_error(tokenizer: Tokenizer, images: Array) -> ReconstructionError:
    """Of encoding and decoding uint8 images (n, H, W, C), over all values of those channels that decoding shows.

    Raises UserError when the images do not fit the tokenizer or there are none.
    """
    if images.ndim != 4 or images.size == 0:
        raise UserError(f"images to measure on must be uint8 (n, H, W, C), not {images.dtype} {images.shape}")
    squares, channels = 0, min(images.shape[3], 3)
    for start in range(0, len(images), 64):
        part = np.ascontiguousarray(images[start : start + 64])
        decoded = tokenizer.decode(tokenizer.encode(torch.from_numpy(part)))
        difference = decoded[..., :channels].astype(np.int64) - part[..., :channels]
        squares += int(np.square(difference).sum())
    rms = math.sqrt(squares / (images.size // images.shape[3] * channels))
    return ReconstructionError(rms, 20 * math.log10(255 / rms) if rms else math.inf)
