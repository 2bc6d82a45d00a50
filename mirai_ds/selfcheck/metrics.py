"""Reference vectors of the ADM evaluation suite."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mirai_ds.config import UserError
from mirai_ds.eval.metrics.distances import frechet_distance, gaussian_statistics, inception_score
from mirai_ds.eval.metrics.inception import resize_bilinear_tf1
from mirai_ds.eval.metrics.manifold import precision_recall
from mirai_ds.selfcheck.vectors import Array, Reading, Vector

INPUTS = {
    "kind", "seed", "reference_features", "sample_features", "probabilities", "split_size", "image", "resized_stride",
}  # fmt: skip
# Of the arrays' own: fp32 sums in another order, fp16 sums in TensorFlow's order (which is not pinned), nothing at all.
TOLERANCES = {
    "fid": 1e-6, "inception_score": 1e-6, "precision": 5e-3, "recall": 5e-3, "precision_exact": 0.0,
    "recall_exact": 0.0, "resized_299": 0.0,
}  # fmt: skip


def adm_inputs(vector: Vector) -> set[str]:
    """Names of the arrays of an `adm_metrics` file that are only inputs."""
    return INPUTS


def read_adm(vector: Vector) -> Iterator[Reading]:
    """`adm_metrics`: fid, precision and recall (fp16 and `_exact`) of features, inception_score, resized_299.

    resized_299 holds every `resized_stride`-th row and column of (B, 299, 299, 3), from the first on.
    """
    out: dict[str, Tensor] = {}
    if {"fid", "precision", "recall", "precision_exact", "recall_exact"} & vector.arrays.keys():
        out |= _of_features(vector)
    if "inception_score" in vector:
        split = vector.number("split_size")
        probabilities = _floats(vector, "probabilities")
        if split < 1:
            raise vector.fail(f"`split_size` = {split}: must be at least 1")
        out["inception_score"] = torch.tensor(inception_score(probabilities, split), dtype=torch.float64)
    if "resized_299" in vector:
        image, steps = vector.need("image"), vector.integers("resized_stride", 1, 299)
        if image.dtype != np.uint8 or image.ndim != 4 or image.size == 0 or steps.shape != (2,):
            problem = f"`image` is {image.dtype} {image.shape}, `resized_stride` {tuple(steps.shape)}"
            raise vector.fail(f"{problem}; they must be uint8 (B, H, W, C) and (2,)")
        resized = resize_bilinear_tf1(torch.from_numpy(image).permute(0, 3, 1, 2).float())
        out["resized_299"] = resized.permute(0, 2, 3, 1)[:, :: int(steps[0]), :: int(steps[1])]
    yield "", out


def _of_features(vector: Vector) -> dict[str, Tensor]:
    reference, samples = (_floats(vector, f"{name}_features") for name in ("reference", "sample"))
    if reference.shape[1] != samples.shape[1]:
        raise vector.fail(f"`reference_features` {reference.shape} and `sample_features` {samples.shape} do not fit")
    out = {}
    try:
        distance = frechet_distance(gaussian_statistics(samples), gaussian_statistics(reference))
        out["fid"] = torch.tensor(distance, dtype=torch.float64)
        for suffix, arithmetic in (("", "adm"), ("_exact", "exact")):
            scored = precision_recall(torch.from_numpy(reference), torch.from_numpy(samples), arithmetic)  # type: ignore[arg-type]
            for name, value in (("precision", scored.precision), ("recall", scored.recall)):
                shape = vector.arrays[name + suffix].shape if name + suffix in vector else ()
                out[name + suffix] = torch.full(shape, value, dtype=torch.float64)
    except UserError as error:
        raise vector.fail(str(error)) from None
    return out


def _floats(vector: Vector, name: str) -> Array:
    """A matrix of floats as fp32."""
    array = vector.need(name)
    if array.ndim != 2 or array.dtype.kind != "f" or array.size == 0:
        raise vector.fail(f"`{name}` must be (n, d) floats, not {array.dtype} {array.shape}")
    return np.ascontiguousarray(array, np.float32)
