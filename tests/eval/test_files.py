"""Samples and references on disk: read in order and piece by piece, refused where they are not what they must be."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mirai_ds.eval.image_sources import NpzSource, open_images
from mirai_ds.eval.metrics.inception import POOLED, SPATIAL
from mirai_ds.eval.reference_file import STANDARD_NAME, open_reference
from tests.one_line import one_line

Array = np.ndarray[Any, Any]


def pictures(count: int, side: int = 6, channels: int = 3, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side + 2, channels)).astype(np.uint8)


def saved(path: Path, compress: bool = False, **arrays: Any) -> Path:
    (np.savez_compressed if compress else np.savez)(path, **arrays)
    return path


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("size", [1, 4, 10, 64])
def test_npz_in_batches(compress: bool, size: int, tmp_path: Path) -> None:
    images = pictures(10)
    source = open_images(saved(tmp_path / "x.npz", compress, arr_0=images, arr_1=np.arange(3)))
    assert (source.count, source.height, source.width) == (10, 6, 8)
    batches = list(source.batches(size))
    assert [len(batch) for batch in batches] == [size] * (10 // size) + ([10 % size] if 10 % size else [])
    np.testing.assert_array_equal(np.concatenate(batches), images)


def test_grey_images_and_the_key_of_our_sampler(tmp_path: Path) -> None:
    grey = pictures(3, channels=1)
    (batch,) = open_images(saved(tmp_path / "x.npz", tokens=np.zeros((3, 4)), images=grey)).batches(9)
    np.testing.assert_array_equal(batch, np.repeat(grey, 3, axis=3))


def test_a_large_file_is_never_in_memory(tmp_path: Path) -> None:
    """90 MB in batches of 64 (9.6 MB each): one that is used, one that is read, and the decompressor's buffer."""
    path = saved(tmp_path / "x.npz", compress=True, arr_0=np.zeros((600, 224, 224, 3), np.uint8))
    tracemalloc.start()
    try:
        assert sum(len(batch) for batch in NpzSource(path).batches(64)) == 600
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6


def test_npz_that_cannot_be_judged(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    one_line(lambda: open_images(path), "x.npz", "no such file")
    path.write_bytes(b"hello")
    one_line(lambda: open_images(path), "is not an .npz file")
    for arrays, part in (
        ({"arr_1": pictures(2)}, "has no images (arr_0); it holds arr_1"),
        ({"arr_0": pictures(2).astype(np.float32)}, "arr_0 is float32 (2, 6, 8, 3)"),
        ({"arr_0": pictures(2, channels=4)}, "uint8 (n, height, width, 3)"),
        ({"arr_0": np.asfortranarray(pictures(2))}, "stored column by column"),
        ({"arr_0": np.array([None], dtype=object)}, "arr_0 is object"),
    ):
        saved(path, **arrays)
        one_line(lambda: open_images(path), "x.npz", part)


def test_damage_is_found(tmp_path: Path) -> None:
    """A flipped byte fails the checksum at the end; an array shorter or longer than its header is named."""
    images = pictures(10, side=60)
    path = saved(tmp_path / "x.npz", arr_0=images)
    data = bytearray(path.read_bytes())
    place = data.index(images.tobytes()[:64]) + 100
    data[place] ^= 1
    path.write_bytes(bytes(data))
    source = open_images(path)
    one_line(lambda: list(source.batches(4)), "x.npz", "arr_0.npy is damaged")
    header_of = saved(tmp_path / "y.npz", arr_0=images)
    with zipfile.ZipFile(header_of) as archive:
        whole = archive.read("arr_0.npy")
    cut = 3 * images[0].size  # bytes of three images
    for content, part in ((whole[:-cut], "ends after 7 of 10 images"), (whole + b"x", "goes on after its last image")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", content)
        broken = open_images(path)
        one_line(lambda broken=broken: list(broken.batches(4)), "is damaged", part)


def write_folder(folder: Path, images: Array) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:06d}.png")
    return folder


def test_a_folder_in_the_order_of_names(tmp_path: Path) -> None:
    images = pictures(7)
    source = open_images(write_folder(tmp_path / "f", images))
    (tmp_path / "f" / "note.txt").write_text("no image")
    assert (source.count, source.height, source.width) == (7, 6, 8)
    np.testing.assert_array_equal(np.concatenate(list(source.batches(3))), images)
    same = open_images(write_folder(tmp_path / "g", images)).digest()
    assert source.digest() == same
    other = open_images(write_folder(tmp_path / "h", images[::-1])).digest()
    assert other != same


def test_folders_that_cannot_be_judged(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    one_line(lambda: open_images(tmp_path / "empty"), "holds no images")
    folder = write_folder(tmp_path / "f", pictures(3))
    Image.new("RGB", (9, 6)).save(folder / "000003.png")
    one_line(lambda: list(open_images(folder).batches(2)), "000003.png", "is 9x6, 000000.png is 8x6")
    (folder / "000003.png").write_bytes(b"no picture")
    one_line(lambda: list(open_images(folder).batches(2)), "000003.png", "cannot be read")


def test_the_walk_of_a_judged_folder_is_that_of_an_extraction(tmp_path: Path) -> None:
    """Thumbnails are not judged, links that lead back and splits are refused."""
    folder = write_folder(tmp_path / "f", pictures(3))
    wanted = open_images(folder).digest()
    write_folder(folder / "@eaDir", pictures(2))
    assert (open_images(folder).count, open_images(folder).digest()) == (3, wanted)
    (folder / "self").symlink_to(".")
    one_line(lambda: open_images(folder), f"{folder / 'self'}: leads back to")
    (tmp_path / "both").mkdir()
    for split in ("train", "val"):
        write_folder(tmp_path / "both" / split, pictures(2))
    one_line(lambda: open_images(tmp_path / "both"), "train and val look like splits", "give one of them")


def test_images_read_otherwise_than_stored_are_told(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    folder, exif = write_folder(tmp_path / "f", pictures(3)), Image.Exif()
    exif[0x0112] = 3
    for name in ("000003.png", "000004.png"):
        Image.fromarray(pictures(1)[0]).resize((40, 32)).save(folder / name, exif=exif)
    for name in ("000000.png", "000001.png", "000002.png"):
        Image.open(folder / name).resize((40, 32)).save(folder / name)
    assert sum(len(batch) for batch in open_images(folder).batches(2)) == 5
    assert told.messages == [f"{folder}: 2 images: not turned by its orientation tag (3)"]


# --- references ----------------------------------------------------------------------------------------------------


def statistics(pooled: int = POOLED, spatial: int = SPATIAL) -> dict[str, Array]:
    """One value each, spread: small files, right shapes."""
    return {
        "mu": np.ones(pooled, np.float32), "sigma": np.broadcast_to(np.float64(2), (pooled, pooled)),
        "mu_s": np.ones(spatial, np.float32), "sigma_s": np.broadcast_to(np.float64(3), (spatial, spatial)),
    }  # fmt: skip


def test_the_published_reference_by_its_properties(tmp_path: Path) -> None:
    """10,000 images of 256 pixels and four statistics; anything else is named, each difference by itself."""
    path = tmp_path / "renamed.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in statistics().items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array))
        with archive.open("arr_0.npy", "w") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (10_000, 256, 256, 3)}
            np.lib.format.write_array_header_1_0(file, header)  # headers alone decide: no pixel follows
    reference = open_reference(path)
    assert reference.standard
    assert reference.pooled is not None
    assert reference.spatial is not None
    assert (reference.pooled.mean[0], reference.spatial.covariance[0, 0]) == (1, 3)
    assert reference.pooled.mean.dtype == np.float32


def test_departures_of_other_references(tmp_path: Path) -> None:
    def found(name: str, **arrays: Any) -> str:
        reference = open_reference(saved(tmp_path / name, compress=True, **arrays))
        assert not reference.standard
        return " | ".join(reference.departures())

    small = found("a.npz", arr_0=pictures(20))
    assert f"has no stored mu, sigma: {STANDARD_NAME} has them" in small
    assert "has 20 images" in small
    assert "is 8x6" in small
    assert "validation" not in small
    half = {key: value for key, value in statistics().items() if not key.endswith("_s")}
    assert "no stored mu_s, sigma_s" in found("b.npz", arr_0=pictures(20), **half)
    assert "has no images" in found("c.npz", **statistics())
    assert "ImageNet's validation set" in found("imagenet-val.npz", arr_0=pictures(20))
    assert "ImageNet's validation set" in found("d.npz", arr_0=np.zeros((50_000, 1, 1, 3), np.uint8))


def test_references_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for arrays, part in (
        ({"other": np.zeros(3)}, "neither images (arr_0) nor statistics"),
        ({"mu": np.zeros(POOLED)}, "has mu but no sigma"),
        (statistics(pooled=64), "mu is float32 (64,), not (2048,) of Inception's features"),
        (statistics() | {"mu_s": np.full(SPATIAL, np.nan)}, "mu_s or sigma_s holds NaN"),
    ):
        saved(path, compress=True, **arrays)
        one_line(lambda: open_reference(path), "x.npz", part)
