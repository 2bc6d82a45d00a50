"""Reference vectors of what lies between images and codes: the VQ-16 tokenizer and the ten-crop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from mirai_ds.data.crops import BadImageError, ViewGeometry, centre_crop
from mirai_ds.selfcheck.vectors import Array, Reading, Vector, weights
from mirai_ds.tokenizer import VQ16, VQModel

MAX_SIZE, MAX_BATCH = 1024, 64  # of a file that is not damaged


def vq16_inputs(vector: Vector) -> set[str]:
    """Names of the arrays of a `vq16` file that are only inputs."""
    given = {name for name in vector.arrays if name.startswith("state/")}
    return {"kind", "seed", "size", "batch", "decode_codes"} | given


@torch.no_grad()
def read_vq16(vector: Vector) -> Iterator[Reading]:
    """`vq16`: latent and indices of a random input, decoded of `decode_codes`, nkeys = entries of the state dict.

    The input is uniform in -1..1 by `seed`, (batch, 3, size, size).
    """
    size, batch, seed = (vector.number(name) for name in ("size", "batch", "seed"))
    if not (0 < size <= MAX_SIZE and size % VQ16.downsampling == 0 and 0 < batch <= MAX_BATCH and seed >= 0):
        wanted = f"multiples of {VQ16.downsampling} up to {MAX_SIZE}, 1..{MAX_BATCH} and not negative"
        raise vector.fail(f"size = {size}, batch = {batch}, seed = {seed}: must be {wanted}")
    with torch.device("meta"):
        model = VQModel(VQ16).eval()
    model.load_state_dict(weights(vector, model.state_dict()), assign=True)
    out = {"nkeys": torch.tensor(len(model.state_dict()))}
    if {"latent", "indices"} & vector.arrays.keys():
        pixels = np.random.default_rng(seed).uniform(-1, 1, (batch, 3, size, size)).astype(np.float32)
        out["latent"] = model.latent(torch.from_numpy(pixels))
        # Of the file's latent where it has one: two codes may be nearer to each other than two fp32 latents.
        stored = vector.arrays.get("latent")
        same_kind = stored is not None and stored.dtype == np.float32 and stored.shape == tuple(out["latent"].shape)
        out["indices"] = model.indices(torch.from_numpy(stored) if same_kind else out["latent"])
    if "decoded" in vector:
        codes = vector.integers("decode_codes", 0, VQ16.codebook_size - 1)
        side = round(codes.shape[-1] ** 0.5)
        if codes.ndim != 2 or side * side != codes.shape[1]:
            raise vector.fail(f"`decode_codes` must be (B, g * g), not {tuple(codes.shape)}")
        out["decoded"] = model.decode_codes(codes)
    yield "", out


def ten_crop_inputs(vector: Vector) -> set[str]:
    """Names of the arrays of a `ten_crop` file that are only inputs."""
    return {"kind", "cases"} | {f"image_{i}" for i in range(len(_cases(vector)))}


def _cases(vector: Vector) -> list[Any]:
    cases = vector.json("cases")
    if not isinstance(cases, list) or not cases:
        raise vector.fail("`cases` is not a JSON list of cases")
    return cases


def _case(vector: Vector, i: int, case: Any) -> tuple[ViewGeometry, Array]:
    """Geometry and image uint8 (H, W, C) of the i-th case."""
    given = case if isinstance(case, dict) else {}
    size, stretch = given.get("image_size", 0), given.get("crop_range", 0)
    if type(size) is not int or type(stretch) not in (int, float) or not (0 < size <= MAX_SIZE and 1 <= stretch <= 4):
        raise vector.fail(f"`cases` has {case!r}: image_size must be 1..{MAX_SIZE} and crop_range 1..4")
    image = vector.need(f"image_{i}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise vector.fail(f"`image_{i}` must be uint8 (H, W, 3), not {image.dtype} {image.shape}")
    return ViewGeometry(size, "ten", stretch), image


def read_ten_crop(vector: Vector) -> Iterator[Reading]:
    """`ten_crop`: centre_crop_i and views_i of every image_i, whose sizes are in `cases`."""
    from PIL import Image

    out = {}
    for i, case in enumerate(_cases(vector)):
        geometry, image = _case(vector, i, case)
        try:
            crop = centre_crop(Image.fromarray(image), geometry.side)
        except BadImageError as error:
            raise vector.fail(f"`image_{i}`: {error}") from None
        out[f"centre_crop_{i}"] = torch.from_numpy(crop.copy())
        out[f"views_{i}"] = torch.from_numpy(np.stack([geometry.view(crop, v) for v in range(geometry.num_views)]))
    yield "", out
