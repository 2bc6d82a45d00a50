"""From files to a row: which statistics are used, what goes through the network, what makes scores incomparable."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mirai_ds.eval import evaluation, features
from mirai_ds.eval.evaluation import EvaluationRequest, evaluate_files
from mirai_ds.eval.features import Features, Reference, evaluate_features, extract_features, reference_of, score
from mirai_ds.eval.metrics.distances import GaussianStatistics, frechet_distance, gaussian_statistics
from mirai_ds.eval.metrics.inception import POOLED, SPATIAL, InceptionFeatures
from mirai_ds.eval.metrics.manifold import precision_recall
from mirai_ds.eval.report import render
from tests.eval.judges import ColourNetwork, digits, saved
from tests.one_line import one_line


def test_a_row_by_hand(tmp_path: Path) -> None:
    """Every number of a row from its definition, with a network whose features are seen here too."""
    network = ColourNetwork()
    given, wanted = digits(60), digits(50, start=60)
    row = evaluate_files(
        EvaluationRequest(saved(tmp_path / "s.npz", given), saved(tmp_path / "r.npz", wanted)), network
    )
    a, b = (network.features(torch.from_numpy(images))[0] for images in (given, wanted))
    distance = frechet_distance(gaussian_statistics(a.numpy()), gaussian_statistics(b.numpy()))
    balls = precision_recall(b, a, "exact")
    assert row["frechet_distance"] == distance > 0
    assert (row["precision"], row["recall"]) == (balls.precision, balls.recall)
    assert (row["fid"], row["sfid"], row["inception_score"]) == (None, None, None)
    assert row["num_samples"] == 60
    assert row["samples_sha256"] == evaluation.open_images(tmp_path / "s.npz").digest()
    assert row["reference"] == {"name": "r.npz", "sha256": row["reference"]["sha256"], "standard": False}
    protocol = row["protocol"]
    assert protocol["statistics"] == {"frechet_distance": "computed from 50 images"}
    assert protocol["precision_recall"] | {"blocks": 0} == {
        "arithmetic": "fp64", "neighbour": 3, "blocks": 0, "blocks_in_fp32": 0,
    }  # fmt: skip
    assert len(protocol["departures"]) == 1
    assert "colours" in protocol["departures"][0]
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    text = render(row)
    assert f"Frechet distance   {distance:.6f}" in text
    assert row["samples_sha256"] in text
    assert "NOT comparable" in text
    assert "sFID and Inception Score are not defined with colours" in text
    assert "fp64" in text


def test_the_batch_size_does_not_show(tmp_path: Path) -> None:
    paths = saved(tmp_path / "s.npz", digits(30)), saved(tmp_path / "r.npz", digits(30, start=30))
    rows = [evaluate_files(EvaluationRequest(*paths, batch_size=size), ColourNetwork()) for size in (1, 7, 64)]
    assert len({row["frechet_distance"] for row in rows}) == 1


# --- Inception's references ------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances of 2048 features by their means alone: what is compared with what, without minutes of eigenvalues."""

    def by_means(a: GaussianStatistics, b: GaussianStatistics) -> float:
        return float(((a.mean - b.mean) ** 2).sum())

    for module in (features, evaluation):
        monkeypatch.setattr(module, "frechet_distance", by_means)


@pytest.fixture(scope="module")
def seen(inception: InceptionFeatures) -> dict[str, Features]:
    """Features of the two sets of the tests below."""
    return {
        "samples": extract_features(digits(5), inception),
        "reference": extract_features(digits(4, start=5, noise=99), inception),
    }


def stored(mean: float, mean_s: float) -> dict[str, Any]:
    return {
        "mu": np.full(POOLED, mean, np.float32), "sigma": np.zeros((POOLED, POOLED), np.float32),
        "mu_s": np.full(SPATIAL, mean_s, np.float32), "sigma_s": np.zeros((SPATIAL, SPATIAL), np.float32),
    }  # fmt: skip


@pytest.mark.usefixtures("quick")
def test_stored_statistics_are_used_and_images_only_for_balls(
    inception: InceptionFeatures, seen: dict[str, Features], tmp_path: Path
) -> None:
    samples = saved(tmp_path / "s.npz", digits(5))
    reference = saved(tmp_path / "r.npz", digits(4, start=5, noise=99), **stored(3.0, 5.0))
    row = evaluate_files(EvaluationRequest(samples, reference), inception)
    pooled, spatial = seen["samples"]
    assert spatial is not None
    assert row["fid"] == pytest.approx(float(((pooled.mean(axis=0) - 3) ** 2).sum()), rel=1e-5)
    assert row["sfid"] == pytest.approx(float(((spatial.mean(axis=0) - 5) ** 2).sum()), rel=1e-5)
    balls = precision_recall(torch.from_numpy(seen["reference"].pooled), torch.from_numpy(pooled), "adm")
    assert (row["precision"], row["recall"]) == balls[:2]
    protocol = row["protocol"]
    assert protocol["statistics"] == {"fid": "stored", "sfid": "stored"}
    own = float(((seen["reference"].pooled.mean(axis=0) - 3) ** 2).sum())
    assert protocol["reference_own_fid"] == pytest.approx(own, rel=1e-5)
    assert any("away from its stored statistics" in reason for reason in protocol["departures"])  # 4 of 2048 features
    assert protocol["precision_recall"]["arithmetic"] == "fp16 as ADM"
    score_of = np.log(inception.probabilities(pooled).astype(np.float64))
    probabilities = np.exp(score_of)
    divergence = (probabilities * (score_of - np.log(probabilities.mean(axis=0)))).sum(axis=1).mean()
    assert row["inception_score"] == pytest.approx(float(np.exp(divergence)), rel=1e-4)


@pytest.mark.usefixtures("quick")
def test_statistics_that_are_not_stored_are_computed(
    inception: InceptionFeatures, seen: dict[str, Features], tmp_path: Path
) -> None:
    half = {key: value for key, value in stored(3.0, 0).items() if not key.endswith("_s")}
    request = EvaluationRequest(
        saved(tmp_path / "s.npz", digits(5)), saved(tmp_path / "r.npz", digits(4, start=5, noise=99), **half),
        metrics=("fid", "sfid"),
    )  # fmt: skip
    row = evaluate_files(request, inception)
    assert row["protocol"]["statistics"] == {"fid": "stored", "sfid": "computed from 4 images"}
    spatial = [f.spatial.mean(axis=0) for f in seen.values() if f.spatial is not None]
    assert row["sfid"] == pytest.approx(float(((spatial[0] - spatial[1]) ** 2).sum()), rel=1e-4)
    assert row["fid"] == pytest.approx(float(((seen["samples"].pooled.mean(axis=0) - 3) ** 2).sum()), rel=1e-5)
    assert (row["precision"], row["inception_score"]) == (None, None)


@pytest.mark.usefixtures("quick")
def test_a_reference_of_statistics_alone(inception: InceptionFeatures, tmp_path: Path) -> None:
    samples, path = saved(tmp_path / "s.npz", digits(5)), tmp_path / "r.npz"
    np.savez(path, **stored(3.0, 5.0))
    row = evaluate_files(EvaluationRequest(samples, path), inception)
    assert (row["precision"], row["recall"]) == (None, None)
    assert row["fid"] > 0
    assert row["protocol"]["origin"].keys() == {"samples"}
    one_line(
        lambda: evaluate_files(EvaluationRequest(samples, path, metrics=("pr",)), inception),
        "'pr' needs a reference with",
    )


def test_metrics_that_a_network_has_not(tmp_path: Path) -> None:
    paths = saved(tmp_path / "s.npz", digits(5)), saved(tmp_path / "r.npz", digits(5))
    for metric, part in (("sfid", "layer of Inception"), ("is", "of its classes"), ("kid", "'kid' is unknown")):
        one_line(
            lambda metric=metric: evaluate_files(EvaluationRequest(*paths, metrics=(metric,)), ColourNetwork()), part
        )


def test_an_exact_zero_is_not_hidden(inception: InceptionFeatures, tmp_path: Path, monkeypatch: Any) -> None:
    def zero(self: InceptionFeatures, pooled: Any) -> Any:
        return np.eye(1008, dtype=np.float32)[: len(pooled)]

    monkeypatch.setattr(InceptionFeatures, "probabilities", zero)
    paths = saved(tmp_path / "s.npz", digits(2)), saved(tmp_path / "r.npz", digits(2))
    row = evaluate_files(EvaluationRequest(*paths, metrics=("is",)), inception)
    assert row["inception_score"] is None
    assert "Inception Score    NaN: a class probability is exactly zero" in render(row)
    json.dumps(row, allow_nan=False)


# --- the cache -------------------------------------------------------------------------------------------------------


def test_the_reference_goes_through_the_network_once(tmp_path: Path) -> None:
    network, cache = ColourNetwork(), tmp_path / "cache"
    reference = saved(tmp_path / "r.npz", digits(20))
    rows = []
    for i in range(3):
        samples = saved(tmp_path / f"s{i}.npz", digits(10, start=20 + 10 * i))
        rows.append(evaluate_files(EvaluationRequest(samples, reference, cache=cache), network))
    assert network.seen == 20 + 30
    fresh = evaluate_files(EvaluationRequest(tmp_path / "s2.npz", reference), ColourNetwork())
    assert (rows[2]["frechet_distance"], rows[2]["recall"]) == (fresh["frechet_distance"], fresh["recall"])
    assert rows[0]["protocol"]["origin"]["reference"].startswith("computed on cpu")
    assert rows[2]["protocol"]["origin"]["reference"].startswith("cached: computed on cpu")
    other = ColourNetwork(digest="1")  # another weights file
    evaluate_files(EvaluationRequest(tmp_path / "s2.npz", reference, cache=cache), other)
    assert other.seen == 30
    reference.rename(tmp_path / "moved.npz")
    evaluate_files(EvaluationRequest(tmp_path / "s2.npz", tmp_path / "moved.npz", cache=cache), other)
    assert other.seen == 30
    saved(tmp_path / "moved.npz", digits(20, start=1))  # another reference of the same name
    evaluate_files(EvaluationRequest(tmp_path / "s2.npz", tmp_path / "moved.npz", cache=cache), other)
    assert other.seen == 50


def test_a_damaged_cache_file_is_named(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    request = EvaluationRequest(saved(tmp_path / "s.npz", digits(9)), saved(tmp_path / "r.npz", digits(8)), cache=cache)
    evaluate_files(request, ColourNetwork())
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:-200])
    one_line(lambda: evaluate_files(request, ColourNetwork()), "features-", "is damaged", "remove it")
    blocked = tmp_path / "file"
    blocked.write_text("")
    request = EvaluationRequest(request.samples, request.reference, cache=blocked / "cache")
    one_line(lambda: evaluate_files(request, ColourNetwork()), "--cache", "cannot be written")


# --- the record beside the samples -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["s.npz.json", "s.json"])
def test_the_samplers_record_is_part_of_the_protocol(name: str, tmp_path: Path) -> None:
    samples = saved(tmp_path / "s.npz", digits(9))
    request = EvaluationRequest(samples, saved(tmp_path / "r.npz", digits(8)))
    digest = evaluation.open_images(samples).digest()
    (tmp_path / name).write_text(json.dumps({"cfg_scale": 1.75, "weights": "ema", "sha256": digest}))
    row = evaluate_files(request, ColourNetwork())
    assert row["protocol"]["sampling"] == {"file": name, "cfg_scale": 1.75, "weights": "ema", "sha256": digest}
    assert "cfg_scale 1.75, weights ema" in render(row)
    assert not any("record" in reason for reason in row["protocol"]["departures"])
    (tmp_path / name).write_text(json.dumps({"samples_sha256": "0" * 64}))
    row = evaluate_files(request, ColourNetwork())
    assert any("not those that the record beside them is of" in reason for reason in row["protocol"]["departures"])
    folder = tmp_path / "s"  # pictures beside the archive: the digest in its record is not theirs
    folder.mkdir()
    Image.fromarray(digits(1)[0]).save(folder / "0.png")
    Image.fromarray(digits(2)[1]).save(folder / "1.png")
    row = evaluate_files(EvaluationRequest(folder, request.reference, metrics=("fid",)), ColourNetwork())
    assert row["protocol"]["sampling"]["file"] == name
    assert not any("record" in reason for reason in row["protocol"]["departures"])
    for text, said in (("{", "cannot be read"), ('{"temperature": NaN}', "NaN is no JSON")):
        (tmp_path / name).write_text(text)
        if name == "s.npz.json":  # the sampler's own name
            one_line(lambda: evaluate_files(request, ColourNetwork()), name, said)
        else:
            assert evaluate_files(request, ColourNetwork())["protocol"]["sampling"] is None


@pytest.mark.parametrize("name", ["s.npz.json", "s.json"])
def test_a_record_is_known_by_what_it_says(name: str, tmp_path: Path) -> None:
    """Labels, scores and other JSON may lie beside samples too."""
    request = EvaluationRequest(saved(tmp_path / "s.npz", digits(9)), saved(tmp_path / "r.npz", digits(8)))
    row = evaluate_files(request, ColourNetwork())
    for content in ([3, 1, 4], {}, {"classes": ["a", "b"]}, row):
        (tmp_path / name).write_text(json.dumps(content))
        again = evaluate_files(request, ColourNetwork())
        assert again["protocol"]["sampling"] is None
        assert "unknown: no record beside the samples" in render(again)
    if name == "s.json":  # passed over for the sampler's own
        (tmp_path / "s.npz.json").write_text(json.dumps({"cfg_scale": 1.5}))
        assert evaluate_files(request, ColourNetwork())["protocol"]["sampling"]["cfg_scale"] == 1.5


def test_sizes_are_compared_before_the_network_runs(tmp_path: Path) -> None:
    """In samples: those of a model are of one size.  What the network would have been given is never read."""
    good = saved(tmp_path / "s.npz", digits(9))
    (tmp_path / "f").mkdir()
    for number, image in enumerate(digits(5)):
        Image.fromarray(image[: 31 if number == 4 else None]).save(tmp_path / "f" / f"{number}.png")

    class Untouched(ColourNetwork):
        def features(self, images: torch.Tensor) -> Any:
            raise AssertionError("went through the network")

    request = EvaluationRequest(tmp_path / "f", good)
    one_line(lambda: evaluate_files(request, Untouched()), "4.png: is 32x31, 0.png is 32x32")
    (tmp_path / "f" / "4.png").write_bytes(b"no picture")
    one_line(lambda: evaluate_files(EvaluationRequest(tmp_path / "f", good), Untouched()), "4.png", "cannot be read")


@pytest.mark.usefixtures("quick")
def test_nothing_departs_from_the_published_protocol(
    inception: InceptionFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the published file's digest, the reference's properties, 50,000 samples of one size, and fp32."""
    images = digits(3).repeat(8, axis=1).repeat(8, axis=2)
    request = EvaluationRequest(
        saved(tmp_path / "s.npz", images), saved(tmp_path / "r.npz", images, **stored(0.0, 0.0)), metrics=("fid",)
    )  # fmt: skip
    monkeypatch.setattr(inception, "digest", "6726825d" + "0" * 56)
    monkeypatch.setattr(evaluation, "PUBLISHED_SAMPLES", 3)
    monkeypatch.setattr("mirai_ds.eval.reference_file.STANDARD_IMAGES", 3)
    row = evaluate_files(request, inception)
    assert row["protocol"]["departures"] == []
    assert row["reference"]["standard"] is True
    assert "Under the published protocol" in render(row)
    saved(request.samples, images[:2, ::2, ::2])
    few, small = evaluate_files(request, inception)["protocol"]["departures"]
    assert few.startswith("2 samples; published scores are of 3")
    assert small.startswith("samples are 128x128, the reference is 256x256")


# --- within training -------------------------------------------------------------------------------------------------


def test_arrays_and_batches_are_the_same() -> None:
    network, images = ColourNetwork(), digits(40)
    reference = reference_of(extract_features(digits(30, start=40), network))
    whole = evaluate_features(images, reference, network)
    assert whole.keys() == {"frechet_distance", "precision", "recall"}
    for batches in (iter([images[:7], images[7:]]), (torch.from_numpy(images[i : i + 1]) for i in range(40))):
        assert evaluate_features(batches, reference, network) == whole
    grey = images[..., :1]
    assert evaluate_features(grey, reference, network) == whole
    assert evaluate_features(torch.from_numpy(images), reference, network, ["pr"]).keys() == {"precision", "recall"}


def test_what_is_no_image(tmp_path: Path) -> None:
    network = ColourNetwork()
    reference = reference_of(extract_features(digits(10), network))
    for images in (np.zeros((4, 8, 8, 3), np.float32), np.zeros((4, 3, 8, 8), np.uint8), np.zeros((8, 8, 3), np.uint8)):
        one_line(lambda images=images: evaluate_features(images, reference, network), "not uint8 (n, H, W, 3)")
    one_line(lambda: evaluate_features([], reference, network), "no images")
    nothing = Reference(None, None, None)
    found = extract_features(digits(10), network)
    one_line(lambda: score(found, nothing, network, ["fid"]), "'fid' needs a reference with mu and sigma")


def test_training_is_left_alone() -> None:
    network, images = ColourNetwork(), digits(30)
    reference = reference_of(extract_features(images, network))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    torch.set_float32_matmul_precision("medium")
    try:
        evaluate_features(images, reference, network)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert torch.is_grad_enabled()
