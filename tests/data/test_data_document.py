"""docs/data.md, what it says of files: each sentence against a file that tries it.

A sentence that is reworded fails here first, so that page and code are changed together.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mirai_ds.config import UserError
from mirai_ds.data.crops import ViewGeometry
from mirai_ds.data.image_sets import open_image_set
from mirai_ds.data.stores import open_image_store, open_token_store
from mirai_ds.extract import Options, extract_codes, extract_images
from mirai_ds.extract.codebook import learn_codebook
from mirai_ds.runtime.distributed import World
from tests.data.test_image_sets import noise

PAGE = " ".join((Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8").split())
ALONE = World(0, 0, 1, 1)
PHOTO = Image.fromarray(noise(40, 50))


def says(sentence: str) -> None:
    assert sentence in PAGE, f"docs/data.md does not say: {sentence}"


def saved(**options: Any) -> Callable[[Path], None]:
    mode = options.pop("mode", "RGB")
    return lambda path: PHOTO.convert(mode).save(path, **options)


def oriented(tag: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif


def png(channels: int) -> Callable[[Path], None]:
    """16 bits a channel: grey, grey and alpha, RGB, RGBA; Pillow writes only the first."""
    pixels = np.random.default_rng(1).integers(0, 65536, (40, 50, channels)).astype(">u2")
    header = struct.pack(">IIBBBBB", 50, 40, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return lambda path: path.write_bytes(whole)  # type: ignore[return-value]


def ppm(largest: int) -> Callable[[Path], None]:
    data = np.random.default_rng(1).integers(0, largest, 40 * 50 * 3).astype(">u2" if largest > 255 else "u1")
    return lambda path: path.write_bytes(b"P6\n50 40\n%d\n" % largest + data.tobytes())  # type: ignore[return-value]


def cut(path: Path) -> None:
    PHOTO.save(path)
    path.write_bytes(path.read_bytes()[:-900])


# the words of the table -> files that try them, with the reason in problems.jsonl (None: nothing of note)
KEPT: dict[str, dict[str, tuple[Callable[[Path], None], str | None]]] = {
    "CMYK": {"cmyk.jpg": (saved(mode="CMYK"), "CMYK converted to RGB")},
    "palette": {"palette.png": (saved(mode="P"), "palette converted to RGB")},
    "transparency dropped": {
        "alpha.png": (saved(mode="RGBA"), "transparency dropped"),
        "grey.png": (saved(mode="LA"), "transparency dropped"),
    },
    "animations (first frame)": {
        "moving.webp": (
            saved(save_all=True, append_images=[Image.new("RGB", (50, 40))], lossless=True),
            "first of 2 frames taken",
        ),
    },
    "sides under 32 pixels": {
        "small.png": (lambda path: PHOTO.resize((31, 40)).save(path), "only 31x40 pixels"),
        "enough.png": (lambda path: PHOTO.resize((32, 32)).save(path), None),
    },
    "colours of 16 bits a channel (the high 8 are taken)": {
        "deep.png": (png(3), "more than 8 bits a channel reduced to 8"),
        "deep-alpha.png": (png(4), "more than 8 bits a channel reduced to 8; transparency dropped"),
        "deep-grey-alpha.png": (png(2), "more than 8 bits a channel reduced to 8; transparency dropped"),
        "deep.ppm": (ppm(1023), "more than 8 bits a channel reduced to 8"),
        "plain.ppm": (ppm(200), None),
    },
    "an orientation tag that is not applied": {
        "turned.jpg": (saved(exif=oriented(6)), "not turned by its orientation tag (6)"),
        "turned.png": (saved(exif=oriented(3)), "not turned by its orientation tag (3)"),
        "turned.webp": (saved(exif=oriented(8)), "not turned by its orientation tag (8)"),
        "straight.jpg": (saved(exif=oriented(1)), None),
        "nonsense.jpg": (saved(exif=oriented(9)), None),
        "damaged.jpg": (saved(exif=b"Exif\0\0MM\0*\0\0\0"), None),
    },
}
LEFT_OUT: dict[str, dict[str, tuple[Callable[[Path], None], str]]] = {
    "truncated or undecodable": {
        "cut.jpg": (cut, "cannot be read"),
        "text.png": (lambda path: path.write_text("<html>"), "cannot be read"),  # type: ignore[dict-item,return-value]
    },
    "grey of more than 8 bits": {
        "deep-grey.png": (png(1), "more than 8 bits a channel (mode I;16)"),
        "float.tiff": (saved(mode="F"), "more than 8 bits a channel (mode F)"),
    },
    "slivers too narrow to enlarge": {
        "sliver.png": (lambda path: PHOTO.resize((1, 60000)).save(path), "1x60000 pixels is too narrow"),
    },
}
CASES = [(words, name) for table in (KEPT, LEFT_OUT) for words, files in table.items() for name in files]


def options(images: Path, out: Path, **others: Any) -> Options:
    return Options(**{"images": images, "out": out, "size": 80, "crops": "one", **others})


def problems(store: Path) -> dict[str, dict[str, Any]]:
    lines = (store / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["name"].removeprefix("a/"): line for line in map(json.loads, lines)}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store made of every odd file; `plain.png` is a good one."""
    root = tmp_path_factory.mktemp("odd")
    (root / "images" / "a").mkdir(parents=True)
    PHOTO.save(root / "images" / "a" / "zz-plain.png")
    for table in (KEPT, LEFT_OUT):
        for files in table.values():
            for name, (write, _) in files.items():
                write(root / "images" / "a" / name)
    extract_images(options(root / "images", root / "store"), ALONE)
    return root


@pytest.mark.parametrize(("words", "name"), CASES, ids=[name for _, name in CASES])
def test_the_table_of_odd_files(words: str, name: str, odd: Path) -> None:
    says(words)
    store, said = open_image_store(odd / "store"), problems(odd / "store")
    if words in KEPT:
        reason = KEPT[words][name][1]
        assert f"a/{name}" in store.names()
        assert said[name]["reason"].startswith(reason) if reason else name not in said
        assert name not in said or said[name]["kept"]
    else:
        assert f"a/{name}" not in store.names()
        assert LEFT_OUT[words][name][1] in said[name]["reason"]
        assert not said[name]["kept"]


def test_files_are_read_as_imagefolder_reads_them(odd: Path) -> None:
    says("Everything is read as `ImageFolder` reads it (first frame, RGB, orientation tag ignored)")
    from torchvision.datasets.folder import pil_loader

    images = open_image_set(odd / "images")
    for index, name in enumerate(images.names):
        if any(name == f"a/{kept}" for files in KEPT.values() for kept in files):
            theirs = np.asarray(pil_loader(str(odd / "images" / name)))
            assert np.array_equal(np.asarray(images.load(index).image), theirs), name


def test_strict_stops_at_the_first_that_would_be_left_out(odd: Path, tmp_path: Path) -> None:
    says("`--strict` stops at the first one that would be left out.")
    with pytest.raises(UserError, match=r"cut\.jpg.*cannot be read"):
        extract_images(options(odd / "images", tmp_path / "s", strict=True), ALONE)


def test_what_cannot_be_opened_stops_the_extraction(tmp_path: Path) -> None:
    says("A file that cannot be *opened* always stops the extraction")
    (tmp_path / "i" / "a").mkdir(parents=True)
    PHOTO.save(tmp_path / "i" / "a" / "1.png")
    (tmp_path / "i" / "a" / "2.png").symlink_to("gone.png")
    with pytest.raises(UserError, match=r"2\.png: cannot be opened \(No such file"):
        extract_images(options(tmp_path / "i", tmp_path / "s"), ALONE)


def test_upright_turns_photographs(odd: Path, tmp_path: Path) -> None:
    """By each tag as viewers show it; codes of turned photographs find their turned pixels in the original files."""
    says("`--upright` applies it, in `codes`, `images` and `codebook` alike")
    says("TIFF files are turned by Pillow itself")
    from mirai_ds.config import ConfigError, DataConfig
    from mirai_ds.data.store_source import from_store

    folder = tmp_path / "i"
    (folder / "a").mkdir(parents=True)
    for tag in range(1, 9):
        PHOTO.save(folder / "a" / f"{tag}.png", exif=oriented(tag))
    PHOTO.save(folder / "a" / "9.tiff", exif=oriented(6))
    straight, plain, turned = PHOTO, open_image_set(folder), open_image_set(folder, upright=True)
    transpose = Image.Transpose
    ways = [
        None, transpose.FLIP_LEFT_RIGHT, transpose.ROTATE_180, transpose.FLIP_TOP_BOTTOM, transpose.TRANSPOSE,
        transpose.ROTATE_270, transpose.TRANSVERSE, transpose.ROTATE_90, transpose.ROTATE_270,
    ]  # fmt: skip
    for index, way in enumerate(ways):
        wanted = straight if way is None else straight.transpose(way)
        assert np.array_equal(np.asarray(turned.load(index).image), np.asarray(wanted)), index + 1
        if index < 8:
            assert np.array_equal(np.asarray(plain.load(index).image), np.asarray(straight))
    assert turned.load(5).note == "turned by its orientation tag (6)"
    book = tmp_path / "book.npz"
    learn_codebook(folder, book, 80, 8, 16, None, 9, 0, None, upright=True)
    extract_codes(options(folder, tmp_path / "codes", upright=True), ALONE, book)
    assert open_token_store(tmp_path / "codes").manifest.upright
    data = DataConfig(source="store", path=str(tmp_path / "codes"), images=str(folder))
    pixels = from_store(data).images
    assert pixels is not None
    extract_images(options(folder, tmp_path / "images", upright=True), ALONE)
    packed = from_store(data.model_copy(update={"images": str(tmp_path / "images")})).images
    assert packed is not None
    nine, first = np.arange(9), np.zeros(9, np.int64)
    assert np.array_equal(pixels.gather(nine, first), packed.gather(nine, first))
    extract_images(options(folder, tmp_path / "lying"), ALONE)
    with pytest.raises(ConfigError, match="turned upright; extract the images with the same settings"):
        from_store(data.model_copy(update={"images": str(tmp_path / "lying")}))


@pytest.mark.parametrize("ending", [".gif", ".jfif", ".avif", ".heic"])
def test_other_endings_are_told(ending: str, tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    says("files with endings that `ImageFolder` does not read (`.gif`, `.jfif`, `.avif`, `.heic` ...)")
    (tmp_path / "a").mkdir()
    PHOTO.save(tmp_path / "a" / "1.png")
    (tmp_path / "a" / f"2{ending}").write_bytes(b"")
    assert open_image_set(tmp_path).names == ["a/1.png"]
    assert f"left out 1 files with endings that ImageFolder does not read: 1 {ending}" in told.text


def test_classes_links_and_splits(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    says("sorted as text, as `ImageFolder` does; images may lie deeper in them, and links are followed")
    says("Names that begin with a dot and system names (`@eaDir`, `__MACOSX`, `lost+found`, `#recycle`, `$RECYCLE.BIN`")
    says("A link to a folder that holds it is refused.")
    says("Splits in place of classes (`train` and `val`) are refused")
    says("Numbers without zeros in front sort as text (10 before 2)")
    for name in ("2/deep/1.png", "10/1.png", ".git/1.png", "@eaDir/1.png", "__MACOSX/1.png", "lost+found/1.png",
                 "#recycle/1.png", "$RECYCLE.BIN/1.png", "10/.hidden.png"):  # fmt: skip
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        PHOTO.save(tmp_path / "train" / name)
    (tmp_path / "train" / "3").symlink_to("2")
    found = open_image_set(tmp_path / "train")
    assert found.names == ["10/1.png", "2/deep/1.png", "3/deep/1.png"]
    assert "links bring in 2 folders once more: 3 is 2, 3/deep is 2/deep" in told.text
    assert "folder 10 has label 0" in told.text
    (tmp_path / "val").symlink_to("train")
    with pytest.raises(UserError, match="train and val look like splits"):
        open_image_set(tmp_path)
    (tmp_path / "train" / "2" / "up").symlink_to("..")
    with pytest.raises(UserError, match="2/up: leads back to"):
        open_image_set(tmp_path / "train")


def test_the_views() -> None:
    says("S = int(size * 1.1) for ten crops")
    says("view v + 5 is not the mirror of view v (view 5 mirrors view 1)")
    says("at 281 pixels view 9 lies one pixel beside the mirror of view 4")
    geometry = ViewGeometry(256)
    assert (geometry.side, ViewGeometry(384).side) == (281, 422)
    crop = noise(281, 281)
    views = [geometry.view(crop, view) for view in range(10)]
    assert np.array_equal(views[5], views[1][:, ::-1])
    assert not np.array_equal(views[5], views[0][:, ::-1])
    top, left, _ = geometry.windows()[4]
    beside = [crop[top : top + 256, left + by : left + by + 256][:, ::-1] for by in (-1, 0, 1)]
    assert [np.array_equal(views[9], other) for other in beside].count(True) == 1
    assert not np.array_equal(views[9], beside[1])


def test_the_formats(odd: Path, tmp_path: Path) -> None:
    says("codes.npy (images, views, tokens) uint16")
    says("index.npy (images, 3) int64: shard, start, length")
    says("labels.npy int32, names.txt, problems.jsonl, manifest.json")
    says("JPEG, quality 95: not the same pixels")
    says("lossless WebP and PNG give the same pixels")
    says("a folder without it is no store")
    book, images = tmp_path / "book.npz", odd / "images"
    said = learn_codebook(images, book, 80, 8, 16, None, 5000, 0, None)
    lost = sum(len(files) for files in LEFT_OUT.values())
    assert f" images ({lost} more could not be read), " in said
    extract_codes(options(images, tmp_path / "codes"), ALONE, book)
    codes, labels = np.load(tmp_path / "codes" / "codes.npy"), np.load(tmp_path / "codes" / "labels.npy")
    kept = len(open_image_store(odd / "store").names())
    assert (codes.dtype, codes.shape, labels.dtype) == (np.uint16, (kept, 1, 100), np.int32)
    index = np.load(odd / "store" / "index.npy")
    assert (index.dtype, index.shape) == (np.int64, (kept, 3))
    files = {"labels.npy", "names.txt", "problems.jsonl", "manifest.json"}
    assert {path.name for path in (tmp_path / "codes").iterdir()} == files | {"codes.npy", "tokenizer.npz"}
    shards = {f"images-{block:05d}.bin" for block in index[:, 0].tolist()}
    assert {path.name for path in (odd / "store").iterdir()} >= files | shards | {"index.npy"}
    extract_images(options(images, tmp_path / "png"), ALONE, "png")
    extract_images(options(images, tmp_path / "jpeg"), ALONE, "jpeg")
    webp, png, jpeg = (open_image_store(path) for path in (odd / "store", tmp_path / "png", tmp_path / "jpeg"))
    assert jpeg.manifest.quality == 95
    assert all(np.array_equal(webp.crop(image), png.crop(image)) for image in range(kept))
    assert not np.array_equal(webp.crop(0), jpeg.crop(0))
    (tmp_path / "codes" / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not a store"):
        open_token_store(tmp_path / "codes")
