"""From image files to a token store: every code is the tokenizer's of the right pixels, and nothing is lost unsaid."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mirai_ds.config import UserError
from mirai_ds.data.crops import ViewGeometry, centre_crop
from mirai_ds.data.image_sets import open_image_set
from mirai_ds.data.stores import open_token_store
from mirai_ds.extract import extract_codes
from mirai_ds.extract.run import automatic_block
from mirai_ds.resumable import parts
from mirai_ds.runtime.distributed import World
from mirai_ds.runtime.log import LOG
from mirai_ds.tokenizer import open_tokenizer
from tests.extract.conftest import ALONE, content, options


@pytest.mark.parametrize("crops", ["ten", "flip", "one"])
def test_codes_are_the_tokenizers_of_every_view(crops: str, photos: Path, codebook: Path, tmp_path: Path) -> None:
    made = extract_codes(options(photos, tmp_path / "s", crops=crops), ALONE, codebook, batch=5)
    store, found, tokenizer = open_token_store(tmp_path / "s"), open_image_set(photos), open_tokenizer(codebook)
    geometry = ViewGeometry(16, crops, 1.1)  # type: ignore[arg-type]
    assert store.codes.shape == (18, geometry.num_views, 16)
    assert store.codes.dtype == np.uint16
    assert isinstance(store.codes, np.memmap)
    assert made is not None
    assert (made.num_images, made.classes, made.failed, made.converted) == (18, ["china", "flower"], 0, 0)
    assert store.labels.tolist() == [0] * 9 + [1] * 9
    assert store.names() == found.names
    for i in range(18):
        crop = centre_crop(found.load(i).image, geometry.side)
        views = np.stack([geometry.view(crop, v) for v in range(geometry.num_views)])
        assert np.array_equal(store.codes[i], tokenizer.encode(torch.from_numpy(views)).numpy())
    assert len(np.unique(store.codes)) > 40  # not all alike
    assert store.manifest.max_code == store.codes.max()
    assert (store.manifest.tokenizer.digest, store.manifest.tokenizer.vocab_size) == (tokenizer.digest, 64)
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [
        "codes.npy", "labels.npy", "manifest.json", "names.txt", "problems.jsonl", "tokenizer.npz",
    ]  # fmt: skip


def test_blocks_threads_and_ranks_do_not_change_the_content(
    store: Path, photos: Path, codebook: Path, tmp_path: Path
) -> None:
    wanted = open_token_store(store)
    for block, workers in ((1, 1), (5, 3), (100, 2)):
        out = tmp_path / f"b{block}"
        extract_codes(options(photos, out, block=block, workers=workers), ALONE, codebook, batch=7)
        assert np.array_equal(open_token_store(out).codes, wanted.codes)
    out = tmp_path / "ranks"
    with pytest.raises(UserError, match="3 of 5 blocks are missing"):  # blocks 0 and 3 are its own
        extract_codes(options(photos, out, stall_timeout=0.0), World(0, 0, 3, 3), codebook, batch=7)
    for rank in (2, 1):
        assert extract_codes(options(photos, out), World(rank, rank, 3, 3), codebook, batch=7) is None
    assert not (out / "manifest.json").is_file()
    extract_codes(options(photos, out), World(0, 0, 3, 3), codebook, batch=7)
    assert content(out) == content(store)


def test_a_finished_store_is_left_alone(store: Path, photos: Path, codebook: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    shutil.copytree(store, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "parts").mkdir()  # a kill between the manifest and tidying up
    (out / "codes.npy.host-1.tmp").write_bytes(b"rest")
    made = extract_codes(options(photos, out), ALONE, codebook, batch=7)
    assert made is not None
    assert made.num_images == 18
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    refused(r"begun with batch = '7', this is '8'", photos, out, codebook, batch=8)


def refused(pattern: str, photos: Path, out: Path, codebook: Path, batch: int = 7, **others: object) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        extract_codes(options(photos, out, **others), ALONE, codebook, batch=batch)
    assert "\n" not in str(caught.value)


def test_other_settings_do_not_go_on_with_an_unfinished_store(photos: Path, codebook: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    with pytest.raises(UserError, match="blocks are missing"):
        extract_codes(options(photos, out, stall_timeout=0.0), World(0, 0, 2, 2), codebook, batch=7)
    refused(r"batch = '7', this is '9'", photos, out, codebook, batch=9)
    refused(r"block = '4', this is '8'", photos, out, codebook, block=8)
    refused(r"crop_range = '1.1', this is '1.3'", photos, out, codebook, crop_range=1.3)
    other = tmp_path / "elsewhere"
    shutil.copytree(photos, other)
    refused("begun with images = ", other, out, codebook)
    extract_codes(options(photos, out), ALONE, codebook, batch=7)


def test_the_log_says_from_where_it_goes_on(
    photos: Path, codebook: Path, tmp_path: Path, told: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before the work begins what was taken for classes."""
    monkeypatch.setattr(LOG, "handlers", [])  # pytest's own among them
    with pytest.raises(UserError, match="blocks are missing"):
        extract_codes(options(photos, tmp_path / "s", block=4, stall_timeout=0.0), World(0, 0, 2, 2), codebook)
    assert told.messages == [f"{photos}: 18 images in 2 classes: china 9, flower 9"]
    extract_codes(options(photos, tmp_path / "s", block=4), ALONE, codebook)
    assert [message.startswith("going on after ") for message in told.messages] == [False, True]


def test_a_folder_in_use_is_not_written_into(photos: Path, codebook: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    refused("holds 'thesis.tex' and no extraction", photos, tmp_path, codebook)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.fixture(scope="module")
def troubled(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos` with files of every kind that something must be said about."""
    root = tmp_path_factory.mktemp("troubled") / "train"
    shutil.copytree(photos, root)
    image = Image.open(photos / "china" / "000.jpg").convert("RGB")
    data = (photos / "china" / "000.jpg").read_bytes()
    (root / "china" / "0-corrupt.jpg").write_bytes(data[: len(data) // 2])
    (root / "flower" / "9-page.jpg").write_bytes(b"<html>not found</html>")
    (root / "flower" / "9-sliver.png").parent.mkdir(exist_ok=True)
    Image.new("RGB", (1, 700_000)).save(root / "flower" / "9-sliver.png")
    image.convert("CMYK").save(root / "china" / "1-cmyk.jpg")
    image.convert("P").save(root / "china" / "2-palette.png")
    image.convert("RGBA").save(root / "china" / "3-alpha.png")
    image.resize((1, 1)).save(root / "flower" / "4-pixel.png")
    frames = [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    frames[0].save(root / "flower" / "5-moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    return root


def test_troubled_images_are_named_with_the_reason(troubled: Path, codebook: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    made = extract_codes(options(troubled, out), ALONE, codebook)
    assert made is not None
    assert (made.num_images, made.failed, made.converted) == (23, 3, 5)
    problems = {p["name"]: p for p in map(json.loads, (out / "problems.jsonl").read_text().splitlines())}
    expected = {
        "china/0-corrupt.jpg": (False, "truncated"), "flower/9-page.jpg": (False, "cannot identify"),
        "flower/9-sliver.png": (False, "too narrow"), "china/1-cmyk.jpg": (True, "CMYK converted to RGB"),
        "china/2-palette.png": (True, "palette converted"), "china/3-alpha.png": (True, "transparency dropped"),
        "flower/4-pixel.png": (True, "only 1x1 pixels"), "flower/5-moving.webp": (True, "first of 2 frames"),
    }  # fmt: skip
    assert problems.keys() == expected.keys()
    for name, (kept, reason) in expected.items():
        assert problems[name]["kept"] is kept
        assert reason in problems[name]["reason"]
    store = open_token_store(out)
    names = [name for name in open_image_set(troubled).names if problems.get(name, {"kept": True})["kept"]]
    assert store.names() == names
    assert store.labels.tolist() == [int(name.startswith("flower")) for name in names]
    # What follows a hole is still in its place.
    clean = dict(zip(names, store.codes, strict=True))
    first = np.asarray(clean["china/000.jpg"])
    assert np.array_equal(clean["china/3-alpha.png"], first)
    assert np.array_equal(clean["flower/5-moving.webp"], first)


def test_strict_stops_at_the_first_unreadable_image(troubled: Path, codebook: Path, tmp_path: Path) -> None:
    refused(r"china/0-corrupt\.jpg: .*truncated.*\(--strict\)", troubled, tmp_path / "s", codebook, strict=True)
    extract_codes(options(troubled, tmp_path / "s"), ALONE, codebook, batch=7)  # goes on without it


def test_nothing_readable_is_an_error(tmp_path: Path, codebook: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "x.jpg").write_bytes(b"no")
    refused("not one image could be used; a/x.jpg: cannot be read", tmp_path / "in", tmp_path / "s", codebook)


def test_a_vanished_file_stops_instead_of_leaving_a_hole(photos: Path, codebook: Path, tmp_path: Path) -> None:
    root = tmp_path / "in"
    shutil.copytree(photos, root)
    out = tmp_path / "s"
    with pytest.raises(UserError, match="blocks are missing"):
        extract_codes(options(root, out, stall_timeout=0.0), World(0, 0, 2, 2), codebook)
    moved = root / open_image_set(root).names[12]  # in a block that is still to do
    moved.rename(tmp_path / "aside")
    with pytest.raises(UserError, match=r"flower.*cannot be opened \(No such file"):
        extract_codes(options(root, out), ALONE, codebook)
    assert not (out / "manifest.json").is_file()
    os.rename(tmp_path / "aside", moved)
    made = extract_codes(options(root, out), ALONE, codebook)
    assert made is not None
    assert made.num_images == 18


def test_a_torn_part_is_done_anew(store: Path, photos: Path, codebook: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    with pytest.raises(UserError, match="blocks are missing"):
        extract_codes(options(photos, out, stall_timeout=0.0), World(0, 0, 2, 2), codebook, batch=7)
    parts = sorted((out / "parts").glob("*.npz"))
    assert len(parts) == 3
    parts[0].write_bytes(parts[0].read_bytes()[:100])
    damaged = bytearray(parts[1].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    parts[1].write_bytes(bytes(damaged))
    parts[2].write_bytes(b"")
    extract_codes(options(photos, out), ALONE, codebook, batch=7)
    assert content(out) == content(store)


def test_a_slow_rank_is_waited_for_and_a_dead_one_is_not(
    photos: Path, codebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block may take an hour; what counts is that somebody works on it."""
    monkeypatch.setattr(parts, "BEAT_SECONDS", 0.2)
    out, reached, go = tmp_path / "s", threading.Event(), threading.Event()
    real = parts.write_part

    def slow(path: Path, part: parts.Part) -> None:
        if path.name == "000001.npz":  # rank 1's first
            reached.set()
            go.wait(30)
        real(path, part)

    monkeypatch.setattr(parts, "write_part", slow)
    with pytest.raises(UserError, match="2 of 5 blocks are missing and nobody has worked on them for 1 seconds"):
        extract_codes(options(photos, out, stall_timeout=1.0), World(0, 0, 2, 2), codebook)
    other = threading.Thread(target=extract_codes, args=(options(photos, out), World(1, 1, 2, 2), codebook))
    other.start()
    assert reached.wait(30)
    threading.Timer(3.0, go.set).start()  # three times rank 0's stall timeout
    made = extract_codes(options(photos, out, stall_timeout=1.0), World(0, 0, 2, 2), codebook)
    other.join()
    assert made is not None
    assert made.num_images == 18


def test_a_full_disk_is_one_line_and_loses_nothing(
    store: Path, photos: Path, codebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, room = parts.write_whole, [2]

    def until_full(path: Path, data: bytes) -> None:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= 1
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_whole", until_full)
        refused(r"cannot be written \(No space left on device\); fix this", photos, tmp_path / "s", codebook)
    assert len(list((tmp_path / "s" / "parts").glob("*.npz"))) == 2
    extract_codes(options(photos, tmp_path / "s"), ALONE, codebook, batch=7)
    assert content(tmp_path / "s") == content(store)
    (tmp_path / "file").write_text("")
    refused("cannot be written", photos, tmp_path / "file" / "s", codebook)


def test_small_sets_are_done_in_small_blocks() -> None:
    assert [automatic_block(n, 256) for n in (1, 18, 640, 1000, 60_000, 1_281_167)] == [1, 1, 10, 15, 256, 256]


def test_tokenizers_that_do_not_fit(photos: Path, codebook: Path, tmp_path: Path) -> None:
    refused("18", photos, tmp_path / "s", codebook, size=18)
    refused("none.pt", photos, tmp_path / "s", tmp_path / "none.pt")
