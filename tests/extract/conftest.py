"""Small real images made at test time: scikit-learn's two photographs cut into class folders, and a codebook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mirai_ds.extract import Options, extract_codes, extract_images
from mirai_ds.extract.codebook import learn_codebook
from mirai_ds.runtime.distributed import World

ALONE = World(0, 0, 1, 1)


def photographs() -> dict[str, np.ndarray]:
    """uint8 (427, 640, 3) each."""
    from sklearn.datasets import load_sample_images

    data = load_sample_images()
    return {Path(name).stem: image for name, image in zip(data.filenames, data.images, strict=True)}


def cut_photographs(folder: Path, each: int = 9) -> Path:
    """`each` pieces of both photographs as JPEG, PNG and WebP of several sizes, one folder a photograph."""
    rng = np.random.default_rng(0)
    formats: list[tuple[str, dict[str, Any]]] = [
        ("jpg", {"quality": 90}), ("png", {}), ("webp", {"lossless": True}), ("JPEG", {"progressive": True}),
    ]  # fmt: skip
    for name, image in photographs().items():
        (folder / name).mkdir(parents=True)
        for i in range(each):
            height, width = (int(x) for x in rng.integers(40, 200, 2))
            top, left = int(rng.integers(427 - height)), int(rng.integers(640 - width))
            ending, options = formats[i % len(formats)]
            piece = Image.fromarray(image[top : top + height, left : left + width])
            piece.save(folder / name / f"{i:03d}.{ending}", **options)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 images in 2 classes."""
    return cut_photographs(tmp_path_factory.mktemp("photos") / "train")


@pytest.fixture(scope="session")
def codebook(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 patches of 4x4x3 for images of 16 pixels."""
    out = tmp_path_factory.mktemp("codebook") / "patches.npz"
    learn_codebook(photos, out, 16, 4, 64, None, 100, 0, None)
    return out


def options(images: Path, out: Path, **others: Any) -> Options:
    """Ten crops of 16 pixels from 17, in blocks of 4."""
    return Options(**{"images": images, "out": out, "size": 16, "block": 4, "workers": 2, **others})


@pytest.fixture(scope="session")
def store(photos: Path, codebook: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token store of `photos`; tests that damage it work on a copy."""
    out = tmp_path_factory.mktemp("stores") / "codes"
    extract_codes(options(photos, out), ALONE, codebook, batch=7)
    return out


@pytest.fixture(scope="session")
def packed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image store of `photos`."""
    out = tmp_path_factory.mktemp("stores") / "images"
    extract_images(options(photos, out), ALONE)
    return out


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
