"""Opening stores: what they say of themselves, and that no damage goes unnoticed."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mirai_ds.analysis.inspect_store import inspect_store, size_text
from mirai_ds.config import UserError
from mirai_ds.data.crops import centre_crop
from mirai_ds.data.image_sets import open_image_set
from mirai_ds.data.stores import open_image_store, open_token_store
from mirai_ds.data.stores.files import seal_of
from mirai_ds.extract import extract_images
from tests.extract.conftest import ALONE, options


@pytest.mark.parametrize("encoding", ["png", "webp"])
def test_crops_are_kept_to_the_pixel(encoding: str, photos: Path, tmp_path: Path) -> None:
    extract_images(options(photos, tmp_path / "s"), ALONE, encoding)
    store, found = open_image_store(tmp_path / "s"), open_image_set(photos)
    assert store.names() == found.names
    assert store.labels.tolist() == found.labels.tolist()
    for i in (17, 0, 9, 3):
        assert np.array_equal(store.crop(i), centre_crop(found.load(i).image, 17))


def test_jpeg_is_near_and_says_so(photos: Path, tmp_path: Path) -> None:
    made = extract_images(options(photos, tmp_path / "s", size=64), ALONE, "jpeg")
    assert made is not None
    assert (made.encoding, made.quality) == ("jpeg", 95)
    store, found = open_image_store(tmp_path / "s"), open_image_set(photos)
    difference = [store.crop(i).astype(int) - centre_crop(found.load(i).image, 70) for i in range(18)]
    assert 0 < float(np.mean(np.abs(difference))) < 4
    with pytest.raises(UserError, match="--quality 80: png is lossless"):
        extract_images(options(photos, tmp_path / "t"), ALONE, "png", 80)


def test_inspect_says_what_is_there(store: Path, packed: Path) -> None:
    lines, damages = inspect_store(store, verify=True)
    text = "\n".join(lines)
    assert damages == []
    for part in (
        "tokens, 5.8 kB", "18 images x 10 views x 16 tokens (4x4)", "patch-codebook, 64 codes", "every digest fits",
        "ten of 16 pixels, crop range 1.1", "2 (china ... flower), 9 to 9 images each", "batch 7",
    ):  # fmt: skip
        assert part in text, text
    lines, damages = inspect_store(packed, verify=True)
    assert damages == []
    assert "18 crops of 17x17 pixels as webp" in "\n".join(lines)
    assert [size_text(n) for n in (999, 1500, 6_558_375_904)] == ["999 bytes", "1.5 kB", "6.6 GB"]


def test_folders_that_are_no_stores(tmp_path: Path, store: Path, packed: Path) -> None:
    for path, reason in ((tmp_path / "none", "no such store"), (tmp_path, "is not a store of mirai_ds")):
        with pytest.raises(UserError, match=reason):
            inspect_store(path, verify=False)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match="extraction is not finished; give the same `mirai-ds extract` command again"):
        open_token_store(tmp_path)
    with pytest.raises(UserError, match="format"):
        open_token_store(packed)
    with pytest.raises(UserError, match="format"):
        open_image_store(store)


def refusals(path: Path, kind: str) -> list[str]:
    """What opening says, or verifying; at most one line each."""
    try:
        opened = open_image_store(path) if kind == "images" else open_token_store(path)
    except UserError as error:
        found = [str(error)]
    else:
        found = opened.damages()
    assert all("\n" not in line for line in found)
    return found


Damage = Callable[[Path, random.Random], None]


def flip(path: Path, generator: random.Random) -> None:
    """One bit."""
    data = bytearray(path.read_bytes())
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    path.write_bytes(bytes(data))


def cut(path: Path, generator: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: generator.randrange(len(data))])


def lengthen(path: Path, generator: random.Random) -> None:
    path.write_bytes(path.read_bytes() + generator.randbytes(1 + generator.randrange(64)))


def remove(path: Path, _: random.Random) -> None:
    path.unlink()


def blank(path: Path, _: random.Random) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


@pytest.mark.parametrize("damage", [flip, cut, lengthen, remove, blank])
@pytest.mark.parametrize("kind", ["tokens", "images"])
def test_damage_to_any_file_is_refused_with_a_reason(
    kind: str, damage: Damage, store: Path, packed: Path, tmp_path: Path
) -> None:
    source = store if kind == "tokens" else packed
    generator = random.Random(f"{kind}{damage.__name__}")
    copy = tmp_path / "s"
    for name in sorted(path.name for path in source.iterdir()):
        for _ in range(12 if damage in (flip, cut) else 1):
            shutil.copytree(source, copy)
            if not (copy / name).stat().st_size:
                (copy / name).write_bytes(b"x")  # a bit of an empty file cannot be flipped
            damage(copy / name, generator)
            changed = not (copy / name).exists() or (copy / name).read_bytes() != (source / name).read_bytes()
            found = refusals(copy, kind)
            assert bool(found) == changed, f"{damage.__name__} {name}: {found}"
            assert all(str(copy) in line for line in found)
            shutil.rmtree(copy)
    assert refusals(source, kind) == []


def test_arrays_of_another_type_or_of_another_store(store: Path, photos: Path, codebook: Path, tmp_path: Path) -> None:
    from mirai_ds.extract import extract_codes

    copy, other = tmp_path / "s", tmp_path / "other"
    extract_codes(options(photos, other, crop_range=1.3), ALONE, codebook, batch=7)
    codes = np.load(store / "codes.npy")
    for changed in (codes.astype(np.int32), codes.astype(">u2"), np.asfortranarray(codes), codes[:, :9], codes[:17],
                    codes.reshape(18, 160)):  # fmt: skip
        shutil.copytree(store, copy)
        np.save(copy / "codes.npy", changed)
        with pytest.raises(UserError, match=r"codes\.npy"):
            open_token_store(copy)
        shutil.rmtree(copy)
    for name in ("codes.npy", "manifest.json"):  # swapped between stores of the same shape
        shutil.copytree(store, copy)
        shutil.copy(other / name, copy / name)
        assert any("do not have the digest of their codes" in line for line in open_token_store(copy).damages())
        shutil.rmtree(copy)


def test_a_manifest_written_by_hand_must_fit(store: Path, tmp_path: Path) -> None:
    """Even one with a right seal."""
    copy = tmp_path / "s"
    good = json.loads((store / "manifest.json").read_text())
    changes: dict[str, tuple[str, object]] = {
        "num_images": ("codes.npy", 17), "num_views": ("contradicts itself", 9), "tokens_per_image": ("codes.npy", 4),
        "codes_digests": ("contradicts itself", []), "classes": ("there are 1 classes", ["all"]),
        "num_image": ("unknown key", 3), "max_code": ("must be", -1), "labels_digest": ("labels_digest", "short"),
        "format": ("format", "mirai_ds tokens 2"),
    }  # fmt: skip
    for field, (reason, value) in changes.items():
        shutil.copytree(store, copy)
        data = good | {field: value}
        (copy / "manifest.json").write_text(json.dumps(data))
        with pytest.raises(UserError):
            open_token_store(copy)
        opened = open_token_store(store).manifest
        if field in good:
            data["seal"] = seal_of(opened.model_copy(update={field: value}))
        (copy / "manifest.json").write_text(json.dumps(data))
        with pytest.raises(UserError, match=reason):
            open_token_store(copy)
        shutil.rmtree(copy)


def test_codes_beyond_the_manifest_stop_training_with_a_reason(store: Path, tmp_path: Path) -> None:
    """On a GPU they would be a device assert."""
    import torch

    from mirai_ds.config import DataConfig
    from mirai_ds.data.store_source import from_store

    copy = tmp_path / "s"
    shutil.copytree(store, copy)
    codes = np.load(copy / "codes.npy")
    codes[5, 3, 2] = 65_000
    np.save(copy / "codes.npy", codes)
    source = from_store(DataConfig(source="store", path=str(copy)))
    source.gather(torch.tensor([5]), torch.tensor([2]))
    with pytest.raises(
        UserError, match=r"codes of image 5 go up to 65000, their manifest says 63: the store is damaged"
    ):
        source.gather(torch.tensor([4, 5]), torch.tensor([3, 3]))


def test_a_damaged_image_says_which(packed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "s"
    shutil.copytree(packed, copy)
    store = open_image_store(packed)
    shard, start, length = store.index[7]
    path = copy / f"images-{shard:05d}.bin"
    data = bytearray(path.read_bytes())
    data[start : start + length] = bytes(length)
    path.write_bytes(bytes(data))
    damaged = open_image_store(copy)
    with pytest.raises(UserError, match="image 7 cannot be decoded"):
        damaged.crop(7)
    assert np.array_equal(damaged.crop(6), store.crop(6))


def test_shards_stay_open_only_as_many_as_a_process_may(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ImageNet has 1,252 shards, and 1,024 open files are the usual limit."""
    extract_images(options(photos, tmp_path / "s", block=1), ALONE)
    store = open_image_store(tmp_path / "s")
    assert len(store.manifest.shard_bytes) == store.manifest.num_images >= 18
    wanted = [store.crop(image) for image in range(store.manifest.num_images)]
    opened, most, before = open_image_store(tmp_path / "s"), [], len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 4096))
    for image in [*range(len(wanted)), *reversed(range(len(wanted)))]:
        assert np.array_equal(opened.crop(image), wanted[image])
        most.append(len(os.listdir("/proc/self/fd")) - before)
    assert max(most) == 4
