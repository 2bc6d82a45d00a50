"""Where tokens come from: the digits, the split, decoding, and a user's .npz file with every way it can be wrong."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mirai_ds.config import ConfigError, DataConfig, ModelConfig
from mirai_ds.data import Dataset, TokenSource, load_dataset
from mirai_ds.data.digits import digits
from mirai_ds.data.npz_file import from_npz
from mirai_ds.data.sources import check_fits
from mirai_ds.data.views import ArrayViews
from mirai_ds.tokenizer import PatchCodebook

DIGITS_MODEL = ModelConfig(size="custom", dim=8, n_layer=1, n_head=1, vocab_size=17, num_classes=10, block_size=64)
MODEL = ModelConfig(size="custom", dim=8, n_layer=1, n_head=1, vocab_size=5, num_classes=3, block_size=4)


def codes_of(part: TokenSource) -> np.ndarray[Any, Any]:
    """(n, views, N): the part's own codes."""
    return part.codes[part.places(np.arange(len(part)))]


def digest(part: TokenSource) -> str:
    """Of codes and labels, in order."""
    return hashlib.sha256(codes_of(part).tobytes() + part.labels.tobytes()).hexdigest()[:16]


def rows(part: TokenSource) -> set[bytes]:
    """The samples as bytes (all 1,797 digits differ)."""
    return {code.tobytes() for code in codes_of(part)}


def test_digits_are_the_pixels() -> None:
    from sklearn.datasets import load_digits

    data, ours = load_digits(), digits()
    assert (len(ours), ours.num_views, ours.codes.shape[2]) == (1797, 1, 64)
    assert (int(ours.codes.min()), int(ours.codes.max()), len(np.unique(ours.codes))) == (0, 16, 17)
    assert np.array_equal(ours.codes[:, 0], data.data)
    assert np.array_equal(ours.labels, data.target)
    assert np.bincount(ours.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert len(rows(ours)) == 1797


def test_digits_decode_to_their_images_exactly() -> None:
    ours = digits()
    assert isinstance(ours.images, ArrayViews)
    assert isinstance(ours.decoder, PatchCodebook)
    grey = [round(255 * level / 16) for level in range(17)]
    assert ours.decoder.patches[:, 0, 0].tolist() == [[g, g, g] for g in grey]
    decoded = ours.decode(torch.from_numpy(ours.codes[:, 0].astype(np.int64)))
    assert decoded.shape == (1797, 8, 8, 3)
    assert decoded.dtype == np.uint8
    assert np.array_equal(decoded, np.moveaxis(ours.images.pixels[:, 0], 1, -1))
    assert decoded[0, 0, :, 0].tolist() == [grey[int(code)] for code in ours.codes[0, 0, :8]]


def test_decode_puts_patches_where_they_belong() -> None:
    codebook = np.arange(3 * 2 * 2 * 3, dtype=np.uint8).reshape(3, 2, 2, 3)
    source = TokenSource(np.zeros((1, 1, 4), np.int64), np.zeros(1, np.int64), None, PatchCodebook(codebook))
    image = source.decode(torch.tensor([[0, 1, 2, 0]]))[0]
    assert image.shape == (4, 4, 3)
    corners = [image[:2, :2], image[:2, 2:], image[2:, :2], image[2:, 2:]]
    assert all(np.array_equal(corner, codebook[code]) for corner, code in zip(corners, (0, 1, 2, 0), strict=True))


def test_decode_without_a_codebook_says_so() -> None:
    with pytest.raises(ValueError, match="no codebook or tokenizer, so its tokens cannot be shown"):
        TokenSource(np.zeros((1, 1, 4), np.int64), np.zeros(1, np.int64)).decode(torch.zeros(1, 4, dtype=torch.int64))


def test_gather_takes_the_asked_view() -> None:
    codes = np.arange(2 * 3 * 4, dtype=np.uint16).reshape(2, 3, 4)
    images = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 1, 1)
    tokens, labels, shown = TokenSource(codes, np.array([5, 7]), ArrayViews(images)).gather(
        torch.tensor([1, 0, 1]), torch.tensor([2, 0, 0]), images=True
    )
    assert tokens.tolist() == [[20, 21, 22, 23], [0, 1, 2, 3], [12, 13, 14, 15]]
    assert (tokens.dtype, labels.dtype) == (torch.int64, torch.int64)
    assert labels.tolist() == [7, 5, 7]
    assert shown is not None
    assert shown[:, :, 0, 0].tolist() == [[15, 16, 17], [0, 1, 2], [9, 10, 11]]


# Training runs are compared on these very images; scikit-learn must not move them.
SPLITS = {
    (0.1, 0): (180, "96b6b98d5b615a33"),
    (0.2, 0): (359, "f47038233625bbfc"),
    (0.2, 1): (359, "8ad52a7732b5d1ee"),
}


@pytest.mark.parametrize(("fraction", "seed"), SPLITS)
def test_the_split_is_fixed_stratified_and_without_overlap(fraction: float, seed: int) -> None:
    data = load_dataset(DataConfig(held_out_fraction=fraction, split_seed=seed), DIGITS_MODEL)
    held, pinned = SPLITS[fraction, seed]
    assert (len(data.train), len(data.held_out)) == (1797 - held, held)
    assert digest(data.held_out) == pinned
    assert not rows(data.train) & rows(data.held_out)
    assert rows(data.train) | rows(data.held_out) == rows(digits())
    expected = np.bincount(digits().labels) * held / 1797
    assert np.abs(np.bincount(data.held_out.labels) - expected).max() < 1


def test_a_subset_keeps_images_and_labels_together() -> None:
    held = load_dataset(DataConfig(), DIGITS_MODEL).held_out
    everyone = torch.arange(len(held))
    _, _, images = held.gather(everyone, torch.zeros_like(everyone), images=True)
    assert images is not None
    assert np.array_equal(held.decode(held.first_view()), np.moveaxis(images.numpy(), 1, -1))
    label_of = {code.tobytes(): label for code, label in zip(digits().codes, digits().labels, strict=True)}
    assert [label_of[code.tobytes()] for code in codes_of(held)] == held.labels.tolist()


def arrays(samples: int = 6, views: int | None = None, **others: Any) -> dict[str, Any]:
    """A good file for `MODEL`: 6 images of 2x2 tokens, codes up to 4, labels up to 2."""
    shape = (samples, 4) if views is None else (samples, views, 4)
    codes = (np.arange(int(np.prod(shape))) % 5).reshape(shape)
    return {"codes": codes, "labels": np.arange(samples) % 3, **others}


def saved(folder: Path, values: dict[str, Any]) -> str:
    """An .npz file."""
    path = folder / "data.npz"
    np.savez(path, **values)
    return str(path)


def loaded(path: str, fraction: float = 0.5) -> Dataset:
    """As a run would."""
    return load_dataset(DataConfig(source="npz", path=path, held_out_fraction=fraction), MODEL)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "int64"])
@pytest.mark.parametrize("views", [None, 1, 3])
def test_good_codes_of_every_shape_and_type(dtype: str, views: int | None, tmp_path: Path) -> None:
    values = arrays(views=views)
    values["codes"] = values["codes"].astype(dtype)
    source = from_npz(saved(tmp_path, values))
    assert source.num_views == (views or 1)
    assert np.array_equal(source.codes, values["codes"].reshape(6, views or 1, 4))
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert (source.images, source.decoder) == (None, None)
    check_fits(source, MODEL)


IMAGE_SHAPES = [(None, (6, 4, 4)), (None, (6, 4, 4, 3)), (3, (6, 3, 4, 4)), (3, (6, 3, 4, 4, 3)), (1, (6, 1, 4, 4))]


@pytest.mark.parametrize(("views", "shape"), IMAGE_SHAPES)
def test_good_images_of_every_shape(views: int | None, shape: tuple[int, ...], tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    source = from_npz(saved(tmp_path, arrays(views=views, images=images)))
    assert isinstance(source.images, ArrayViews)
    assert source.images.pixels.shape == (6, views or 1, 3, 4, 4)
    for channel in range(3):
        plane = images[..., channel] if shape[-1] == 3 else images
        assert np.array_equal(source.images.pixels[:, :, channel], plane.reshape(6, views or 1, 4, 4))


def test_a_good_codebook_shows_the_tokens(tmp_path: Path) -> None:
    codebook = np.arange(5 * 3, dtype=np.uint8).reshape(5, 1, 1, 3)
    held = loaded(saved(tmp_path, arrays(codebook=codebook))).held_out
    image = held.decode(held.first_view(np.array([0])))
    assert image.reshape(4, 3).tolist() == [codebook[code, 0, 0].tolist() for code in codes_of(held)[0, 0]]


def test_other_arrays_in_the_file_do_not_matter(tmp_path: Path) -> None:
    source = from_npz(saved(tmp_path, arrays(ids=np.array(["a"] * 6))))
    assert np.array_equal(source.codes[:, 0], arrays()["codes"])


SMALL_SPLITS = {(2, 0.5): 1, (2, 0.01): 1, (2, 0.99): 1, (6, 0.5): 3, (6, 0.99): 5, (4, 0.9): 3}


@pytest.mark.parametrize(("samples", "fraction"), SMALL_SPLITS)
def test_small_data_is_split_so_that_both_parts_hold_something(samples: int, fraction: float, tmp_path: Path) -> None:
    data = loaded(saved(tmp_path, arrays(samples)), fraction)
    assert len(data.held_out) == SMALL_SPLITS[samples, fraction]
    assert len(data.train) == samples - len(data.held_out)


def test_a_class_with_one_image_does_not_stop_the_split(tmp_path: Path) -> None:
    values = arrays()
    values["labels"] = np.array([0, 0, 0, 1, 1, 2])
    data = loaded(saved(tmp_path, values))
    assert sorted([*data.train.labels.tolist(), *data.held_out.labels.tolist()]) == [0, 0, 0, 1, 1, 2]


CODES = arrays()["codes"]
BAD_ARRAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no-codes": ({"labels": np.zeros(6, int)}, ("data.path = ", "has no array `codes`", "['labels']")),
    "no-labels": ({"codes": CODES}, ("data.path = ", "has no array `labels`", "['codes']")),
    "nothing": ({}, ("has no array `codes`", "nothing")),
    "float-codes": (arrays() | {"codes": CODES / 2}, ("codes must be integers", "float64 (6, 4)")),
    "flag-codes": (arrays() | {"codes": CODES > 1}, ("codes must be integers", "bool (6, 4)")),
    "flat-codes": (arrays() | {"codes": CODES.ravel()}, ("codes must be integers (n, [views,] tokens)", "(24,)")),
    "square-codes": (arrays() | {"codes": CODES.reshape(6, 1, 2, 2)}, ("codes must be", "int64 (6, 1, 2, 2)")),
    "negative-codes": (arrays() | {"codes": CODES - 1}, ("codes must not be negative", "-1")),
    "large-codes": (arrays() | {"codes": CODES + 1}, ("model.vocab_size = 5", "up to 5; use at least 6")),
    "token-count": (arrays() | {"codes": CODES[:, :3]}, ("model.block_size = 4", "3 tokens an image; use that")),
    "label-count": (arrays() | {"labels": np.zeros(5, int)}, ("labels must be 6 integers", "int64 (5,)")),
    "label-columns": (arrays() | {"labels": np.zeros((6, 1), int)}, ("labels must be 6 integers", "(6, 1)")),
    "float-labels": (arrays() | {"labels": np.zeros(6)}, ("labels must be 6 integers", "float64")),
    "negative-labels": (arrays() | {"labels": np.arange(6) - 2}, ("labels must not be negative", "-2")),
    "large-labels": (arrays() | {"labels": np.arange(6)}, ("model.num_classes = 3", "up to 5; use at least 6")),
    "image-count": (arrays(images=np.zeros((5, 4, 4), np.uint8)), ("images must be", "codes (6, 4)", "(5, 4, 4)")),
    "image-views": (arrays(images=np.zeros((6, 2, 4, 4, 3), np.uint8)), ("images must be", "(6, 2, 4, 4, 3)")),
    "image-type": (arrays(images=np.zeros((6, 4, 4))), ("images must be uint8", "float64")),
    "image-number": (arrays(images=np.uint8(3)), ("images must be (n, [views,] H, W[, 3])", "not ()")),
    "image-flat": (arrays(images=np.zeros((6, 16), np.uint8)), ("images must be", "(6, 16)")),
    "codebook-size": (
        arrays(codebook=np.zeros((4, 1, 1, 3), np.uint8)),
        ("model.vocab_size = 5", "4 entries; use that"),
    ),
    "codebook-shape": (arrays(codebook=np.zeros((5, 3), np.uint8)), ("codebook must be uint8 (V, p, p, 3)", "(5, 3)")),
    "codebook-grey": (arrays(codebook=np.zeros((5, 2, 2, 1), np.uint8)), ("codebook must be", "(5, 2, 2, 1)")),
    "codebook-oblong": (arrays(codebook=np.zeros((5, 1, 2, 3), np.uint8)), ("codebook must be", "(5, 1, 2, 3)")),
    "codebook-type": (arrays(codebook=np.zeros((5, 1, 1, 3))), ("codebook must be uint8", "float64")),
    "empty": (arrays(0), ("codes are empty: (0, 4)", "at least two images")),
    "no-views": (arrays(6, 0), ("codes are empty: (6, 0, 4)",)),
    "one-image": (arrays(1), ("holds 1 images; it must hold at least 2",)),
    "pickled": (arrays() | {"codes": np.array([{}], object)}, ("not a readable .npz file", "Object arrays")),
}


def refused(path: str, parts: tuple[str, ...]) -> None:
    """Loading raises one line with all of `parts`."""
    with pytest.raises(ConfigError) as caught:
        loaded(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith((f"data.path = '{path}'"[:40], "model."))
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    values, parts = BAD_ARRAYS[name]
    np.savez("data.npz", **values)
    refused("data.npz", parts)


def flipped(content: bytes) -> bytes:
    """A byte in the middle of the codes changed: the zip's checksum notices."""
    at = content.index(b"codes.npy") + 200
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


BAD_FILES = {
    "truncated": (lambda good: good[: len(good) // 2], "is not a whole .npz file; write it again with numpy.savez"),
    "text": (lambda good: b"codes,labels\n1,2\n", "is not a whole .npz file; write it again with numpy.savez"),
    "empty": (lambda good: b"", "is not a whole .npz file; write it again with numpy.savez"),
    "flipped": (flipped, "is not a readable .npz file (Bad CRC-32"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good = Path(saved(tmp_path, arrays())).read_bytes()
    damage, part = BAD_FILES[name]
    Path("data.npz").write_bytes(damage(good))
    refused("data.npz", (part,))


def test_a_single_array_is_no_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("codes.npy", CODES)
    refused("codes.npy", ("is not a whole .npz file",))


def test_a_damaged_compressed_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez_compressed("data.npz", **arrays(600))
    content = bytearray(Path("data.npz").read_bytes())
    content[60:120] = bytes(60)
    Path("data.npz").write_bytes(content)
    refused("data.npz", ("is not a readable .npz file (", "write it again"))


def test_missing_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused("none.npz", ("data.path = 'none.npz': no such file",))
    Path("folder.npz").mkdir()
    refused("folder.npz", ("data.path = 'folder.npz': no such file",))


def test_the_model_must_fit_the_digits() -> None:
    small = DIGITS_MODEL.model_copy(update={"vocab_size": 16})
    with pytest.raises(ConfigError, match=r"^model.vocab_size = 16: the data's codes go up to 16; use at least 17$"):
        load_dataset(DataConfig(), small)
    large = DIGITS_MODEL.model_copy(update={"vocab_size": 18})
    with pytest.raises(ConfigError, match=r"^model.vocab_size = 18: the data's codebook has 17 entries; use that$"):
        load_dataset(DataConfig(), large)


def test_held_out_codes_of_another_codebook_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("train", "same", "other"):
        book = np.full((5, 2, 2, 3), 7 if name == "other" else 8, np.uint8)
        np.savez(tmp_path / name, codes=rng.integers(0, 5, (4, 4)), labels=np.arange(4) % 3, codebook=book)
    paths = {name: str(tmp_path / f"{name}.npz") for name in ("train", "same", "other")}
    data = DataConfig(source="npz", path=paths["train"], held_out_path=paths["same"])
    assert len(load_dataset(data, MODEL).held_out) == 4
    with pytest.raises(ConfigError, match=r"was made with patch-codebook [0-9a-f]{12}, data\.path with patch-codebook"):
        load_dataset(data.model_copy(update={"held_out_path": paths["other"]}), MODEL)
