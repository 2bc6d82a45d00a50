"""From images to features, and from features to scores; what files, commands and training hooks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mirai_ds.config import UserError
from mirai_ds.eval.metrics.distances import GaussianStatistics, frechet_distance, gaussian_statistics, inception_score
from mirai_ds.eval.metrics.inception import InceptionFeatures
from mirai_ds.eval.metrics.manifold import Arithmetic, precision_recall

Array = np.ndarray[Any, Any]
Images = Array | Tensor | Iterable[Array | Tensor]

BATCH_SIZE = 64  # ADM's
METRICS = ("fid", "sfid", "is", "pr")


class FeatureNetwork(Protocol):
    """What judges images: Inception (all metrics), or any timm network (Frechet distance, precision, recall)."""

    name: str
    metrics: tuple[str, ...]
    device: torch.device

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 (B, H, W, 3) -> pooled (B, d) and, where the network has them, spatial (B, e) features, fp32."""
        ...

    def facts(self) -> dict[str, Any]:
        """For the protocol: network, file, sha256 and what else decides the features."""
        ...


class Features(NamedTuple):
    """Features in fp32: pooled (n, d) and spatial (n, e), or None."""

    pooled: Array
    spatial: Array | None


@dataclass(frozen=True)
class Reference:
    """What samples are compared with; None where a metric has nothing to compare.

    pooled, spatial: for FID and sFID.  images: pooled features (m, d), for precision and recall.
    """

    pooled: GaussianStatistics | None
    spatial: GaussianStatistics | None
    images: Array | None


class Scores(NamedTuple):
    """values by name; of precision and recall's blocks of distances, how many left the range of fp16."""

    values: dict[str, float]
    blocks: int = 0
    fp32_blocks: int = 0


def extract_features(
    images: Images, network: FeatureNetwork, batch_size: int = BATCH_SIZE, progress: Callable[[int], None] | None = None
) -> Features:
    """Features of uint8 images (n, H, W, 3 or 1), or of an iterator of such batches; grey images are repeated.

    progress: called with the number of images of each batch done.  Raises UserError for anything but such images.
    """
    pooled, spatial = [], []
    for batch in _batches(images, batch_size):
        batch_pooled, batch_spatial = network.features(batch)
        pooled.append(batch_pooled.cpu().numpy())
        if batch_spatial is not None:
            spatial.append(batch_spatial.cpu().numpy())
        if progress is not None:
            progress(len(batch))
    if not pooled:
        raise UserError("no images to evaluate")
    return Features(np.concatenate(pooled), np.concatenate(spatial) if spatial else None)


def _batches(images: Images, size: int) -> Iterator[Tensor]:
    for part in [images] if isinstance(images, (np.ndarray, Tensor)) else images:
        batch = torch.as_tensor(part) if isinstance(part, Tensor) or part.flags.writeable else torch.tensor(part)
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[3] not in (1, 3):
            raise UserError(f"images to evaluate are {batch.dtype} {tuple(batch.shape)}, not uint8 (n, H, W, 3)")
        for piece in batch.split(size):
            yield piece if piece.shape[3] == 3 else piece.expand(-1, -1, -1, 3)


def reference_of(features: Features) -> Reference:
    """The reference that a set of images is, all statistics computed."""
    spatial = None if features.spatial is None else gaussian_statistics(features.spatial)
    return Reference(gaussian_statistics(features.pooled), spatial, features.pooled)


def check_metrics(metrics: Sequence[str], network: FeatureNetwork) -> None:
    """Raises UserError for unknown metrics and for those that `network` does not define."""
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"metrics: {metric!r} is unknown; use some of {','.join(METRICS)}")
        if metric not in network.metrics:
            reason = "sFID is of a layer of Inception" if metric == "sfid" else "the Inception Score is of its classes"
            raise UserError(f"metrics: {metric!r} is not defined with {network.name} ({reason})")
    if not metrics:
        raise UserError(f"metrics: none given; use some of {','.join(METRICS)}")


def score(
    samples: Features, reference: Reference, network: FeatureNetwork, metrics: Sequence[str] | None = None,
    arithmetic: Arithmetic | None = None,
) -> Scores:  # fmt: skip
    """The metrics (default all that network and reference allow) under the names of their columns.

    fid, sfid, inception_score, precision, recall.  With another network than Inception the distance is
    `frechet_distance`: it is no FID.  arithmetic: of precision and recall; default ADM's for Inception, else exact.
    An Inception Score with an exact zero among the probabilities is NaN, as in ADM.  Raises UserError where something
    is missing.
    """
    allowed = allowed_metrics(reference, network)
    metrics = allowed if metrics is None else metrics
    check_metrics(metrics, network)
    missing = [metric for metric in metrics if metric not in allowed]
    if missing:
        need = {"fid": "mu and sigma, or images", "sfid": "mu_s and sigma_s, or images", "pr": "images"}
        raise UserError(f"metrics: {missing[0]!r} needs a reference with {need[missing[0]]}")
    inception = isinstance(network, InceptionFeatures)
    values: dict[str, float] = {}
    if "fid" in metrics and reference.pooled is not None:
        name = "fid" if inception else "frechet_distance"
        values[name] = frechet_distance(gaussian_statistics(samples.pooled), reference.pooled)
    if "sfid" in metrics and reference.spatial is not None and samples.spatial is not None:
        values["sfid"] = frechet_distance(gaussian_statistics(samples.spatial), reference.spatial)
    if "is" in metrics and isinstance(network, InceptionFeatures):
        values["inception_score"] = inception_score(network.probabilities(samples.pooled))
    if "pr" not in metrics or reference.images is None:
        return Scores(values)
    sets = [torch.from_numpy(rows).to(network.device) for rows in (reference.images, samples.pooled)]
    scored = precision_recall(sets[0], sets[1], arithmetic or default_arithmetic(network))
    values |= {"precision": scored.precision, "recall": scored.recall}
    return Scores(values, scored.blocks, scored.fp32_blocks)


def default_arithmetic(network: FeatureNetwork) -> Arithmetic:
    """ADM's half precision is for numbers to be compared with ADM's, and for the range of Inception's features."""
    return "adm" if isinstance(network, InceptionFeatures) else "exact"


def allowed_metrics(reference: Reference, network: FeatureNetwork) -> tuple[str, ...]:
    """The names in `METRICS` that both the network and the reference allow."""
    has = {"fid": reference.pooled, "sfid": reference.spatial, "is": (), "pr": reference.images}
    return tuple(m for m in METRICS if m in network.metrics and has[m] is not None)


def evaluate_features(
    samples: Images, reference: Reference, network: FeatureNetwork, metrics: Sequence[str] | None = None,
    arithmetic: Arithmetic | None = None, batch_size: int = BATCH_SIZE,
) -> dict[str, float]:  # fmt: skip
    """`score` of uint8 images (n, H, W, 3) or an iterator of batches of them, e.g. within training.

    Leaves the process as it found it: no random number is drawn, precision switches are put back, nothing is kept.
    Where ranks share the work, each calls `extract_features` for its own images, and one calls `score` for all.
    """
    return score(extract_features(samples, network, batch_size), reference, network, metrics, arithmetic).values
