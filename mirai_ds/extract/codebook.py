"""A patch codebook learned from a sample of an image set: the tokenizer of small images."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mirai_ds.config import UserError
from mirai_ds.data.crops import BadImageError, centre_crop
from mirai_ds.data.image_sets import ImageSet, open_image_set
from mirai_ds.tokenizer import PatchCodebook, ReconstructionError, reconstruction_error

Array = np.ndarray[Any, Any]


def learn_codebook(
    images: Path, out: Path, size: int, patch: int, codes: int, channels: int | None, max_images: int, seed: int,
    split: str | None, upright: bool = False,
) -> str:  # fmt: skip
    """Learn a codebook from up to `max_images` centre crops and write it to `out`; returns a line about it.

    channels: 1 or 3; None: 1 if the sampled images are all grey.  Raises UserError.
    """
    if out.suffix != ".npz":
        raise UserError(f"--out {out}: a codebook file ends in .npz")
    if size % patch:
        raise UserError(f"--patch {patch}: does not divide --size {size}")
    codebook, error, (count, lost) = codebook_of(
        open_image_set(images, split, upright), size, patch, codes, channels, max_images, seed
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    codebook.save(out)
    more = f" ({lost} more could not be read)" if lost else ""
    return (
        f"{out}: {codebook.vocab_size} patches of {patch}x{patch}x{codebook.channels} from {count} images{more}, "
        f"reconstruction {error.rms:.2f} grey levels rms, {error.psnr:.1f} dB"
    )


def codebook_of(
    images: ImageSet, size: int, patch: int, codes: int, channels: int | None, max_images: int = 5000, seed: int = 0
) -> tuple[PatchCodebook, ReconstructionError, tuple[int, int]]:
    """The codebook that `learn_codebook` writes, its error on the crops, and of the images how many it was learned from
    and how many could not be read.  Raises UserError."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(images.names))[:max_images])
    crops = read_crops(images, chosen, size)
    grey = bool((crops == crops[..., :1]).all())
    crops = crops[..., :1] if channels == 1 or (channels is None and grey) else crops
    if channels == 1 and not grey:
        raise UserError("--channels 1: some images have colours; use 3")
    codebook = PatchCodebook.learn(crops, patch, codes, seed)
    return codebook, reconstruction_error(codebook, crops), (len(crops), len(chosen) - len(crops))


def read_crops(image_set: ImageSet, chosen: Array, size: int) -> Array:
    """uint8 (n, size, size, 3) centre crops; images that cannot be read are left out.  Raises UserError without any."""

    def read(image: int) -> Array | None:
        try:
            return centre_crop(image_set.load(image).image, size)
        except BadImageError:
            return None

    with ThreadPoolExecutor() as pool:
        crops = [crop for crop in pool.map(read, chosen.tolist()) if crop is not None]
    if not crops:
        raise UserError(f"{image_set.root}: not one image could be read; `mirai-ds extract images` says why")
    return np.stack(crops)
