"""The digits that ship with scikit-learn."""

from __future__ import annotations

import numpy as np

from mirai_ds.data.token_source import TokenSource
from mirai_ds.data.views import ArrayViews
from mirai_ds.tokenizer import PatchCodebook


def digits() -> TokenSource:
    """1,797 handwritten digits of 8x8 pixels with 17 grey levels, so the pixels *are* the code."""
    from sklearn.datasets import load_digits

    data = load_digits()
    codes = data.images.astype(np.uint8)
    grey = np.round(np.arange(17) * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[codes][:, None, None], 3, axis=2)
    codebook = np.broadcast_to(grey[:, None, None, None], (17, 1, 1, 3)).copy()
    labels = data.target.astype(np.int64)
    return TokenSource(codes.reshape(len(codes), 1, 64), labels, ArrayViews(images), PatchCodebook(codebook))
