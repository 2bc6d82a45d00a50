"""Patch codebooks: exact nearest patches, learned the same every time, stored and read back or refused."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from mirai_ds.tokenizer import (
    PatchCodebook,
    VQConfig,
    VQTokenizer,
    open_tokenizer,
    patch_codebook,
    reconstruction_error,
)
from mirai_ds.tokenizer.patch_codebook import Array
from tests.one_line import one_line


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def plain_codes(images: Array, patches: Array) -> list[list[int]]:
    """By loops over whole numbers: the first patch of the least squared distance."""
    p = patches.shape[1]
    out = []
    for image in images.astype(np.int64):
        row = []
        for top in range(0, image.shape[0], p):
            for left in range(0, image.shape[1], p):
                cut = image[top : top + p, left : left + p]
                distances = [int(((cut - patch) ** 2).sum()) for patch in patches.astype(np.int64)]
                row.append(distances.index(min(distances)))
        out.append(row)
    return out


def test_what_a_codebook_says_of_itself() -> None:
    book = PatchCodebook(noise(7, 4, 4, 3))
    assert (book.name, book.vocab_size, book.downsampling, book.channels) == ("patch-codebook", 7, 4, 3)
    assert [book.grid(size) for size in (4, 32)] == [1, 8]
    for size in (0, -4, 6):
        one_line(lambda size=size: book.grid(size), f"image size {size}", "multiple of", "4")
    changed = book.patches.copy()
    changed[3, 1, 2, 0] ^= 1
    same = PatchCodebook(np.asfortranarray(book.patches))
    digests = [PatchCodebook(x).digest for x in (changed, book.patches[:6], book.patches.reshape(28, 2, 2, 3))]
    assert same.digest == book.digest
    assert len({book.digest, *digests}) == 4


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_codes_are_the_nearest_patches(channels: int, patch: int) -> None:
    images, patches = noise(3, 8, 8, channels, seed=patch), noise(9, patch, patch, channels, seed=10 + channels)
    codes = PatchCodebook(patches).encode(torch.from_numpy(images))
    assert (codes.dtype, tuple(codes.shape)) == (torch.int64, (3, (8 // patch) ** 2))
    assert codes.tolist() == plain_codes(images, patches)


def test_of_equally_near_patches_the_first() -> None:
    patches = np.array([9, 4, 4, 6, 6, 0], np.uint8).reshape(6, 1, 1, 1)
    images = np.array([5, 4, 6, 7, 2, 3], np.uint8).reshape(6, 1, 1, 1)
    assert PatchCodebook(patches).encode(torch.from_numpy(images)).flatten().tolist() == [1, 1, 3, 3, 1, 1]
    swapped = PatchCodebook(patches[[3, 1, 0, 2, 4, 5]]).encode(torch.from_numpy(images))
    assert swapped.flatten().tolist() == [0, 1, 0, 0, 1, 1]


def test_differences_of_one_level_in_large_patches_decide() -> None:
    """Distances near 3.2e9 that differ by 3: float32 could not tell them apart."""
    near, far = np.full((2, 1, 128, 128, 3), 255, np.uint8)
    near[0, 0, 0, 0], far[0, 0, 0, 0] = 1, 2
    black = torch.zeros(1, 128, 128, 3, dtype=torch.uint8)
    assert PatchCodebook(np.concatenate([far, near])).encode(black).tolist() == [[1]]
    assert PatchCodebook(np.concatenate([near, far])).encode(black).tolist() == [[0]]


@pytest.mark.parametrize("entries", [1, 64, 1000])
def test_codes_do_not_depend_on_chunks_batches_or_threads(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images, patches = noise(5, 16, 16, 3), noise(50, 2, 2, 3, seed=1) // 64 * 64  # few levels: many ties
    book = PatchCodebook(patches)
    whole = book.encode(torch.from_numpy(images))
    assert whole.tolist() == plain_codes(images, patches)
    monkeypatch.setattr(patch_codebook, "DISTANCE_ENTRIES", entries)
    with threadpool_limits(1):
        assert book.encode(torch.from_numpy(images)).tolist() == whole.tolist()
    assert torch.cat([book.encode(torch.from_numpy(image[None])) for image in images]).tolist() == whole.tolist()
    assert book.encode(torch.from_numpy(images[:0])).shape == (0, 64)


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 1, 1]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_decode_lays_patches_out(channels: int, shown: list[int]) -> None:
    patches, tokens = noise(6, 2, 2, channels), torch.tensor([[0, 1, 2, 3], [5, 5, 4, 0]])
    images = PatchCodebook(patches).decode(tokens)
    assert (images.dtype, images.shape, images.flags.c_contiguous) == (np.uint8, (2, 4, 4, 3), True)
    for image, codes in zip(images, tokens.tolist(), strict=True):
        for cell, code in enumerate(codes):
            top, left = cell // 2 * 2, cell % 2 * 2
            assert np.array_equal(image[top : top + 2, left : left + 2], patches[code][..., shown])
    assert PatchCodebook(patches).decode(tokens[:0]).shape == (0, 4, 4, 3)


def test_inputs_that_do_not_fit() -> None:
    book = PatchCodebook(noise(6, 2, 2, 3))
    pixels = torch.from_numpy(noise(1, 4, 4, 3))
    for bad in (pixels.float(), pixels[0], pixels[:, :2]):
        one_line(lambda bad=bad: book.encode(bad), "uint8 (B, H, W, C)", str(tuple(bad.shape)))
    one_line(lambda: book.encode(pixels[..., :1]), "1 channels", "3")
    one_line(lambda: book.encode(pixels[:, :3, :3]), "image size 3")
    for bad in (torch.zeros(2, 3).long(), torch.zeros(4).long(), torch.zeros(1, 4), torch.zeros(1, 0).long()):
        one_line(lambda bad=bad: book.decode(bad), "square grids", str(tuple(bad.shape)))
    for code in (-1, 6):
        one_line(lambda code=code: book.decode(torch.tensor([[0, 3, code, 1]])), f"{code}", "0..5")
    for bad in (
        np.zeros((3, 2, 2)),
        noise(3, 2, 2),
        noise(3, 1, 2, 3),
        noise(0, 2, 2, 3),
        noise(3, 2, 2, 3).astype(int),
    ):
        one_line(lambda bad=bad: PatchCodebook(bad), "uint8 (V, p, p, C)", str(bad.shape))


# --- learning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_few_distinct_patches_are_kept_without_loss(channels: int) -> None:
    distinct = np.unique(noise(12, 2, 2, channels, seed=3), axis=0)
    arranged = distinct[np.random.default_rng(0).integers(0, 12, (20, 16))]
    pictures = arranged.reshape(20, 4, 4, 2, 2, channels).transpose(0, 1, 3, 2, 4, 5).reshape(20, 8, 8, channels)
    for codes in (12, 13, 500):
        book = PatchCodebook.learn(pictures, 2, codes)
        assert book.vocab_size == 12
        assert np.array_equal(book.patches, distinct)  # in lexical order
        assert reconstruction_error(book, pictures) == (0.0, np.inf)
    assert PatchCodebook.learn(pictures, 2, 11).vocab_size == 11


def test_centroids_are_means_by_count() -> None:
    """Two far groups of grey levels: each centroid is the mean over all patches, not over the distinct ones."""
    levels = np.array([10] * 60 + [20] * 4 + [200] * 12 + [230] * 24, np.uint8)
    images = np.random.default_rng(0).permutation(levels).reshape(1, 10, 10, 1)
    assert PatchCodebook.learn(images, 1, 2).patches.flatten().tolist() == [round(680 / 64), 220]
    assert PatchCodebook.learn(images, 1, 3).patches.flatten().tolist() == [round(680 / 64), 200, 230]


def photographs() -> Array:
    from sklearn.datasets import load_sample_images

    return np.stack([x[y : y + 64, y : y + 64] for x in load_sample_images().images for y in (0, 100, 200, 300)])


def test_learning_is_deterministic_whatever_the_threads() -> None:
    images = photographs()
    books = []
    for threads in (1, 2, 2):
        with threadpool_limits(threads):
            books.append(PatchCodebook.learn(images, 4, 64, seed=5))
    assert len({book.digest for book in books}) == 1
    assert PatchCodebook.learn(images, 4, 64, seed=6).digest != books[0].digest
    assert len(np.unique(books[0].patches, axis=0)) == 64


def test_more_codes_less_error() -> None:
    """Bounds: the error of the mean patch alone, and of twice as many codes."""
    images = photographs()
    found = [reconstruction_error(PatchCodebook.learn(images, 4, codes), images) for codes in (1, 16, 256)]
    tiles = images.reshape(8, 16, 4, 16, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 48).astype(float)
    assert found[0].rms == pytest.approx(float(np.sqrt(tiles.var(0).mean())), rel=1e-4)
    assert found[1].rms < 0.45 * found[0].rms
    assert found[2].rms < 0.6 * found[1].rms


def test_centroids_that_round_alike_make_room() -> None:
    """More codes than k-means has use for: doubles are replaced by the patches shown worst, so V is what was asked."""
    images = np.concatenate([np.arange(40, dtype=np.uint8), np.full(24, 255, np.uint8)]).reshape(1, 8, 8, 1)
    book = PatchCodebook.learn(images, 1, 40)
    assert book.vocab_size == 40
    assert len(np.unique(book.patches)) == 40
    assert reconstruction_error(book, images).rms <= 1 / 8  # one level off by one, of 64 values
    flat = np.arange(10, dtype=np.uint8)[:, None]
    filled = patch_codebook._without_doubles(np.array([[2], [2], [2], [9]], np.uint8), flat, 4)
    assert filled.flatten().tolist() == [2, 5, 6, 9]  # 5 and 6 are 3 away, all others less


def test_a_choice_of_patches_is_learned_from() -> None:
    images = photographs()
    few = PatchCodebook.learn(images, 4, 32, max_patches=32)
    tiles = {tile.tobytes() for tile in patch_codebook._cut(images, 4)}
    assert all(patch.tobytes() in tiles for patch in few.patches)  # with nothing to merge they are patches themselves
    assert few.digest == PatchCodebook.learn(images, 4, 32, max_patches=32).digest
    assert few.digest != PatchCodebook.learn(images, 4, 32, max_patches=32, seed=1).digest


def test_learning_from_what_does_not_fit() -> None:
    images = noise(2, 8, 8, 3)
    one_line(lambda: PatchCodebook.learn(images, 3, 4), "patch = 3", "8 x 8")
    one_line(lambda: PatchCodebook.learn(images, 0, 4), "patch = 0")
    one_line(lambda: PatchCodebook.learn(images, 2, 0), "codes = 0")
    one_line(lambda: PatchCodebook.learn(images, 2, 9, max_patches=8), "codes = 9", "max_patches = 8")
    for bad in (images[0], images[:0], images.astype(float)):
        one_line(lambda bad=bad: PatchCodebook.learn(bad, 2, 4), "uint8 (n, H, W, C)", str(bad.shape))


def test_importing_the_room_needs_no_sklearn() -> None:
    heavy = ("sklearn", "threadpoolctl", "deepspeed", "timm")
    code = f"import sys, mirai_ds.tokenizer; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# --- measuring -----------------------------------------------------------------------------------------------------


def test_reconstruction_error_by_hand() -> None:
    book = PatchCodebook(np.array([0, 100], np.uint8).reshape(2, 1, 1, 1))
    images = np.array([3, 0, 104, 100], np.uint8).reshape(1, 2, 2, 1)
    found = reconstruction_error(book, np.repeat(images, 70, axis=0))  # more than one batch
    assert found.rms == pytest.approx(2.5)  # sqrt((9 + 16) / 4)
    assert found.psnr == pytest.approx(10 * np.log10(255**2 / 6.25))
    assert reconstruction_error(PatchCodebook(images.reshape(4, 1, 1, 1)), images) == (0.0, np.inf)
    five = PatchCodebook(np.array([[10, 20, 30, 0, 0]], np.uint8).reshape(1, 1, 1, 5))
    pixel = np.array([11, 22, 33, 99, 99], np.uint8).reshape(1, 1, 1, 5)
    assert reconstruction_error(five, pixel).rms == pytest.approx((14 / 3) ** 0.5)  # of the three channels shown
    one_line(lambda: reconstruction_error(book, images[:0]), "uint8 (n, H, W, C)")
    one_line(lambda: reconstruction_error(book, noise(1, 4, 4, 3)), "3 channels")


def test_reconstruction_error_of_any_tokenizer() -> None:
    tokenizer = VQTokenizer.random(VQConfig(32, (1, 1), 32, 16, 4, 1, 1))
    images = noise(2, 8, 8, 3)
    shown = tokenizer.decode(tokenizer.encode(torch.from_numpy(images)))
    wanted = np.sqrt(((shown.astype(float) - images) ** 2).mean())
    assert reconstruction_error(tokenizer, images).rms == pytest.approx(wanted)


# --- files ---------------------------------------------------------------------------------------------------------


def test_saved_and_read_back(tmp_path: Path) -> None:
    book = PatchCodebook(noise(30, 4, 4, 3))
    path, other = tmp_path / "book.npz", tmp_path / "other.npz"
    book.save(path)
    book.save(other)
    assert path.read_bytes() == other.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["book.npz", "other.npz"]
    with np.load(path, allow_pickle=False) as data:
        assert sorted(data.files) == ["codebook", "kind"]
        assert np.array_equal(data["codebook"], book.patches)
        assert str(data["kind"]) == "patch-codebook"
    found = open_tokenizer(path, "cuda", "bf16")  # they say nothing about a codebook
    assert isinstance(found, PatchCodebook)
    assert found.digest == book.digest
    np.savez(path, codebook=book.patches)
    assert PatchCodebook.load(path).digest == book.digest


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    book = PatchCodebook(noise(3, 1, 1, 1))
    one_line(lambda: book.save(tmp_path / "book.npy"), "book.npy", ".npz")
    one_line(lambda: book.save(tmp_path / "absent" / "book.npz"), "cannot be written", "No such file")
    (tmp_path / "folder.npz").mkdir()
    one_line(lambda: book.save(tmp_path / "folder.npz"), "cannot be written")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.npz"]


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "book.npz"
    PatchCodebook(noise(300, 4, 4, 3)).save(path)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    damages = [b"", b"hello", content[:-30], content[: len(content) // 2], content[:100], bytes(flipped)]
    for data in damages:
        path.write_bytes(data)
        one_line(lambda: open_tokenizer(path), str(path), "is not a readable .npz file")


def test_files_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "book.npz"
    one_line(lambda: open_tokenizer(path), str(path), "no such file")
    one_line(lambda: PatchCodebook.load(tmp_path), "is a folder")
    np.savez(path, codes=np.zeros(3), labels=np.zeros(3))
    one_line(lambda: open_tokenizer(path), "no array `codebook`", "codes, labels")
    np.savez(path, codebook=noise(3, 1, 1, 1), kind=np.array("vq16"))
    one_line(lambda: open_tokenizer(path), str(path), "kind = 'vq16'", "'patch-codebook'")
    np.savez(path, codebook=np.array([Path("x")], dtype=object))
    one_line(lambda: open_tokenizer(path), str(path), "allow_pickle=False")
    with path.open("wb") as file:
        np.save(file, noise(3, 1, 1, 1))
    one_line(lambda: open_tokenizer(path), str(path), "is not a readable .npz file", "another kind")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("codebook", "text")
    one_line(lambda: open_tokenizer(path), "codebook is not an array")
    for bad in (noise(3, 1, 2, 3), noise(3, 2, 2), noise(0, 1, 1, 1), np.zeros((3, 1, 1, 1))):
        np.savez(path, codebook=bad)
        one_line(lambda: open_tokenizer(path), str(path), "uint8 (V, p, p, C)", str(bad.shape))
