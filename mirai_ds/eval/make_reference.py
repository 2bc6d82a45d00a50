"""`mirai-ds reference`: one's own images as a reference file in the layout of ADM's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mirai_ds.config import UserError
from mirai_ds.eval.evaluation import Progress
from mirai_ds.eval.features import BATCH_SIZE, Features, extract_features
from mirai_ds.eval.image_sources import ImageSource
from mirai_ds.eval.metrics.distances import gaussian_statistics
from mirai_ds.eval.metrics.inception import InceptionFeatures
from mirai_ds.eval.real_images import open_real_images
from mirai_ds.eval.reference_file import PROTOCOL, STANDARD_IMAGES
from mirai_ds.runtime.disk import write_arrays
from mirai_ds.version import __version__

Array = np.ndarray[Any, Any]


def make_reference(
    source: Path, out: Path, side: int | None, network: InceptionFeatures | None, most: int = STANDARD_IMAGES,
    progress: Progress | None = None,
) -> str:  # fmt: skip
    """Write `arr_0`, uint8 (m, side, side, 3), of up to `most` images, evenly chosen; with a network `mu`, `sigma`,
    `mu_s` and `sigma_s` of all; and `protocol`, JSON about it.  Returns a line about it.

    Raises UserError, also where `out` is there.
    """
    if out.suffix != ".npz":
        raise UserError(f"--out {out}: a reference ends in .npz")
    if out.exists():
        raise UserError(f"--out {out}: is there already; give another name")
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; give a store, or a folder of images")
    images = open_real_images(source, side)
    chosen = np.unique(np.linspace(0, images.count - 1, min(most, images.count)).round().astype(np.int64))
    kept, features = _read(images, set(chosen.tolist()), network, progress)
    arrays: dict[str, Any] = {"arr_0": kept}
    facts: dict[str, Any] = {
        "source": source.name, "source_sha256": images.digest(), "images": images.count, "shown": len(kept),
        "sizes": images.fit, "mirai_ds": __version__,
    }  # fmt: skip
    if features is not None and features.spatial is not None and network is not None:
        pooled, spatial = gaussian_statistics(features.pooled), gaussian_statistics(features.spatial)
        arrays |= {"mu": pooled.mean, "sigma": pooled.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
        facts["network_sha256"] = network.facts()["sha256"]
    arrays[PROTOCOL] = np.array(json.dumps(facts))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(out, arrays)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from None
    with_ = f"statistics of all {images.count}" if features is not None else "no statistics (--weights makes them)"
    return f"{out}: {len(kept)} images of {images.width}x{images.height} pixels ({images.fit}), {with_}"


def _read(
    images: ImageSource, chosen: set[int], network: InceptionFeatures | None, progress: Progress | None
) -> tuple[Array, Features | None]:
    """The chosen images, and the features of all, in one pass."""
    advance = (lambda count: None) if progress is None else progress("reference", images.count)
    kept: list[Array] = []
    parts: list[Features] = []
    at = 0
    for batch in images.batches(BATCH_SIZE):
        kept.append(batch[[n - at for n in range(at, at + len(batch)) if n in chosen]])
        if network is not None:
            parts.append(extract_features(batch, network))
        at += len(batch)
        advance(len(batch))
    if not parts:
        return np.concatenate(kept), None
    spatial = np.concatenate([part.spatial for part in parts if part.spatial is not None])
    return np.concatenate(kept), Features(np.concatenate([part.pooled for part in parts]), spatial)
