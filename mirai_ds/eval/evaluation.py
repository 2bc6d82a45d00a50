"""Samples against a reference, from files to one row with its whole protocol."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mirai_ds.config import UserError
from mirai_ds.eval.feature_cache import Extracted, features_of
from mirai_ds.eval.features import (
    BATCH_SIZE,
    METRICS,
    FeatureNetwork,
    Reference,
    Scores,
    check_metrics,
    default_arithmetic,
    score,
)
from mirai_ds.eval.image_sources import ImageSource, open_images
from mirai_ds.eval.metrics.distances import frechet_distance, gaussian_statistics
from mirai_ds.eval.metrics.inception import InceptionFeatures
from mirai_ds.eval.metrics.manifold import Arithmetic
from mirai_ds.eval.reference_file import ReferenceFile, open_reference
from mirai_ds.runtime.environment import package_versions
from mirai_ds.version import __version__

PUBLISHED_SAMPLES = 50_000
COLUMNS = ("fid", "sfid", "inception_score", "precision", "recall", "frechet_distance")
PACKAGES = ("torch", "torch-fidelity", "timm", "numpy", "pillow")
# Between the reference's own 10,000 images and its statistics: some 5 are expected from their number (an estimate, the
# file was not at hand), other networks' features are hundreds away.
SELF_DISTANCE = 20.0

Progress = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate: metrics None = all that network and reference allow."""

    samples: Path
    reference: Path
    metrics: Sequence[str] | None = None
    arithmetic: Arithmetic | None = None
    cache: Path | None = None
    batch_size: int = BATCH_SIZE


# What a sampler says of its samples: an object with none of these is no record of one.
RECORDED = {
    "samples_sha256", "sha256", "cfg_scale", "cfg_interval", "temperature", "top_k", "top_p", "seed", "weights",
    "checkpoint_step", "policy",
}  # fmt: skip


def sidecar(samples: Path) -> dict[str, Any] | None:
    """The record that a sampler wrote beside its samples, with its `file`: `x.npz.json`, which is its own, or `x.json`
    where that is one by its content; None without one.

    Of a folder `x` it is `x.npz.json` too: the sampler's pictures lie beside its archive.  Raises UserError.
    """
    own = f"{samples.name}{'.npz' * samples.is_dir()}.json"
    for path in map(samples.with_name, (f"{samples.name}.json", f"{samples.stem}.json", own)):
        if not path.is_file() or path == samples:
            continue
        try:
            record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
        except (OSError, ValueError) as error:
            if path.name not in (own, f"{samples.name}.json"):
                continue
            raise UserError(f"{path}: the samples' record cannot be read ({error}); mend or remove it") from None
        if isinstance(record, dict) and RECORDED & record.keys() and not is_row(record):
            return {"file": path.name, **record}
    return None


def is_row(content: Any) -> bool:
    """Whether the content of a JSON file is what `evaluate_files` returns."""
    return isinstance(content, dict) and {"protocol", "num_samples", *COLUMNS} <= content.keys()


def evaluate_files(
    request: EvaluationRequest, network: FeatureNetwork, progress: Progress | None = None
) -> dict[str, Any]:
    """The row of `mirai-ds evaluate`: scores under `COLUMNS` (None = not computed), samples, reference and protocol.

    progress: given a title and a number of images, returns what is called with each batch's number.  Raises UserError.
    """
    if request.metrics is not None:
        check_metrics(request.metrics, network)
    samples = open_images(request.samples)
    reference = open_reference(request.reference, (samples.height, samples.width))
    record = sidecar(request.samples)
    digests = samples.digest(), reference.digest()
    kept = Kept(network, request, progress)
    given, stored, own = _prepare(reference, digests[1], kept)
    extracted = kept.features("samples", samples, digests[0])
    scores = score(extracted.features, given, network, request.metrics, request.arithmetic)
    values = {name: scores.values.get(name) for name in COLUMNS}
    protocol = _protocol(request, network, scores, stored, kept) | {
        "samples_resolution": [samples.height, samples.width],
        "reference_resolution": None if reference.images is None else [reference.images.height, reference.images.width],
        "reference_images": None if reference.images is None else reference.images.count,
        "reference_sizes": None if reference.images is None else reference.images.fit,
        "reference_made": reference.made,
        "reference_own_fid": own,
        "sampling": record,
    }
    protocol["departures"] = departures(samples, reference, network, protocol, digests[0])
    return {
        **{name: value if value is None or math.isfinite(value) else None for name, value in values.items()},
        "num_samples": samples.count,
        "samples": request.samples.name,
        "samples_sha256": digests[0],
        "reference": {"name": request.reference.name, "sha256": digests[1], "standard": reference.standard},
        "protocol": protocol,
    }


class Kept:
    """Takes features through the cache and records where each set's came from."""

    def __init__(self, network: FeatureNetwork, request: EvaluationRequest, progress: Progress | None) -> None:
        self.network, self.request, self.progress = network, request, progress
        self.origins: dict[str, str] = {}

    def features(self, name: str, source: ImageSource, digest: str) -> Extracted:
        """The features of `source`, extracted or read from the cache."""
        advance = None if self.progress is None else self.progress(name, source.count)
        extracted = features_of(source, digest, self.network, self.request.batch_size, self.request.cache, advance)
        self.origins[name] = extracted.origin
        return extracted


def _prepare(reference: ReferenceFile, digest: str, kept: Kept) -> tuple[Reference, dict[str, str], float | None]:
    """What to compare with, where each statistic is from, and the distance of the reference's images to its own.

    Stored statistics are Inception's.  Images go through the network only where something needs them.
    """
    metrics = kept.request.metrics or kept.network.metrics
    inception = isinstance(kept.network, InceptionFeatures)
    pooled, spatial = (reference.pooled, reference.spatial) if inception else (None, None)
    wanted = ("fid" in metrics and pooled is None) or ("sfid" in metrics and spatial is None) or "pr" in metrics
    stored = {"fid": "stored"} if pooled is not None else {}
    stored |= {"sfid": "stored"} if spatial is not None else {}
    if not wanted or reference.images is None:
        return Reference(pooled, spatial, None), stored, None
    features = kept.features("reference", reference.images, digest).features
    own = None if pooled is None else frechet_distance(gaussian_statistics(features.pooled), pooled)
    if pooled is None and "fid" in metrics:
        pooled = gaussian_statistics(features.pooled)
    if spatial is None and "sfid" in metrics and features.spatial is not None:
        spatial = gaussian_statistics(features.spatial)
    count = f"computed from {reference.images.count} images"
    stored = {"fid": count, "sfid": count, "frechet_distance": count} | stored
    return Reference(pooled, spatial, features.pooled), stored, own


def _protocol(
    request: EvaluationRequest, network: FeatureNetwork, scores: Scores, stored: dict[str, str], kept: Kept
) -> dict[str, Any]:
    arithmetic = request.arithmetic or default_arithmetic(network)
    device = network.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    nan = "inception_score" in scores.values and math.isnan(scores.values["inception_score"])
    return {
        "features": network.facts(),
        "statistics": {name: origin for name, origin in stored.items() if name in scores.values},
        "inception_score": "NaN: a class probability is exactly zero" if nan else "no bias, splits of 5000, fp32",
        "precision_recall": {
            "arithmetic": "fp64" if arithmetic == "exact" else "fp16 as ADM", "neighbour": 3,
            "blocks": scores.blocks, "blocks_in_fp32": scores.fp32_blocks,
        },
        "batch_size": request.batch_size,
        "origin": dict(kept.origins),
        "device": f"{device.type} ({name})",
        "versions": {"mirai_ds": __version__, "python": platform.python_version()} | package_versions(PACKAGES),
    }  # fmt: skip


def departures(
    samples: ImageSource, reference: ReferenceFile, network: FeatureNetwork, protocol: dict[str, Any], digest: str
) -> list[str]:
    """Why the scores cannot be put beside published ones (ImageNet at 256 pixels), each a sentence; empty when none."""
    if isinstance(network, InceptionFeatures):
        reasons = reference.departures() + _of_inception(samples.count, protocol["features"])
    else:
        same = "of the same weights file, reference and number of samples"
        reasons = [f"the features are of {network.name}: compare only with scores {same}"]
    images = reference.images
    if images is not None and (samples.height, samples.width) != (images.height, images.width):
        reasons.append(
            f"samples are {samples.width}x{samples.height}, the reference is {images.width}x{images.height}: resize "
            "samples as the sampler does (`mirai-ds sample`), sharpness alone moves every score"
        )
    own = protocol["reference_own_fid"]
    if own is not None and own > SELF_DISTANCE:
        reasons.append(
            f"the reference's own images are {own:.1f} away from its stored statistics: these are not of this network"
        )
    recorded = _recorded_digest(protocol["sampling"])
    if recorded is not None and recorded != digest and samples.path.is_file():
        reasons.append("the samples are not those that the record beside them is of (its sha256 differs)")
    return reasons


def _of_inception(samples: int, facts: dict[str, Any]) -> list[str]:
    reasons = []
    if not facts["published"]:
        reasons.append("the Inception file's digest is not the published one's")
    if facts["precision"] != "fp32":
        reasons.append("the network ran in TF32")
    if samples != PUBLISHED_SAMPLES:
        reasons.append(f"{samples} samples; published scores are of {PUBLISHED_SAMPLES}, and FID falls with the number")
    return reasons


def _recorded_digest(record: dict[str, Any] | None) -> str | None:
    digests = [record[key] for key in ("samples_sha256", "sha256") if key in record] if record else []
    return str(digests[0]) if digests else None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def all_metrics(text: str | None) -> tuple[str, ...] | None:
    """`fid,pr` as metrics, each once, in `METRICS` order; None for None.  Raises UserError for unknown names."""
    if text is None:
        return None
    given = [part.strip().lower() for part in text.split(",")]
    unknown = [name for name in given if name not in METRICS]
    if unknown:
        raise UserError(f"--metrics {text}: {unknown[0]!r} is unknown; use some of {','.join(METRICS)}")
    return tuple(metric for metric in METRICS if metric in given)
