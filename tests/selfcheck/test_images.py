"""The vectors of the VQ-16 tokenizer and of the ten-crop pass on right numbers, and on nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mirai_ds.data import crops
from mirai_ds.selfcheck import images
from mirai_ds.selfcheck.check import FileResult, compare, render, verify_file, verify_files
from mirai_ds.tokenizer import VQ16, VQModel, vq_model
from tests.one_line import one_line
from tests.selfcheck.vectors import FIXTURES, Arrays, arrays_of, check, failed

VQ, CROPS = FIXTURES / "vq16_64px.npz", FIXTURES / "ten_crop.npz"
CROP_ARRAYS = {f"{name}_{i}" for name in ("centre_crop", "views") for i in range(3)}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """The file's weights, made once."""
    with torch.device("meta"):
        wanted = VQModel(VQ16).state_dict()
    return images.weights(images.Vector(VQ), wanted)


@pytest.fixture
def quick(state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Files with the fixture's seed take its weights from memory."""
    right = images.weights
    monkeypatch.setattr(
        images, "weights", lambda v, wanted: dict(state) if v.number("seed") == 31 else right(v, wanted)
    )


def test_ten_crop_vector_passes() -> None:
    (result,) = verify_files([CROPS])
    assert failed(result) == set()
    assert {record.name for record in result.records} == CROP_ARRAYS
    assert all((record.error, record.tolerance) == (0, 0) for record in result.records)


def test_vq16_vector_passes() -> None:
    (result,) = verify_files([VQ])
    assert failed(result) == set()
    tolerances = {record.name: record.tolerance for record in result.records}
    assert tolerances == {"latent": 1e-5, "indices": 0, "decoded": 1e-5, "nkeys": 0}
    assert {record.error for record in result.records if record.tolerance == 0} == {0.0}


# --- exact means exact ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [1e-5, 0.99])
@pytest.mark.parametrize("place", [0, -1, 1234])
def test_one_wrong_grey_level_fails(place: int, tolerance: float, tmp_path: Path) -> None:
    arrays = arrays_of("ten_crop")
    arrays["views_1"].flat[place] ^= 1
    arrays["centre_crop_2"].flat[place] ^= 1
    result = check(tmp_path, arrays, tolerance)
    assert failed(result) == {"views_1", "centre_crop_2"}
    notes = {record.name: record.note for record in result.records if record.note}
    assert notes == {"views_1": "1 of 48000 values differ", "centre_crop_2": "1 of 2352 values differ"}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("tolerance", [1e-5, 0.99])
def test_one_wrong_index_fails(tolerance: float, tmp_path: Path) -> None:
    arrays = arrays_of("vq16_64px")
    arrays["indices"][1, 7] += 1
    arrays["nkeys"] = arrays["nkeys"] - 1
    del arrays["decoded"]
    assert failed(check(tmp_path, arrays, tolerance)) == {"indices", "nkeys"}


def test_integers_stored_as_floats_are_exact_all_the_same() -> None:
    ours = torch.tensor([16383, 5])
    assert compare("indices", ours, np.array([16383.0, 5.0], np.float32), 0.5).ok
    assert not compare("indices", ours, np.array([16383.0, 5.001], np.float32), 0.5).ok
    assert not compare("indices", ours, np.array([16383.0, math.nan], np.float32), 0.5).ok
    assert not compare("views", torch.tensor([0], dtype=torch.uint8), np.array([255], np.uint8), 0.99).ok


def test_the_table_says_exact(tmp_path: Path) -> None:
    arrays = arrays_of("ten_crop")
    arrays["views_0"].flat[3] ^= 128
    table = render([verify_file(CROPS), check(tmp_path, arrays)])
    columns = [list(column.cells) for column in table.columns]
    rows = list(zip(*columns, strict=True))
    assert ("ten_crop.npz", "views_0", "0.0e+00", "exact", "ok") in rows
    assert [row[4] for row in rows if row[0] == "vector.npz" and row[1] == "views_0"] == [
        "FAILED 1 of 30720 values differ"
    ]
    assert rows[-1][4] == "1 of 6 arrays FAILED"


# --- an installation that computes something else ------------------------------------------------------------------


def other_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vq_model, "_norm", lambda width: nn.GroupNorm(32, width, eps=1e-5))


def other_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vq_model._Downsample, "forward", lambda self, x: self.conv(F.pad(x, (1, 0, 1, 0))))


def other_upsampling(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear"))

    monkeypatch.setattr(vq_model._Upsample, "forward", forward)


def no_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vq_model._Attention, "forward", lambda self, x: x)


def other_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vq_model, "_swish", F.gelu)


def codes_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vq_model._Quantizer, "codes", lambda self: self.embedding.weight)


def columns_first(monkeypatch: pytest.MonkeyPatch) -> None:
    right = VQModel.indices
    monkeypatch.setattr(VQModel, "indices", lambda self, z: right(self, z.transpose(2, 3)))


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("spoil", "at_least", "at_most"),
    [
        (other_eps, {"latent", "decoded"}, {"latent", "decoded"}),
        (other_padding, {"latent"}, {"latent"}),
        (other_upsampling, {"decoded"}, {"decoded"}),
        (no_attention, {"latent", "decoded"}, {"latent", "decoded"}),
        (other_activation, {"latent", "decoded"}, {"latent", "decoded"}),
        (codes_as_they_are, {"indices", "decoded"}, {"indices", "decoded"}),
        (columns_first, {"indices"}, {"indices"}),
    ],
)
def test_other_networks_fail(
    spoil: Callable[[pytest.MonkeyPatch], None], at_least: set[str], at_most: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    found = failed(verify_file(VQ))
    assert at_least <= found <= at_most


def floor_centre(geometry: crops.ViewGeometry) -> list[crops.Window]:
    """The flipped crop's centre mirrored exactly: no half-to-even rounding of its own."""
    found = crops_windows(geometry)
    return [*found[:9], found[4]._replace(mirrored=True)]


def mirrored_in_order(geometry: crops.ViewGeometry) -> list[crops.Window]:
    """View v + 5 as the mirror of view v."""
    found = crops_windows(geometry)
    return found[:5] + [window._replace(mirrored=True) for window in found[:5]]


def floored_rest(geometry: crops.ViewGeometry) -> list[crops.Window]:
    """The centre's offset rounded down: differs where half the rest is rounded up to even."""
    rest = geometry.side - geometry.image_size
    found = crops_windows(geometry)
    middle = crops.Window(rest // 2, rest // 2, False)
    return [*found[:4], middle, *found[5:9], crops.Window(rest // 2, rest - rest // 2, True)]


crops_windows = crops.ViewGeometry.windows


@pytest.mark.parametrize("rule", [floor_centre, mirrored_in_order, floored_rest])
def test_other_views_fail(rule: Callable[[crops.ViewGeometry], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crops.ViewGeometry, "windows", rule)
    found = failed(verify_file(CROPS))
    assert found
    assert found <= {"views_0", "views_1", "views_2"}


def other_cut(image: Image.Image, size: int, box: Any, last: Any, shift: int) -> Any:
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=box)
    scale = size / min(image.size)
    pixels = np.asarray(image.resize((round(image.width * scale), round(image.height * scale)), resample=last))
    top, left = (max(0, (n - size) // 2 - shift) for n in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    ("box", "last", "shift", "right"),
    [
        ("BOX", "BICUBIC", 0, True),
        ("BILINEAR", "BICUBIC", 0, False),
        ("BOX", "LANCZOS", 0, False),
        ("BOX", "BILINEAR", 0, False),
        ("BOX", "BICUBIC", 1, False),
    ],
)
def test_other_centre_crops_fail(box: str, last: str, shift: int, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    filters = Image.Resampling[box], Image.Resampling[last]
    monkeypatch.setattr(images, "centre_crop", lambda image, size: other_cut(image, size, *filters, shift))
    assert failed(verify_file(CROPS)) == (set() if right else CROP_ARRAYS)


def test_another_crop_size_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """S rounded instead of cut off: 28.6 becomes 29."""
    side = property(lambda self: round(self.image_size * self.crop_range))
    monkeypatch.setattr(crops.ViewGeometry, "side", side)
    assert failed(verify_file(CROPS)) == {"centre_crop_2", "views_2"}


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "file"), [("vq16_64px", VQ), ("ten_crop", CROPS)])
@pytest.mark.usefixtures("quick")
def test_an_array_not_understood_fails(name: str, file: Path, tmp_path: Path) -> None:
    extra = ["image_9", "views_9", "quantised", "state"]
    result: FileResult = check(tmp_path, arrays_of(name) | dict.fromkeys(extra, np.float32(1.0)))
    assert failed(result) == set(extra)
    assert all("not checked" in record.note for record in result.records if record.name in extra)
    assert len(result.records) == len(verify_file(file).records) + 4


@pytest.mark.parametrize("name", ["seed", "size", "batch", "decode_codes"])
@pytest.mark.usefixtures("quick")
def test_missing_inputs_of_vq16_are_named(name: str, tmp_path: Path) -> None:
    arrays = arrays_of("vq16_64px")
    del arrays[name]
    one_line(lambda: check(tmp_path, arrays), f"has no array `{name}`")


@pytest.mark.usefixtures("quick")
def test_inputs_of_vq16_that_do_not_fit(tmp_path: Path) -> None:
    arrays = arrays_of("vq16_64px")
    for name, value in (("size", 60), ("size", 0), ("size", 4096), ("batch", 0), ("batch", 1000), ("seed", -1)):
        one_line(lambda name=name, value=value: check(tmp_path, {**arrays, name: np.array(value)}), f"{name} = {value}")
    codes = arrays["decode_codes"]
    one_line(lambda: check(tmp_path, {**arrays, "decode_codes": codes + 16384}), "`decode_codes` spans", "0..16383")
    for bad in (codes[:, :15], codes[0]):
        one_line(lambda bad=bad: check(tmp_path, {**arrays, "decode_codes": bad}), "(B, g * g)")
    only = {name: arrays[name] for name in ("kind", "seed", "size", "batch", "decode_codes")}
    one_line(lambda: check(tmp_path, only), "nothing to check")


@pytest.mark.usefixtures("quick")
def test_another_seed_fails(tmp_path: Path) -> None:
    arrays = arrays_of("vq16_64px")
    assert failed(check(tmp_path, {**arrays, "seed": np.array(32)})) == {"latent", "indices", "decoded"}
    codes = arrays["decode_codes"].copy()
    codes[0, 0] ^= 1
    assert failed(check(tmp_path, {**arrays, "decode_codes": codes})) == {"decoded"}


def with_cases(change: Callable[[list[Any]], Any]) -> Arrays:
    arrays = arrays_of("ten_crop")
    cases = change(json.loads(str(arrays["cases"])))
    return {**arrays, "cases": np.array(cases if isinstance(cases, str) else json.dumps(cases))}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda cases: "{", "`cases` is not JSON"),
        (lambda cases: {}, "not a JSON list"),
        (lambda cases: [], "not a JSON list"),
        (lambda cases: [*cases, cases[0]], "has no array `image_3`"),
        (lambda cases: [3], "image_size must be"),
        (lambda cases: [{"image_size": 32}], "crop_range"),
        (lambda cases: [{"image_size": 0, "crop_range": 1.1}], "image_size must be"),
        (lambda cases: [{"image_size": True, "crop_range": 1.1}], "image_size must be"),
        (lambda cases: [{"image_size": 32, "crop_range": 0.9}], "crop_range"),
    ],
)
def test_cases_that_do_not_fit(change: Callable[[list[Any]], Any], part: str, tmp_path: Path) -> None:
    one_line(lambda: check(tmp_path, with_cases(change)), "vector.npz", part)


def test_images_that_do_not_fit(tmp_path: Path) -> None:
    arrays = arrays_of("ten_crop")
    del arrays["cases"]
    one_line(lambda: check(tmp_path, arrays), "has no array `cases`")
    arrays = arrays_of("ten_crop")
    sliver = np.zeros((1, 9000000, 3), np.uint8)
    for bad in (arrays["image_1"][..., 0], arrays["image_1"].astype(float), sliver):
        one_line(lambda bad=bad: check(tmp_path, {**arrays, "image_1": bad}), "`image_1`")


def test_other_cases_have_other_views(tmp_path: Path) -> None:
    """A case fewer leaves its arrays unchecked; another range fails its own arrays alone."""
    result = check(tmp_path, with_cases(lambda cases: cases[:2]))
    assert failed(result) == {"image_2", "centre_crop_2", "views_2"}
    wider = with_cases(lambda cases: [cases[0], {**cases[1], "crop_range": 1.1}, cases[2]])
    assert failed(check(tmp_path, wider)) == {"centre_crop_1", "views_1"}
