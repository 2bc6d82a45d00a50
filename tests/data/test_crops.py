"""Centre crop and views against the facts of LlamaGen's extraction and against torchvision's own TenCrop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mirai_ds.data.crops import BadImageError, ViewGeometry, Window, centre_crop

FIXTURE = Path(__file__).parents[1] / "fixtures" / "ten_crop.npz"

# (size, range): S, top left of the plain windows, and of the mirrored ones in the unflipped crop.
TABLE = {
    (256, 1.1): (281, [(0, 0), (0, 25), (25, 0), (25, 25), (12, 12)], [(0, 25), (0, 0), (25, 25), (25, 0), (12, 13)]),
    (256, 1.05): (268, [(0, 0), (0, 12), (12, 0), (12, 12), (6, 6)], [(0, 12), (0, 0), (12, 12), (12, 0), (6, 6)]),
    (384, 1.1): (422, [(0, 0), (0, 38), (38, 0), (38, 38), (19, 19)], [(0, 38), (0, 0), (38, 38), (38, 0), (19, 19)]),
    (384, 1.05): (403, [(0, 0), (0, 19), (19, 0), (19, 19), (10, 10)], [(0, 19), (0, 0), (19, 19), (19, 0), (10, 9)]),
}


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize(("size", "crop_range"), TABLE)
def test_windows_of_the_papers_settings(size: int, crop_range: float) -> None:
    geometry = ViewGeometry(size, "ten", crop_range)
    side, plain, mirrored = TABLE[size, crop_range]
    assert (geometry.side, geometry.num_views) == (side, 10)
    wanted = [Window(y, x, False) for y, x in plain] + [Window(y, x, True) for y, x in mirrored]
    assert geometry.windows() == wanted


@pytest.mark.parametrize(("size", "crop_range"), [(16, 1.1), (17, 1.1), (20, 1.3), (21, 1.05), (8, 1.0), (26, 1.2)])
def test_ten_views_are_torchvisions(size: int, crop_range: float) -> None:
    from torchvision.transforms import TenCrop

    geometry = ViewGeometry(size, "ten", crop_range)
    crop = noise(geometry.side, geometry.side)
    for v, wanted in enumerate(TenCrop(size)(Image.fromarray(crop))):
        assert np.array_equal(geometry.view(crop, v), np.asarray(wanted)), v


def test_two_and_one_view() -> None:
    crop = noise(8, 8)
    flip, one = ViewGeometry(8, "flip", 1.1), ViewGeometry(8, "one", 1.1)
    assert (flip.side, flip.num_views, one.side, one.num_views) == (8, 2, 8, 1)  # the range is ten-crop's alone
    assert np.array_equal(flip.view(crop, 0), crop)
    assert np.array_equal(flip.view(crop, 1), crop[:, ::-1])
    assert np.array_equal(one.view(crop, 0), crop)


def test_the_reference_vectors_are_exact() -> None:
    with np.load(FIXTURE) as data:
        for i, case in enumerate(json.loads(str(data["cases"]))):
            geometry = ViewGeometry(case["image_size"], "ten", case["crop_range"])
            crop = centre_crop(Image.fromarray(data[f"image_{i}"]), geometry.side)
            assert np.array_equal(crop, data[f"centre_crop_{i}"])
            views = np.stack([geometry.view(crop, v) for v in range(10)])
            assert np.array_equal(views, data[f"views_{i}"])


@pytest.mark.parametrize(
    ("height", "width"), [(40, 60), (60, 40), (31, 31), (64, 200), (129, 65), (9, 7), (1, 1), (1, 5)]
)
def test_centre_crop_step_by_step(height: int, width: int) -> None:
    """guided-diffusion's rule in other words: `while`, both sides halved by integer division, half to even, floor."""
    size, image = 16, Image.fromarray(noise(height, width))
    found = centre_crop(image, size)
    h, w = height, width
    while h >= 2 * size and w >= 2 * size:
        h, w = h // 2, w // 2
        image = image.resize((w, h), Image.Resampling.BOX)
    ratio = size / min(h, w)
    image = image.resize((round(w * ratio), round(h * ratio)), Image.Resampling.BICUBIC)
    y, x = (image.height - size) // 2, (image.width - size) // 2
    assert found.shape == (size, size, 3)
    assert np.array_equal(found, np.asarray(image)[y : y + size, x : x + size])


def test_the_threshold_of_halving_is_inclusive() -> None:
    """At exactly twice the size a box filter halves; one pixel less and bicubic does all."""
    at = noise(32, 32)
    blocks = at.reshape(16, 2, 16, 2, 3).astype(int).sum((1, 3))
    boxed = centre_crop(Image.fromarray(at), 16).astype(int)
    assert np.abs(boxed - blocks / 4).max() <= 1  # Pillow rounds after each direction
    bicubic = np.asarray(Image.fromarray(at).resize((16, 16), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(boxed - bicubic).max() > 20
    below = centre_crop(Image.fromarray(at[:31, :31]), 16)
    wanted = np.asarray(Image.fromarray(at[:31, :31]).resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(below, wanted)


def test_grey_images_keep_one_channel() -> None:
    grey = noise(40, 30, 1)[..., 0]
    found = centre_crop(Image.fromarray(grey), 16)
    assert found.shape == (16, 16, 1)
    colour = centre_crop(Image.fromarray(np.repeat(grey[..., None], 3, 2)), 16)
    assert np.array_equal(np.repeat(found, 3, 2), colour)


def test_a_sliver_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(BadImageError, match="1x50000 pixels is too narrow"):
        centre_crop(Image.new("RGB", (1, 50_000)), 281)
