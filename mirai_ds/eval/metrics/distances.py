"""Numbers on features: Frechet distance and Inception Score, in the arithmetic of the ADM evaluator.

Source: openai/guided-diffusion, evaluations/evaluator.py (commit 22e0df8): means in the features' own fp32, covariances
in fp64, scores in fp32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from mirai_ds.config import UserError

Array = np.ndarray[Any, Any]

SPLIT_SIZE = 5000  # images of one Inception Score; the mean over splits is what is published


class GaussianStatistics(NamedTuple):
    """mean (d,) and covariance (d, d) of features."""

    mean: Array
    covariance: Array


def gaussian_statistics(features: Array) -> GaussianStatistics:
    """features (n, d) -> mean in their own dtype (fp32 as ADM), covariance fp64 with n - 1.  Needs about 16 n d bytes.

    Raises UserError for fewer than two rows and for values that are not finite.
    """
    if len(features) < 2:
        raise UserError(f"{len(features)} images: a covariance needs at least 2")
    if not np.isfinite(features).all():
        raise UserError(
            "the features hold NaN or infinity: the network's weights file is damaged or not of this network"
        )
    return GaussianStatistics(np.mean(features, axis=0), np.atleast_2d(np.cov(features, rowvar=False)))


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """|ma - mb|^2 + tr(A + B - 2 sqrt(A B)).

    The trace of the root is that of sqrt(sqrt(A) B sqrt(A)), symmetric, by eigenvalues in fp64.  Where A B is singular
    this has no failing case, so that ADM's retry with 1e-6 on both diagonals (for a root that is not finite) has
    nothing to do; rounding leaves about 1e-8 of the traces, as in scipy's root.
    """
    difference = np.atleast_1d(a.mean) - np.atleast_1d(b.mean)
    first, second = (torch.from_numpy(np.asarray(s.covariance, np.float64)) for s in (a, b))
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ second @ root
    shared = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(difference.dot(difference) + traces - 2 * float(shared))


def inception_score(probabilities: Array, split_size: int = SPLIT_SIZE) -> float:
    """probabilities (n, classes) fp32 -> mean over splits of consecutive images of exp(mean KL to the split's mean).

    The last split may be short.  All in fp32 without an epsilon, as ADM: an exact zero gives NaN.
    """
    scores = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for start in range(0, len(probabilities), split_size):
            part = probabilities[start : start + split_size]
            divergence = part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))
            scores.append(np.exp(np.mean(np.sum(divergence, axis=1))))
    return float(np.mean(scores))
