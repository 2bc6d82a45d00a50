"""What every tokenizer offers, whatever makes its codes."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from torch import Tensor


class Tokenizer(Protocol):
    """What every tokenizer offers.  Codes are in raster order: row by row, from the top left."""

    name: str  # what it is, e.g. "VQ-16"
    vocab_size: int  # codes are 0 .. vocab_size - 1
    downsampling: int  # pixels a code spans on a side
    channels: int  # of the images that it encodes; it decodes to three always
    digest: str  # sha256 (hex) of what decides its codes; the same for the same weights in another file

    def grid(self, image_size: int) -> int:
        """Codes on a side, g, of a square image; raises UserError when that is not a whole number."""

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, g * g) int64 on CPU, of uint8 (B, H, W, channels) on CPU; raises UserError when they do not fit."""

    def decode(self, tokens: Tensor, size: int | None = None) -> np.ndarray[Any, Any]:
        """uint8 (B, H, W, 3), of int64 (B, g * g), resized to `size` pixels a side; raises UserError when they are not
        its codes."""
