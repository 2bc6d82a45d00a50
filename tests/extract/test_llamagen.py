"""LlamaGen's folders of small files: read exactly, refused with a list where something is missing or double."""

from __future__ import annotations

import ast
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mirai_ds.config import UserError
from mirai_ds.data.stores import open_token_store
from mirai_ds.extract.llamagen import Import, import_llamagen, spans
from mirai_ds.tokenizer import PatchCodebook
from tests.extract.conftest import options


def write_folder(folder: Path, store: Path, padding: int = 0) -> Path:
    """What LlamaGen's extraction would have written of the images in `store`."""
    source = open_token_store(store)
    for name in ("imagenet16_codes", "imagenet16_labels"):
        (folder / name).mkdir(parents=True)
    count = len(source.labels)
    for i in range(count + padding):
        np.save(folder / "imagenet16_codes" / f"{i}.npy", source.codes[i % count][None].astype(np.int64))
        np.save(folder / "imagenet16_labels" / f"{i}.npy", source.labels[i % count : i % count + 1].astype(np.int64))
    return folder


@pytest.fixture
def folder(store: Path, tmp_path: Path) -> Path:
    return write_folder(tmp_path / "theirs", store)


def imported(folder: Path, out: Path, **others: Any) -> Any:
    return import_llamagen(Import(folder, options(folder, out), **others))


def refused(folder: Path, out: Path, *parts: str, **others: Any) -> str:
    with pytest.raises(UserError) as caught:
        imported(folder, out, **others)
    for part in parts:
        assert part in str(caught.value), str(caught.value)
    assert not (out / "manifest.json").exists()
    return str(caught.value)


def test_codes_and_labels_are_theirs(folder: Path, store: Path, tmp_path: Path) -> None:
    made = imported(folder, tmp_path / "s")
    found, wanted = open_token_store(tmp_path / "s"), open_token_store(store)
    assert np.array_equal(found.codes, wanted.codes)
    assert found.labels.tolist() == wanted.labels.tolist()
    assert (made.num_images, made.classes, made.tokenizer.digest) == (18, ["0", "1"], "unknown")
    assert found.names()[:3] == ["0", "1", "2"]


def test_headers_are_parsed_one_at_a_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsers of several threads disturb each other in CPython, and whole files were refused."""
    parse, inside, most = ast.literal_eval, [0], [0]

    def watched(text: Any) -> Any:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.002)  # long enough for another thread to come in
        try:
            return parse(text)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(ast, "literal_eval", watched)
    imported(folder, tmp_path / "s")
    assert most == [1]


def test_names_come_from_the_images(folder: Path, store: Path, photos: Path, codebook: Path, tmp_path: Path) -> None:
    imported(folder, tmp_path / "s", images=photos, tokenizer=codebook)
    found, wanted = open_token_store(tmp_path / "s"), open_token_store(store)
    assert found.names() == wanted.names()
    assert found.manifest.classes == ["china", "flower"]
    assert found.manifest.names_digest == wanted.manifest.names_digest  # so an image store of `photos` fits
    assert found.manifest.tokenizer == wanted.manifest.tokenizer
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    moved = sorted((other / "china").iterdir())[-1]
    moved.rename(other / "flower" / "zzz.png")  # as many images, one in another class
    refused(folder, tmp_path / "t", "image 8, flower/", "has class 1", "codes have label 0", images=other)
    next((other / "flower").iterdir()).unlink()
    refused(folder, tmp_path / "t2", "has 17 images, the codes are of 18", images=other)


def test_holes_are_listed(folder: Path, tmp_path: Path) -> None:
    for i in (3, 4, 5, 9):
        (folder / "imagenet16_codes" / f"{i}.npy").unlink()
    (folder / "imagenet16_labels" / "11.npy").unlink()
    text = refused(folder, tmp_path / "s", "cannot be imported", "imagenet16_codes: 3.npy to 5.npy are missing")
    assert "imagenet16_codes: 9.npy is missing" in text
    assert "imagenet16_labels: 11.npy is missing" in text
    assert not (tmp_path / "s").exists()


def test_strange_files_are_listed(folder: Path, tmp_path: Path) -> None:
    codes = folder / "imagenet16_codes"
    shutil.copy(codes / "7.npy", codes / "007.npy")
    (codes / "notes.txt").write_text("hello")
    text = refused(folder, tmp_path / "s", "7.npy: the same image as 007.npy", "notes.txt: is not called <number>.npy")
    assert "007.npy: must be called 7.npy" in text


def test_long_lists_are_cut(folder: Path, tmp_path: Path) -> None:
    for i in range(40):
        (folder / "imagenet16_codes" / f"x{i:02d}").write_text("")
    text = refused(folder, tmp_path / "s", "... and 20 more")
    assert len(text.splitlines()) == 22
    assert spans([1, 2, 3, 7, 9, 10]) == ["1.npy to 3.npy are", "7.npy is", "9.npy to 10.npy are"]


def test_padding_of_the_sampler(store: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "theirs", store, padding=6)
    refused(folder, tmp_path / "s", "images 18 to 23 are copies of images 0 to 5", "--drop-padding")
    for file in (folder / "imagenet16_codes").iterdir():
        file.write_bytes(b"")  # it goes on with what was read
    made = imported(folder, tmp_path / "s", drop_padding=True)
    assert made.num_images == 18
    assert np.array_equal(open_token_store(tmp_path / "s").codes, open_token_store(store).codes)
    assert made.made_with["drop_padding"] == "True"
    again = write_folder(tmp_path / "again", store, padding=6)
    assert imported(again, tmp_path / "all", keep_duplicates=True).num_images == 24


def test_hidden_names_are_left_out(folder: Path, tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    (folder / "._imagenet16_codes").mkdir()
    (folder / "imagenet16_codes" / ".DS_Store").write_bytes(b"")
    (folder / "imagenet16_codes" / "@eaDir").mkdir()
    assert imported(folder, tmp_path / "s").num_images == 18
    assert f"{folder / 'imagenet16_codes'}: left out 2 hidden or system names, e.g. .DS_Store" in told.messages


def test_the_name_of_the_other_crop_range_is_told(store: Path, tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    folder = write_folder(tmp_path / "imagenet16_code_c2i_flip_ten_crop_105", store)
    import_llamagen(Import(folder, options(folder, tmp_path / "right", crop_range=1.05)))
    assert "1.05" not in told.text
    imported(folder, tmp_path / "s")
    assert f"{folder}: its name is that of LlamaGen's crop range 1.05, --crop-range is 1.1" in told.text


def test_a_tokenizer_without_those_codes_is_refused(folder: Path, tmp_path: Path) -> None:
    few = PatchCodebook(np.arange(4 * 4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 4, 3))
    few.save(tmp_path / "few.npz")
    refused(folder, tmp_path / "s", "has 4 codes, the files' go up to 63", tokenizer=tmp_path / "few.npz")


def test_copies_in_the_middle(folder: Path, tmp_path: Path) -> None:
    for name in ("imagenet16_codes", "imagenet16_labels"):
        shutil.copy(folder / name / "2.npy", folder / name / "12.npy")
    refused(folder, tmp_path / "s", "image 12 has the codes of image 2; --keep-duplicates allows it")
    assert imported(folder, tmp_path / "s", keep_duplicates=True).num_images == 18


BAD = {
    "shape": (np.zeros((10, 16), np.int64), "is int64 (10, 16), not (1, views, tokens) integers"),
    "float": (np.zeros((1, 10, 16)), "is float64 (1, 10, 16)"),
    "range": (np.full((1, 10, 16), 70_000), "codes must lie in 0..65535"),
    "negative": (np.full((1, 10, 16), -1), "codes must lie in 0..65535"),
    "views": (np.zeros((1, 2, 16), np.int64), "are mixed"),
    "object": (np.array([{"a": 1}], dtype=object), "cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_unfit_files_are_named(case: str, folder: Path, tmp_path: Path) -> None:
    array, reason = BAD[case]
    np.save(folder / "imagenet16_codes" / "5.npy", array, allow_pickle=True)
    refused(folder, tmp_path / "s", reason)


def test_other_unfit_folders(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", tmp_path / "s", "no such folder")
    (folder / "imagenet16_codes" / "5.npy").write_bytes(b"\x93NUMPY")
    refused(folder, tmp_path / "s", "5.npy: cannot be read")
    np.save(folder / "imagenet16_codes" / "5.npy", np.zeros((1, 10, 16), np.int64))
    np.save(folder / "imagenet16_labels" / "6.npy", np.array([1, 2]))
    refused(folder, tmp_path / "s", "6.npy: is int64 (2,), not one label")
    np.save(folder / "imagenet16_labels" / "6.npy", np.array([1]))
    with pytest.raises(UserError, match="--crops flip: means 2 views, the files have 10"):
        import_llamagen(Import(folder, options(folder, tmp_path / "t", crops="flip")))
    with pytest.raises(UserError, match="--size 18: does not fit the files' 16 tokens"):
        import_llamagen(Import(folder, options(folder, tmp_path / "u", size=18)))
    (folder / "more_codes").mkdir()
    refused(folder, tmp_path / "s2", "must hold one folder named ..._codes")
