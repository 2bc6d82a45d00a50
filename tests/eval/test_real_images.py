"""One's own images as a reference: brought to the samples' size by one rule, from folders and stores, and in a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from mirai_ds.cli.main import main
from mirai_ds.data.crops import centre_crop
from mirai_ds.data.image_sets import IdxImages
from mirai_ds.data.stores import open_image_store, open_token_store
from mirai_ds.eval.evaluation import EvaluationRequest, evaluate_files
from mirai_ds.eval.features import extract_features
from mirai_ds.eval.image_sources import AS_THEY_ARE, FIT, ImageSource
from mirai_ds.eval.make_reference import make_reference
from mirai_ds.eval.metrics.distances import gaussian_statistics
from mirai_ds.eval.metrics.inception import InceptionFeatures
from mirai_ds.eval.real_images import AS_TOKENS, open_real_images
from mirai_ds.eval.reference_file import open_reference
from mirai_ds.eval.report import render
from mirai_ds.extract import extract_codes, extract_images
from mirai_ds.extract.codebook import learn_codebook
from tests.eval.judges import ColourNetwork, digits, saved
from tests.extract.conftest import ALONE, cut_photographs, options
from tests.one_line import one_line

FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pieces of two photographs, 40 to 200 pixels a side, no two alike."""
    return cut_photographs(tmp_path_factory.mktemp("real") / "photos", each=5)


@pytest.fixture(scope="module")
def stores(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """codes and images: ten crops of 16 pixels from 24, so that no two are the same window."""
    folder = tmp_path_factory.mktemp("stores")
    learn_codebook(photos, folder / "book.npz", 16, 4, 64, None, 100, 0, None)
    extract_codes(options(photos, folder / "codes", crop_range=1.5), ALONE, folder / "book.npz")
    extract_images(options(photos, folder / "images", crop_range=1.5), ALONE)
    return folder


def pixels(source: ImageSource, batch: int = 5) -> np.ndarray:
    whole = np.concatenate([*source.batches(batch)])
    assert whole.shape == (source.count, source.height, source.width, 3)
    return whole


def test_a_folder_of_many_sizes_becomes_one_by_the_rule(photos: Path) -> None:
    source = open_real_images(photos, 24)
    got = pixels(source)
    assert (source.fit, source.count) == (FIT, 10)
    for number, name in enumerate(source.names):  # type: ignore[attr-defined]
        with Image.open(photos / name) as image:
            assert np.array_equal(got[number], centre_crop(image.convert("RGB"), 24))
    assert open_real_images(photos, 25).digest() != source.digest()  # a cache keeps the two apart
    one_line(lambda: open_real_images(photos), "bring all images to one size")


def test_images_of_the_right_size_stay_as_they_are(tmp_path: Path) -> None:
    for number, image in enumerate(digits(3)):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    fitted, plain = open_real_images(tmp_path, 32), open_real_images(tmp_path)
    assert fitted.fit == plain.fit == AS_THEY_ARE
    assert fitted.digest() == plain.digest()
    assert np.array_equal(pixels(fitted), digits(3))
    assert pixels(open_real_images(tmp_path, 16)).shape[1] == 16


def test_a_token_store_shows_its_middle_views(stores: Path) -> None:
    source, store = open_real_images(stores / "codes"), open_token_store(stores / "codes")
    book = store.codebook()
    assert book is not None
    middle = torch.from_numpy(store.codes[:, 4].astype(np.int64))  # of ten crops the fifth
    assert np.array_equal(pixels(source), book.decode(middle))
    assert source.fit == AS_TOKENS + AS_THEY_ARE
    smaller = open_real_images(stores / "codes", 8)
    assert np.array_equal(pixels(smaller)[3], centre_crop(Image.fromarray(book.decode(middle)[3]), 8))
    assert (smaller.fit, smaller.digest() == source.digest()) == (AS_TOKENS + FIT, False)


def test_an_image_store_shows_whole_images(stores: Path) -> None:
    source, store = open_real_images(stores / "images"), open_image_store(stores / "images")
    assert (source.count, source.height, source.fit) == (10, 16, FIT)  # of crops of 24 pixels
    assert np.array_equal(pixels(source)[7], centre_crop(Image.fromarray(store.crop(7)), 16))
    assert open_real_images(stores / "images", 24).fit == AS_THEY_ARE


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_idx_files() -> None:
    source = open_real_images(FASHION, 28)
    first = next(source.batches(3))
    assert (source.count, source.fit) == (60_000, AS_THEY_ARE)
    assert np.array_equal(first, IdxImages(FASHION, "train").pixels[:3, :, :, None].repeat(3, axis=3))


def test_samples_against_a_folder_and_a_store(photos: Path, stores: Path, tmp_path: Path) -> None:
    """The same numbers as of the same images in a file of the samples' size; the rule is in the row and in print."""
    samples = saved(tmp_path / "s.npz", digits(20))
    same = saved(tmp_path / "r.npz", pixels(open_real_images(photos, 32)))
    wanted = evaluate_files(EvaluationRequest(samples, same), ColourNetwork())
    row = evaluate_files(EvaluationRequest(samples, photos), ColourNetwork())
    assert row["frechet_distance"] == wanted["frechet_distance"] > 0
    assert (row["precision"], row["recall"]) == (wanted["precision"], wanted["recall"])
    assert (wanted["protocol"]["reference_sizes"], row["protocol"]["reference_sizes"]) == (AS_THEY_ARE, FIT)
    assert not any("resize" in reason for reason in row["protocol"]["departures"])
    assert FIT in render(row)
    of_store = evaluate_files(EvaluationRequest(samples, stores / "codes"), ColourNetwork())
    assert of_store["protocol"]["reference_images"] == 10
    assert json.loads(json.dumps(of_store)) == of_store


def test_a_reference_file_in_adms_layout(
    photos: Path, inception: InceptionFeatures, tmp_path: Path
) -> None:  # fmt: skip
    """Statistics of all images, some of them for precision and recall, and what it was made of."""
    out = tmp_path / "deep" / "ref.npz"
    said = make_reference(photos, out, 16, inception, most=5)
    assert "5 images of 16x16 pixels" in said
    assert "statistics of all 10" in said
    images = pixels(open_real_images(photos, 16))
    features = extract_features(images, inception)
    assert features.spatial is not None
    with np.load(out, allow_pickle=False) as file:
        assert sorted(file.files) == ["arr_0", "mu", "mu_s", "protocol", "sigma", "sigma_s"]
        assert np.array_equal(file["arr_0"], images[[0, 2, 4, 7, 9]])  # evenly: 9 / 4 apart, rounded
        for rows, names in ((features.pooled, ("mu", "sigma")), (features.spatial, ("mu_s", "sigma_s"))):
            statistics = gaussian_statistics(rows)
            assert np.allclose(file[names[0]], statistics.mean, rtol=1e-5)
            assert np.allclose(file[names[1]], statistics.covariance, atol=1e-6)
    found = open_reference(out)
    assert found.pooled is not None
    assert found.spatial is not None
    assert found.made is not None
    assert (found.made["images"], found.made["shown"], found.made["sizes"]) == (10, 5, FIT)
    assert found.made["network_sha256"] == inception.facts()["sha256"]
    before = out.read_bytes()
    one_line(lambda: make_reference(photos, out, 16, None), "is there already")
    assert out.read_bytes() == before


def test_a_reference_without_a_network(stores: Path, tmp_path: Path) -> None:
    out = tmp_path / "ref.npz"
    assert "no statistics" in make_reference(stores / "codes", out, None, None)
    samples = saved(tmp_path / "s.npz", digits(20)[:, ::2, ::2])
    direct = evaluate_files(EvaluationRequest(samples, stores / "codes"), ColourNetwork())
    by_file = evaluate_files(EvaluationRequest(samples, out), ColourNetwork())
    assert by_file["frechet_distance"] == direct["frechet_distance"]
    assert by_file["protocol"]["reference_made"]["source"] == "codes"
    assert "made from          source codes" in render(by_file)


def test_the_command(stores: Path, tmp_path: Path) -> None:
    out = tmp_path / "ref.npz"
    done = CliRunner().invoke(main, ["reference", str(stores / "images"), "--out", str(out), "--size", "8"])
    assert done.exit_code == 0, done.output
    assert f"{out}: 10 images of 8x8 pixels" in done.output
    again = CliRunner().invoke(main, ["reference", str(stores / "images"), "--out", str(out)])
    assert again.exit_code == 2
    assert "is there already" in again.output


def test_mistakes(stores: Path, tmp_path: Path) -> None:
    one_line(lambda: make_reference(tmp_path / "none", tmp_path / "r.npz", None, None), "no such folder")
    one_line(lambda: make_reference(stores / "codes", tmp_path / "r.txt", None, None), "ends in .npz")
    one_line(lambda: make_reference(tmp_path, tmp_path / "r.npz", None, None), "holds no images")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    one_line(lambda: make_reference(tmp_path, tmp_path / "r.npz", 16, None), "broken.png", "cannot be read")
    assert not (tmp_path / "r.npz").exists()
    np.savez(tmp_path / "odd.npz", arr_0=digits(3), protocol=np.array("{"))
    one_line(lambda: open_reference(tmp_path / "odd.npz"), "protocol cannot be read")
