"""TensorFlow 1's bilinear resize, pixel by pixel, with its border."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mirai_ds.eval.metrics.inception import resize_bilinear_tf1

Array = np.ndarray[Any, Any]
f32 = np.float32


def one_pixel(image: Array, row: int, column: int, side: int) -> np.float32:
    """The output at (row, column) of an image (H, W) by scalars, each operation in fp32."""

    def place(index: int, length: int) -> tuple[int, int, np.float32]:
        position = f32(index) * (f32(length) / f32(side))
        low = int(np.floor(position))
        return low, min(low + 1, length - 1), f32(position - f32(low))

    top, bottom, down = place(row, image.shape[0])
    left, right, along = place(column, image.shape[1])

    def between(a: np.float32, b: np.float32, share: np.float32) -> np.float32:
        return f32(a + f32(f32(b - a) * share))

    upper = between(image[top, left], image[top, right], along)
    lower = between(image[bottom, left], image[bottom, right], along)
    return between(upper, lower, down)


def noise(height: int, width: int) -> Array:
    return np.random.default_rng(height).integers(0, 256, (height, width)).astype(f32)


@pytest.mark.parametrize("size", [(256, 256), (32, 32), (28, 28), (8, 8), (384, 384), (512, 512), (64, 300), (1, 1)])
def test_every_pixel_by_scalars(size: tuple[int, int]) -> None:
    """The last row and column whole, and 600 places anywhere, bit for bit."""
    image = noise(*size)
    found = resize_bilinear_tf1(torch.from_numpy(image)).numpy()
    assert found.shape == (299, 299)
    rng = np.random.default_rng(1)
    places = [(298, i) for i in range(299)] + [(i, 298) for i in range(299)]
    places += [tuple(rng.integers(0, 299, 2)) for _ in range(600)]
    wrong = [place for place in places if found[place] != one_pixel(image, *place, 299)]
    assert not wrong


def test_the_border_repeats_the_last_pixels() -> None:
    """At 32 pixels the last ten outputs (i * 32 / 299 >= 31 from i = 290 on) lie beyond the last pixel's centre."""
    image = noise(32, 32)
    found = resize_bilinear_tf1(torch.from_numpy(image)).numpy()
    assert (found[298, 298], found[290, 290]) == (image[31, 31], image[31, 31])
    np.testing.assert_array_equal(found[290:], np.broadcast_to(found[290], (9, 299)))
    np.testing.assert_array_equal(found[:, 290:], np.broadcast_to(found[:, 290:291], (299, 9)))
    assert not np.array_equal(found[289], found[290])


def test_the_size_itself_and_leading_dimensions() -> None:
    image = torch.from_numpy(noise(299, 299))
    assert torch.equal(resize_bilinear_tf1(image), image)
    batch = torch.from_numpy(np.stack([noise(40, 50)] * 6)).reshape(2, 3, 40, 50)
    found = resize_bilinear_tf1(batch)
    assert found.shape == (2, 3, 299, 299)
    assert torch.equal(found[1, 2], resize_bilinear_tf1(batch[0, 0]))


def test_it_is_not_what_torch_calls_bilinear() -> None:
    """Half-pixel centres move noise by tens of grey levels: the reason for a resize of our own."""
    image = torch.from_numpy(noise(256, 256))
    other = F.interpolate(image[None, None], (299, 299), mode="bilinear", align_corners=False)[0, 0]
    assert (resize_bilinear_tf1(image) - other).abs().max() > 30
