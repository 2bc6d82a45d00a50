"""Images and a quick network for tests of what lies around networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


class ColourNetwork:
    """Means of 4 x 4 blocks of grey as features: sees what digits differ in, in no time."""

    name = "colours"
    metrics: tuple[str, ...] = ("fid", "pr")
    device = torch.device("cpu")

    def __init__(self, digest: str = "0") -> None:
        self.digest, self.seen = digest, 0

    def features(self, images: Tensor) -> tuple[Tensor, None]:
        self.seen += len(images)
        grey = images.float().mean(dim=3) / 255
        return torch.nn.functional.adaptive_avg_pool2d(grey[:, None], 4).flatten(1), None

    def facts(self) -> dict[str, Any]:
        return {"network": self.name, "file": "none", "sha256": self.digest, "precision": "fp32"}


def digits(count: int, start: int = 0, noise: float = 0.0) -> Array:
    """scikit-learn's digits in a fixed random order, 8 x 8 enlarged to 32, as uint8 RGB; noise in grey levels."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng(0)
    images = load_digits().images
    chosen = images[rng.permutation(len(images))[start : start + count]]
    grey = np.minimum(chosen * 16, 255).repeat(4, axis=1).repeat(4, axis=2)
    grey = grey + noise * np.random.default_rng(1).standard_normal(grey.shape)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=3)


def saved(path: Path, images: Array, **others: Any) -> Path:
    np.savez(path, arr_0=images, **others)
    return path
