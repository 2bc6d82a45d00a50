"""From what a folder holds to the sizes of a run: each choice with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from mirai_ds.config import UserError
from mirai_ds.proposal.folder import FolderFacts
from mirai_ds.tokenizer import Tokenizer


class Width(NamedTuple):
    """A model that may be chosen.  init_std: about 1/sqrt(dim) below LlamaGen's sizes, 0.02 for those."""

    dim: int
    n_layer: int
    n_head: int
    lr: float
    init_std: float
    parameters: float  # of its blocks alone


WIDTHS = (
    Width(128, 6, 4, 2e-3, 0.08, 1.2e6), Width(256, 8, 4, 1e-3, 0.06, 6.5e6), Width(512, 8, 8, 5e-4, 0.04, 26e6),
    Width(768, 12, 12, 1e-4, 0.02, 86e6),
)  # fmt: skip
PATCHES_A_CODE = 32  # k-means wants some examples of each
CODES = 512
MOST_EPOCHS = 300  # LlamaGen's
FEWEST_EPOCHS = 3.0  # below, a smaller model learns more in the time
HELD_OUT_FROM = 20  # images


@dataclass(frozen=True)
class View:
    """side: pixels.  patch: pixels a token.  crops: as `mirai-ds extract` takes them.  codes: asked of k-means, None
    with a tokenizer of the user's."""

    side: int
    patch: int
    crops: str
    codes: int | None

    @property
    def grid(self) -> int:
        """Tokens on a side."""
        return self.side // self.patch


def choose_view(facts: FolderFacts, tokenizer: Tokenizer | None, size: int | None, gpu: bool) -> View:
    """Without a size: of LlamaGen's networks up to 256 pixels, of patches 64 on a GPU and 32 without one, and not more
    than the median image has, but at least 8.  Raises UserError for a size that the tokens do not divide."""
    most = 256 if tokenizer is not None and tokenizer.downsampling >= 8 else 64 if gpu else 32
    whole = size or max(8, min(most, facts.short_side))
    patch = tokenizer.downsampling if tokenizer else 4 if whole >= 16 else 2
    side = size or max(2, whole // patch) * patch
    if side % patch or side < 2 * patch:
        problem = f"must be a multiple of {patch}, the pixels of a token, and at least {2 * patch}"
        raise UserError(f"--size {side}: {problem}")
    grey = tokenizer.channels == 1 if tokenizer else facts.grey
    crops = "one" if grey else "ten" if facts.short_side >= int(1.1 * side) else "flip"
    if tokenizer is not None:
        return View(side, patch, crops, None)
    patches = facts.count * (side // patch) ** 2
    codes = 2 ** max(4, min(int(math.log2(CODES)), int(math.log2(max(1, patches / PATCHES_A_CODE)))))
    return View(side, patch, crops, codes)


def choose_width(facts: FolderFacts, view: View) -> int:
    """The number of the widest model with no more parameters than the images have tokens; the smallest always may."""
    tokens = facts.count * view.grid**2
    return max(i for i, width in enumerate(WIDTHS) if i == 0 or width.parameters <= tokens)


def held_out_fraction(facts: FolderFacts) -> float:
    """A tenth, of a few images nothing."""
    return 0.1 if facts.count >= HELD_OUT_FROM else 0.0


def training_images(facts: FolderFacts) -> int:
    """Images that are not held out."""
    return facts.count - facts.unreadable - round(facts.count * held_out_fraction(facts))


def choose_batch(facts: FolderFacts, wide: bool, ranks: int) -> int:
    """An eighth of the training images, up to 64 (256 of LlamaGen's sizes): a power of two times the ranks."""
    most = min(256 if wide else 64, max(1, training_images(facts) // 8))
    batch = ranks * 2 ** int(math.log2(max(1, most // ranks)))
    return batch if batch <= training_images(facts) else 1
