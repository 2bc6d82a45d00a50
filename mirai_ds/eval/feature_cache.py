"""Features kept on disk, so that a reference goes through the network once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mirai_ds.config import UserError
from mirai_ds.eval.features import FeatureNetwork, Features, extract_features
from mirai_ds.eval.image_sources import ImageSource
from mirai_ds.runtime.disk import write_arrays
from mirai_ds.runtime.weight_files import first_line


class Extracted(NamedTuple):
    """Features, and for the protocol where they were computed."""

    features: Features
    origin: str


def features_of(
    source: ImageSource, digest: str, network: FeatureNetwork, batch_size: int, cache: Path | None,
    progress: Callable[[int], None] | None = None,
) -> Extracted:  # fmt: skip
    """The features of `source`, whose digest is given, from `cache` if they are there, and written there if not.

    The file's name is a digest of the images' and of what decides the features; a damaged file is a UserError.
    """
    here = f"computed on {network.device.type}, torch {torch.__version__}"
    path = None if cache is None else cache / f"features-{_key(digest, network)}.npz"
    if path is not None and path.is_file():
        return _read(path, source.count)
    features = extract_features(source.batches(batch_size), network, batch_size, progress)
    if path is not None:
        _write(path, features, here)
    return Extracted(features, here)


def _key(digest: str, network: FeatureNetwork) -> str:
    facts = {key: value for key, value in network.facts().items() if key != "file"}  # a moved file is the same
    return hashlib.sha256(f"1 {digest} {json.dumps(facts, sort_keys=True)}".encode()).hexdigest()[:32]


def _read(path: Path, count: int) -> Extracted:
    try:
        with np.load(path, allow_pickle=False) as data:
            spatial = data["spatial"] if "spatial" in data.files else None
            extracted = Extracted(Features(data["pooled"], spatial), f"cached: {data['origin'][()]}")
        if any(rows is not None and (rows.ndim, len(rows)) != (2, count) for rows in extracted.features):
            raise ValueError(f"does not hold features of {count} images")
    except Exception as error:  # bytes from anywhere: NumPy raises nearly any type on them
        raise UserError(f"{path}: is damaged ({first_line(error)}); remove it") from None
    return extracted


def _write(path: Path, features: Features, origin: str) -> None:
    arrays: dict[str, Any] = {"pooled": features.pooled, "origin": np.array(origin)}
    if features.spatial is not None:
        arrays["spatial"] = features.spatial
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(path, arrays)
    except OSError as error:
        raise UserError(f"--cache {path.parent}: cannot be written ({first_line(error)})") from None
