"""The images of a study: as tokens in .npz files for the trainer, as pixels for the networks that judge and teach."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mirai_ds.config import UserError
from mirai_ds.config.load import load
from mirai_ds.data import load_dataset
from mirai_ds.data.image_sets import IdxImages
from mirai_ds.runtime.disk import write_whole
from mirai_ds.study.arms import Study, data_file, held_out_file
from mirai_ds.tokenizer import PatchCodebook, reconstruction_error

Array = np.ndarray[Any, Any]
FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
LEARNED_FROM = 5000  # images of the codebook


@dataclass(frozen=True)
class Pixels:
    """Grey images uint8 (n, H, W) and labels (n,) int64."""

    images: Array
    labels: Array


def prepare(study: Study, folder: Path, source: Path | None) -> dict[str, float]:
    """Write the study's .npz files unless they are there; returns what the documentation says of the codebook.

    The first `train_images` training and `held_out_images` test images; a codebook of the first 5,000.  The same bytes
    each time.  Raises UserError when the images are not at hand.
    """
    if study.train_images is None:
        return {}
    source = source or FASHION
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; apt-get install dataset-fashion-mnist, or give --images FOLDER")
    train, test = IdxImages(source, "train"), IdxImages(source, "t10k")
    book = _codebook(study, train.pixels)
    count = study.train_images
    for path, one, n in (
        (data_file(folder), train, count),
        (held_out_file(folder), test, study.held_out_images or len(test.labels)),
    ):
        if n > len(one.labels):
            raise UserError(f"{source}: holds {len(one.labels)} images, the study takes {n}")
        if not path.is_file():
            _write(path, one.pixels[:n], one.labels[:n], book)
    error = reconstruction_error(book, test.pixels[:, :, :, None].copy())
    return {"codes": float(book.vocab_size), "reconstruction_rms": error.rms, "reconstruction_psnr": error.psnr}


def _codebook(study: Study, pixels: Array) -> PatchCodebook:
    return PatchCodebook.learn(np.ascontiguousarray(pixels[:LEARNED_FROM, :, :, None]), study.patch, study.codes, 0)


def _write(path: Path, pixels: Array, labels: Array, book: PatchCodebook) -> None:
    codes = book.encode(torch.from_numpy(pixels[:, :, :, None].copy())).numpy()
    content = io.BytesIO()
    np.savez(
        content, codes=codes.astype(np.uint16), labels=labels.astype(np.int64), images=pixels,
        codebook=np.repeat(book.patches, 3, axis=-1),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content.getvalue())


def real_images(study: Study, folder: Path, source: Path | None) -> tuple[Pixels, Pixels]:
    """(training, test) images: all of them, for the judge."""
    if study.train_images is None:
        return digit_pixels(study)
    source = source or FASHION
    train, test = IdxImages(source, "train"), IdxImages(source, "t10k")
    return Pixels(train.pixels, train.labels.astype(np.int64)), Pixels(test.pixels, test.labels.astype(np.int64))


def digit_pixels(study: Study) -> tuple[Pixels, Pixels]:
    """(training, held-out) digits of the recipe's split."""
    config = load(study.recipe)
    data = load_dataset(config.data, config.model)
    train, held_out = (Pixels(s.decode(s.first_view())[..., 0], s.labels) for s in (data.train, data.held_out))
    return train, held_out
