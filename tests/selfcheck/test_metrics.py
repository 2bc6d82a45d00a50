"""The vector of the ADM evaluation suite passes on right numbers, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mirai_ds.eval.metrics import inception, manifold
from mirai_ds.selfcheck import metrics
from mirai_ds.selfcheck.check import verify_file, verify_files
from tests.one_line import one_line
from tests.selfcheck.vectors import FIXTURES, arrays_of, check, failed

ADM = FIXTURES / "adm_metrics.npz"
TOLERANCES = {
    "fid": 1e-6, "inception_score": 1e-6, "precision": 5e-3, "recall": 5e-3, "precision_exact": 0,
    "recall_exact": 0, "resized_299": 0,
}  # fmt: skip


@pytest.mark.parametrize("tolerance", [1e-5, 0.99])
def test_vector_passes_each_array_by_its_own_tolerance(tolerance: float) -> None:
    (result,) = verify_files([ADM], tolerance)
    assert failed(result) == set()
    assert {record.name: record.tolerance for record in result.records} == TOLERANCES
    assert {record.error for record in result.records if record.tolerance == 0} == {0.0}


@pytest.mark.parametrize("name", TOLERANCES)
def test_a_value_just_beyond_its_tolerance_fails(name: str, tmp_path: Path) -> None:
    arrays = arrays_of("adm_metrics")
    value = arrays[name].astype(np.float64)
    arrays[name] = value * (1 + 1.5 * TOLERANCES[name] + 1e-15) if name != "resized_299" else np.nextafter(value, 999)
    assert failed(check(tmp_path, arrays, 0.99)) == {name}


def other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns first: 3e-5 grey levels."""
    right = inception.resize_bilinear_tf1
    monkeypatch.setattr(metrics, "resize_bilinear_tf1", lambda x: right(x.transpose(-1, -2)).transpose(-1, -2))


def other_interpolation(monkeypatch: pytest.MonkeyPatch) -> None:
    """a (1 - t) + b t."""

    def resized(images: torch.Tensor) -> torch.Tensor:
        for dim in (-1, -2):
            low, high, t = inception._positions(images.shape[dim], 299, images.device)
            t = t[:, None] if dim == -2 else t
            images = images.index_select(dim, low) * (1 - t) + images.index_select(dim, high) * t
        return images

    monkeypatch.setattr(metrics, "resize_bilinear_tf1", resized)


def other_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "NEIGHBOUR", 4)


def other_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    right = metrics.gaussian_statistics

    def biased(features: Any) -> Any:
        found = right(features)
        return found._replace(covariance=found.covariance * (1 - 1 / len(features)))

    monkeypatch.setattr(metrics, "gaussian_statistics", biased)


def one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    right = metrics.inception_score
    monkeypatch.setattr(metrics, "inception_score", lambda probabilities, split: right(probabilities, 10**6))


@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [
        (other_order, {"resized_299"}),
        (other_interpolation, {"resized_299"}),
        (other_neighbour, {"precision", "recall", "precision_exact", "recall_exact"}),
        (other_covariance, {"fid"}),
        (one_split, {"inception_score"}),
    ],
)
def test_other_metrics_fail(
    spoil: Callable[[pytest.MonkeyPatch], None], wrong: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    assert failed(verify_file(ADM)) == wrong


def test_part_of_a_file_and_unknown_arrays(tmp_path: Path) -> None:
    arrays = arrays_of("adm_metrics")
    part = {key: arrays[key] for key in ("kind", "probabilities", "split_size", "inception_score")}
    assert failed(check(tmp_path, part)) == set()
    result = check(tmp_path, arrays | {"kid": np.float64(1)})
    assert failed(result) == {"kid"}


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("sample_features", np.zeros((9, 3), np.float32), "do not fit"),
        ("sample_features", np.zeros((9, 192), np.int64), "`sample_features` must be (n, d) floats"),
        ("sample_features", np.zeros((3, 192), np.float32), "at least 4"),
        ("split_size", np.int64(0), "`split_size` = 0"),
        ("image", np.zeros((4, 4, 3), np.uint8), "`image` is uint8 (4, 4, 3)"),
        ("resized_stride", np.array([0, 7]), "`resized_stride` spans 0..7"),
    ],
)
def test_inputs_that_do_not_fit(name: str, value: Any, part: str, tmp_path: Path) -> None:
    one_line(lambda: check(tmp_path, arrays_of("adm_metrics") | {name: value}), "vector.npz", part)
