"""Class folders in ImageFolder's order, idx files, and every kind of image file a folder may hold."""

from __future__ import annotations

import gzip
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mirai_ds.config import UserError
from mirai_ds.data.crops import BadImageError
from mirai_ds.data.image_sets import FolderImages, IdxImages, NamedImages, open_image_set, read_idx, read_image

FASHION = Path("/usr/share/datasets/fashion-mnist")


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path: Path, mode: str = "RGB", **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(noise(40, 50)).convert(mode)
    if mode == "RGBA":
        image.putalpha(128)
    image.save(path, **options)
    return path


def test_the_order_is_torchvisions(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    for name in (
        "b/2.png",
        "b/10.png",
        "a/z.JPEG",
        "a/sub/deep/1.jpg",
        "a/sub/0.webp",
        "a/B.png",
        "a/b.bmp",
        "C/x.PNG",
    ):
        save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "stray.png").write_bytes(b"no class")
    (tmp_path / "d").symlink_to(tmp_path / "a" / "sub")
    theirs, ours = ImageFolder(str(tmp_path)), open_image_set(tmp_path)
    assert ours.classes == theirs.classes == ["C", "a", "b", "d"]
    assert [str(tmp_path / name) for name in ours.names] == [path for path, _ in theirs.samples]
    assert ours.labels.tolist() == theirs.targets
    assert ours.labels.dtype == np.int32
    for i in (0, 3, 6):
        assert np.array_equal(np.asarray(ours.load(i).image), np.asarray(theirs[i][0]))


def fails(path: Path, *parts: str, split: str | None = None) -> None:
    with pytest.raises(UserError) as caught:
        open_image_set(path, split)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_folders_that_are_no_image_sets(tmp_path: Path) -> None:
    fails(tmp_path / "none", "no such folder")
    fails(tmp_path, "no class folders and no images")
    save(tmp_path / "a" / "1.png")
    fails(tmp_path, "split = 'train'", "is for idx files", split="train")
    (tmp_path / "empty").mkdir()
    fails(tmp_path, "empty: holds no images", "remove the folder or fill it")
    (tmp_path / "empty").rmdir()
    save(tmp_path / "a" / "line\nbreak.png")
    fails(tmp_path, "holds a line break or is not UTF-8", "rename it")


def test_a_folder_without_class_folders_is_one_class(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mirai_ds"), "propagate", True)
    for name in ("b.png", "a.png"):
        save(tmp_path / name)
    (tmp_path / ".thumbnails").mkdir()
    save(tmp_path / ".thumbnails" / "a.png")
    flat = open_image_set(tmp_path)
    assert (flat.names, flat.classes, flat.labels.tolist()) == (["a.png", "b.png"], ["all"], [0, 0])
    assert caplog.text.count("left out 1 hidden or system names: .thumbnails") == 1
    assert np.array_equal(np.asarray(flat.load(1).image), noise(40, 50))
    save(tmp_path / "cats" / "c.png")  # now that there is a class, they belong to none
    assert open_image_set(tmp_path).names == ["cats/c.png"]
    assert "left out 2 images that lie beside the class folders: a.png, b.png" in caplog.text


def copies(root: Path, *names: str) -> None:
    for name in names:
        save(root / name)


def test_what_systems_put_there_is_no_class_and_no_image(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    copies(tmp_path, "a/1.png", "a/sub/2.png", "b/3.png")
    copies(
        tmp_path, ".ipynb_checkpoints/1.png", "__MACOSX/1.png", "a/@eaDir/thumb.png", "lost+found/1.png", "b/._3.png"
    )
    for name in ("a/one.gif", "a/two.GIF", "b/photo.avif", "README"):
        (tmp_path / name).write_bytes(b"")
    found = open_image_set(tmp_path)
    assert (found.classes, found.labels.tolist()) == (["a", "b"], [0, 0, 1])
    assert found.names == ["a/1.png", "a/sub/2.png", "b/3.png"]
    assert [message.removeprefix(f"{tmp_path}: ") for message in told.messages] == [
        "left out 5 hidden or system names: .ipynb_checkpoints, __MACOSX, lost+found, a/@eaDir, b/._3.png",
        "left out 3 files with endings that ImageFolder does not read: 2 .gif, 1 .avif",
        "3 images in 2 classes: a 2, b 1",
    ]


@pytest.mark.parametrize(("link", "target"), [("a/self", "."), ("a/up", ".."), ("a/sub/above", "../../.."), ("b", ".")])
def test_links_that_lead_back_are_refused_by_name(link: str, target: str, tmp_path: Path) -> None:
    root = tmp_path / "root"
    copies(root, "a/1.png", "a/sub/2.png")
    (root / link).symlink_to(target)
    leads_to = (root / link).resolve()
    fails(root, f"{root / link}: leads back to {leads_to}, which holds it", "remove the link")


def test_a_folder_that_comes_twice_is_told(tmp_path: Path, told: pytest.LogCaptureFixture) -> None:
    copies(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "b" / "more").symlink_to(tmp_path / "a")
    assert open_image_set(tmp_path).names == ["a/1.png", "b/2.png", "b/more/1.png"]
    assert f"{tmp_path}: links bring in 1 folders once more: b/more is a" in told.messages


def test_splits_are_no_classes(tmp_path: Path) -> None:
    copies(tmp_path / "above", "train/a/1.png", "train/b/2.png", "val/a/3.png", "annotations/1.png")
    fails(
        tmp_path / "above", "train and val look like splits, not classes", f"give e.g. {tmp_path / 'above' / 'train'}"
    )
    copies(tmp_path / "one", "train/a/1.png", "train/b/2.png")
    fails(tmp_path / "one", "train looks like a split", f"give e.g. {tmp_path / 'one' / 'train'}")
    copies(tmp_path / "flat", "Train/1.png", "Test/2.png")
    fails(
        tmp_path / "flat", "Test and Train look like splits", "put the images of a split into one folder for each class"
    )
    for name, classes in {
        "vehicles": ["bus/1.png", "train/1.png"], "words": ["test/1.png", "train/1.png", "word/1.png"],
        "trains": ["train/1.png"], "railway": ["bus/1.png", "train/steam/1.png"],
    }.items():  # fmt: skip
        copies(tmp_path / name, *classes)
        assert open_image_set(tmp_path / name).names == classes


def test_numbers_as_class_names_keep_imagefolders_order_and_it_is_told(
    tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    copies(tmp_path / "text", *(f"{name}/1.png" for name in (0, 1, 2, 10, 11)))
    assert open_image_set(tmp_path / "text").classes == ["0", "1", "10", "11", "2"]
    assert "class folders are numbers and sorted as text, as ImageFolder does: folder 10 has label 2" in told.text
    told.clear()
    copies(tmp_path / "padded", *(f"{name:02d}/1.png" for name in (0, 1, 2, 10, 11)))
    open_image_set(tmp_path / "padded")
    copies(tmp_path / "mixed", "10/1.png", "2/1.png", "two/1.png")
    open_image_set(tmp_path / "mixed")
    assert "sorted as text" not in told.text


GOOD = {
    "rgb.jpg": ("RGB", {}, None),
    "progressive.jpg": ("RGB", {"progressive": True}, None),
    "grey.jpg": ("L", {}, None),
    "cmyk.jpg": ("CMYK", {}, "CMYK converted to RGB"),
    "rgb.png": ("RGB", {}, None),
    "grey.png": ("L", {}, None),
    "bilevel.png": ("1", {}, None),
    "palette.png": ("P", {}, "palette converted to RGB"),
    "palette-clear.png": ("P", {"transparency": 0}, "palette converted to RGB; transparency dropped"),
    "alpha.png": ("RGBA", {}, "transparency dropped"),
    "grey-alpha.png": ("LA", {}, "transparency dropped"),
    "alpha.webp": ("RGBA", {"lossless": True}, "transparency dropped"),
    "lossless.webp": ("RGB", {"lossless": True}, None),
    "plain.gif": ("P", {}, "palette converted to RGB"),
    "plain.tiff": ("RGB", {}, None),
    "plain.bmp": ("RGB", {}, None),
    "plain.ppm": ("RGB", {}, None),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_pillow_reads_is_read_as_imagefolder_does(name: str, tmp_path: Path) -> None:
    mode, options, note = GOOD[name]
    save(tmp_path / name, mode, **options)
    found = read_image(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        wanted = np.asarray(image.convert("RGB"))  # torchvision's pil_loader
    assert np.array_equal(np.asarray(found.image), wanted)
    assert (found.image.mode, found.note) == ("RGB", note)
    assert read_image(tmp_path / name, "L").image.mode == "L"


def test_animations_give_their_first_frame(tmp_path: Path) -> None:
    frames = [Image.fromarray(noise(40, 50) // (i + 1)) for i in range(3)]
    for name, options in (("a.webp", {"lossless": True}), ("a.gif", {}), ("a.png", {})):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        found = read_image(tmp_path / name)
        assert found.note is not None
        assert found.note.startswith("first of 3 frames taken")
        if name != "a.gif":
            assert np.array_equal(np.asarray(found.image), noise(40, 50))


def test_small_images_are_noted_and_orientation_is_not_applied(tmp_path: Path) -> None:
    Image.fromarray(noise(1, 1)).save(tmp_path / "one.png")
    assert read_image(tmp_path / "one.png").note == "only 1x1 pixels"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees; LlamaGen's loader ignores it, so its codes are of the unturned image
    Image.fromarray(noise(40, 50)).save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").image.size == (50, 40)


def test_damaged_files_give_a_reason(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.jpg").read_bytes()
    png = save(tmp_path / "whole.png").read_bytes()
    wide = (noise(40, 50, 1)[..., 0].astype(np.uint16) * 257).tobytes()
    Image.frombytes("I;16", (50, 40), wide).save(tmp_path / "sixteen.png")
    Image.fromarray(noise(4, 4, 1)[..., 0].astype(np.float32)).save(tmp_path / "float.tiff")
    cases = {
        "cut.jpg": (whole[: len(whole) // 2], "truncated"), "empty.jpg": (b"", "cannot identify"),
        "text.jpg": (b"<html>404</html>", "cannot identify"), "cut.png": (png[: len(png) // 2], "cannot be read"),
        "flipped.png": (png[:20] + bytes([png[20] ^ 0xFF]) + png[21:], "cannot be read"),
        "sixteen.png": (None, "more than 8 bits a channel (mode I;16)"),
        "float.tiff": (None, "more than 8 bits a channel (mode F)"),
    }  # fmt: skip
    for name, (data, reason) in cases.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(BadImageError) as caught:
            read_image(tmp_path / name)
        assert reason in str(caught.value), name
        assert str(tmp_path) not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_failing_file_system_is_not_the_images_fault(tmp_path: Path) -> None:
    """A file that cannot be opened must stop an extraction: leaving it out would change the data set."""
    with pytest.raises(UserError, match="cannot be opened \\(No such file"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(UserError, match="cannot be opened \\(Is a directory"):
        read_image(tmp_path)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, split: str, count: int, packed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    images, labels = noise(count * 4, 5, 1).reshape(count, 4, 5), np.arange(count) % 3
    for what, array, n in (("images", images, 3), ("labels", labels, 1)):
        path = folder / f"{split}-{what}-idx{n}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return images, labels


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(packed: bool, tmp_path: Path) -> None:
    images, labels = write_idx(tmp_path, "train", 7, packed)
    others, _ = write_idx(tmp_path, "t10k", 4, packed)
    found = open_image_set(tmp_path)
    assert (found.classes, found.labels.tolist()) == (["0", "1", "2"], labels.tolist())
    assert found.names[:2] == ["train/000000", "train/000001"]
    for i in range(7):
        assert np.array_equal(np.asarray(found.load(i, "L").image), images[i])
        assert np.array_equal(np.asarray(found.load(i).image), np.repeat(images[i][..., None], 3, 2))
    test = open_image_set(tmp_path, "t10k")
    assert test.names[3] == "t10k/000003"
    assert np.array_equal(np.asarray(test.load(3, "L").image), others[3])


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "a/../../b.png"])
def test_a_list_of_names_stays_below_its_folder(name: str, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a..b.png")  # two dots in a name are none of that
    assert NamedImages(tmp_path, ["a..b.png"]).missing() is None
    with pytest.raises(UserError, match="is not below that folder"):
        NamedImages(tmp_path, ["a..b.png", name])


def test_damaged_idx_files(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", 7)
    path = tmp_path / "train-images-idx3-ubyte"
    good = path.read_bytes()
    for data, reason in {
        good[:-1]: "holds 139 bytes, its header (7, 4, 5) promises 140", good + b"x": "holds 141 bytes",
        b"": "begins with nothing", good[:9]: "cut short in its header", b"\0\0\x0d" + good[3:]: "not an idx file",
    }.items():  # fmt: skip
        path.write_bytes(data)
        fails(tmp_path, reason)
    path.write_bytes(idx(noise(6 * 4, 5, 1).reshape(6, 4, 5)))
    fails(tmp_path, "train images (6, 4, 5) and labels (7,) do not belong together")
    fails(tmp_path, "has no t10k-images-idx3-ubyte", split="t10k")
    (tmp_path / "z.gz").write_bytes(gzip.compress(good)[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        read_idx(tmp_path / "z.gz")


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_as_debian_packages_it() -> None:
    found = open_image_set(FASHION)
    assert isinstance(found, IdxImages)
    assert (found.pixels.shape, np.bincount(found.labels).tolist()) == ((60000, 28, 28), [6000] * 10)
    assert not isinstance(found, FolderImages)
    assert len(open_image_set(FASHION, "t10k").names) == 10000
