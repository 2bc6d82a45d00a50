"""Frechet distance against scipy's matrix root as ADM calls it; the Inception Score against its definition."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.linalg

from mirai_ds.eval.metrics.distances import GaussianStatistics, frechet_distance, gaussian_statistics, inception_score
from tests.one_line import one_line

Array = np.ndarray[Any, Any]


def adm_distance(a: GaussianStatistics, b: GaussianStatistics) -> tuple[float, float]:
    """ADM's way: the general root of the product, again with 1e-6 on the diagonals when it is not finite; and what was
    on them.  Of which singular products scipy finds a root depends on its version and the processor."""
    offset = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
        if not np.isfinite(root).all():
            offset = 1e-6
            root = scipy.linalg.sqrtm(raised(a, offset).covariance @ raised(b, offset).covariance)
    assert np.abs(np.diagonal(np.imag(root))).max() < 1e-3
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance + b.covariance - 2 * np.real(root))), offset


def raised(statistics: GaussianStatistics, offset: float) -> GaussianStatistics:
    """With `offset` more on the diagonal of the covariance."""
    return GaussianStatistics(statistics.mean, statistics.covariance + offset * np.eye(len(statistics.covariance)))


def features(rows: int, width: int, seed: int, dead: int = 0) -> Array:
    """Positive, correlated, as pooled features are; `dead` of them always 0."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).standard_normal((width, width)) / math.sqrt(width)
    x = np.abs(rng.standard_normal((rows, width)) @ mixing).astype(np.float32)
    x[:, rng.choice(width, dead, replace=False)] = 0
    return x


CASES = {
    "full rank": ((900, 96, 1), (800, 96, 2)),
    "fewer rows than features": ((40, 96, 1), (50, 96, 2)),
    "dead features in one": ((900, 96, 1, 20), (800, 96, 2)),
    "other dead features in each": ((900, 96, 1, 20), (40, 96, 2, 30)),
    "rank one": ((2, 96, 1), (800, 96, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_distance_is_adms(case: str) -> None:
    """Where the product is singular both lose half the digits of the traces, about 1e-8 of them."""
    a, b = (gaussian_statistics(features(*arguments)) for arguments in CASES[case])
    wanted, offset = adm_distance(a, b)
    wanted += 2 * offset * len(a.mean)  # ADM takes the traces without it
    a, b = raised(a, offset), raised(b, offset)
    traces = float(np.trace(a.covariance) + np.trace(b.covariance))
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-9, abs=1e-7 * traces)
    assert frechet_distance(b, a) == pytest.approx(wanted, rel=1e-9, abs=1e-7 * traces)


def test_distance_of_known_gaussians() -> None:
    """Diagonal covariances commute: the distance is |dm|^2 + sum (sqrt a - sqrt b)^2."""
    a = GaussianStatistics(np.array([1.0, 2.0, 0.0]), np.diag([4.0, 1.0, 0.0]))
    b = GaussianStatistics(np.array([1.0, 0.0, 3.0]), np.diag([9.0, 1.0, 16.0]))
    assert frechet_distance(a, b) == pytest.approx(4 + 9 + 1 + 0 + 16, rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    nothing = GaussianStatistics(np.zeros(3), np.zeros((3, 3)))
    assert frechet_distance(nothing, b) == pytest.approx(9 + 1 + 9 + 1 + 16, rel=1e-12)


def test_statistics_keep_the_features_precision() -> None:
    """The mean is a fp32 sum over rows, as NumPy's and so ADM's; the covariance is not."""
    x = features(3000, 5, 3) + np.float32(1000)
    found = gaussian_statistics(x)
    assert found.mean.dtype == np.float32
    total = np.zeros(5, np.float32)
    for row in x:
        total += row
    np.testing.assert_array_equal(found.mean, total / np.float32(3000))
    assert np.abs(found.mean - x.astype(np.float64).mean(axis=0)).max() > 1e-4  # so the order of the sum shows
    centred = x.astype(np.float64) - x.astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(found.covariance, centred.T @ centred / 2999, rtol=1e-9)


def test_statistics_need_numbers() -> None:
    one_line(lambda: gaussian_statistics(np.zeros((1, 4), np.float32)), "1 images", "at least 2")
    one_line(lambda: gaussian_statistics(np.full((4, 4), np.nan, np.float32)), "NaN")


def plain_score(probabilities: Array, split: int) -> float:
    """exp(mean KL) per split in fp64."""
    scores = []
    for start in range(0, len(probabilities), split):
        part = probabilities[start : start + split].astype(np.float64)
        marginal = part.mean(axis=0)
        scores.append(math.exp(sum((row * np.log(row / marginal)).sum() for row in part) / len(part)))
    return sum(scores) / len(scores)


def test_inception_score_by_splits() -> None:
    """The last split is short; a plain mean over splits.  fp32 against fp64: 1e-5."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((250, 30)) * 3
    probabilities = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)
    for split in (100, 250, 1000, 7):
        assert inception_score(probabilities, split) == pytest.approx(plain_score(probabilities, split), rel=1e-5)
    assert inception_score(probabilities, 100) != pytest.approx(inception_score(probabilities, 250), rel=1e-3)


def test_published_inception_scores_are_of_splits_of_5000() -> None:
    probabilities = np.random.default_rng(0).dirichlet([0.5, 0.5, 0.5], 5600).astype(np.float32) + np.float32(1e-6)
    assert inception_score(probabilities) == pytest.approx(plain_score(probabilities, 5000), rel=1e-5)
    assert inception_score(probabilities) != pytest.approx(plain_score(probabilities, 2500), rel=1e-4)


def test_inception_score_of_known_probabilities() -> None:
    """Sure of n classes, each equally often: n.  All alike: 1.  A zero: ADM has no epsilon, so NaN."""
    sure = np.full((40, 4), 1e-12, np.float32)
    sure[np.arange(40), np.arange(40) % 4] = 1
    assert inception_score(sure) == pytest.approx(4, rel=1e-5)
    assert inception_score(np.full((10, 8), 0.125, np.float32)) == pytest.approx(1, rel=1e-6)
    sure[3] = [0, 0, 0, 1]
    assert math.isnan(inception_score(sure))
