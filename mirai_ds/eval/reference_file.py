"""Reference sets on disk: ADM's .npz with stored statistics, any .npz of images, a folder or store."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirai_ds.config import UserError
from mirai_ds.eval.image_sources import KEYS, ImageSource, npz_members, open_images
from mirai_ds.eval.metrics.distances import GaussianStatistics
from mirai_ds.eval.metrics.inception import POOLED, SPATIAL
from mirai_ds.eval.real_images import open_real_images
from mirai_ds.runtime.disk import digest_of_file
from mirai_ds.runtime.weight_files import first_line

# The published reference of ImageNet at 256 pixels: statistics of the whole training set, and images for P and R only.
STANDARD_NAME = "VIRTUAL_imagenet256_labeled.npz"
STANDARD_IMAGES, STANDARD_SIDE = 10_000, 256
PROTOCOL = "protocol"  # the member in which `mirai-ds reference` says, as JSON, what it did
VALIDATION_IMAGES = 50_000  # of ImageNet's validation set


@dataclass(frozen=True)
class ReferenceFile:
    """pooled, spatial: statistics stored for Inception's two layers.  images: None where there are statistics only."""

    path: Path
    images: ImageSource | None
    pooled: GaussianStatistics | None
    spatial: GaussianStatistics | None
    made: dict[str, Any] | None = None  # of one that `mirai-ds reference` made: how

    def digest(self) -> str:
        """sha256 of the file, or of a folder's names and files."""
        return self.images.digest() if self.images is not None else digest_of_file(self.path)

    @property
    def standard(self) -> bool:
        """Whether it has the properties of the published reference; a name proves nothing, unless it says `val`."""
        return not self.departures()

    def departures(self) -> list[str]:
        """How it differs from the published reference, each difference as a sentence."""
        reasons = []
        if self.pooled is None or self.spatial is None:
            lacking = "mu, sigma" if self.pooled is None else "mu_s, sigma_s"
            reasons.append(f"the reference has no stored {lacking}: {STANDARD_NAME} has them of the whole training set")
        if self.images is None:
            return [*reasons, "the reference has no images"]
        if self.images.count != STANDARD_IMAGES:
            reasons.append(f"the reference has {self.images.count} images, {STANDARD_NAME} has {STANDARD_IMAGES}")
        if (self.images.height, self.images.width) != (STANDARD_SIDE, STANDARD_SIDE):
            size = f"{self.images.width}x{self.images.height}"
            reasons.append(f"the reference is {size}, {STANDARD_NAME} is {STANDARD_SIDE}x{STANDARD_SIDE}")
        if self.images.count == VALIDATION_IMAGES or "val" in self.path.stem.lower().replace("-", "_").split("_"):
            reasons.append("the reference looks like ImageNet's validation set: its scores are not those of tables")
        return reasons


def open_reference(path: Path, size: tuple[int, int] | None = None) -> ReferenceFile:
    """The reference at `path`; statistics are read, images are not yet.  size: (height, width) of the samples, to which
    the images of a folder or store are brought (`FIT`).  Raises UserError."""
    if path.is_dir():
        square = size is not None and size[0] == size[1]
        return ReferenceFile(path, open_real_images(path, size[0] if size and square else None), None, None)
    members = npz_members(path)
    pooled = _stored(path, members, "mu", "sigma", POOLED)
    spatial = _stored(path, members, "mu_s", "sigma_s", SPATIAL)
    images = open_images(path) if any(key in members for key in KEYS) else None
    if images is None and pooled is None and spatial is None:
        held = ", ".join(sorted(members)[:8]) or "nothing"
        raise UserError(f"{path}: has neither images (arr_0) nor statistics (mu, sigma); it holds {held}")
    return ReferenceFile(path, images, pooled, spatial, _made(path, members))


def _made(path: Path, members: dict[str, Any]) -> dict[str, Any] | None:
    if PROTOCOL not in members:
        return None
    try:
        with np.load(path, allow_pickle=False) as data:
            made = json.loads(str(data[PROTOCOL][()]))
    except Exception as error:  # bytes from anywhere: NumPy raises nearly any type on them
        raise UserError(f"{path}: {PROTOCOL} cannot be read ({first_line(error)}); make it again") from None
    return made if isinstance(made, dict) else None


def _stored(path: Path, members: dict[str, Any], mean: str, covariance: str, width: int) -> GaussianStatistics | None:
    if mean not in members and covariance not in members:
        return None
    wanted = {mean: (width,), covariance: (width, width)}
    for key, shape in wanted.items():
        if key not in members:
            raise UserError(f"{path}: has {mean if key == covariance else covariance} but no {key}; fetch it again")
        if members[key].shape != shape or members[key].dtype.kind != "f":
            problem = f"{key} is {members[key].dtype} {members[key].shape}, not {shape} of Inception's features"
            raise UserError(f"{path}: {problem}; they are another network's")
    try:
        with np.load(path, allow_pickle=False) as data:
            statistics = GaussianStatistics(data[mean], data[covariance])
    except Exception as error:  # bytes from anywhere: NumPy raises nearly any type on them
        raise UserError(
            f"{path}: {mean} and {covariance} cannot be read ({first_line(error)}); fetch it again"
        ) from None
    if not np.isfinite(statistics.mean).all() or not np.isfinite(statistics.covariance).all():
        raise UserError(f"{path}: {mean} or {covariance} holds NaN or infinity; fetch it again")
    return statistics
