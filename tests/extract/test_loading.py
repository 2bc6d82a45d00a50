"""From stores into training batches: any number of workers, any source of pixels, the same numbers."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mirai_ds.config import ConfigError, DataConfig, ModelConfig, UserError
from mirai_ds.config.errors import LocalError
from mirai_ds.data import Batch, BatchLoader, DataOrder, TokenSource, load_dataset, load_decoder, loader
from mirai_ds.data.crops import ViewGeometry, centre_crop
from mirai_ds.data.image_sets import open_image_set
from mirai_ds.data.loader import auto_workers
from mirai_ds.data.store_source import from_store
from mirai_ds.data.stores import open_token_store
from mirai_ds.data.stores.files import write_manifest
from mirai_ds.extract import extract_codes, extract_images
from mirai_ds.extract.llamagen import Import, import_llamagen
from mirai_ds.tokenizer import PatchCodebook, open_tokenizer
from tests.data.test_image_sets import write_idx
from tests.extract.conftest import ALONE, options
from tests.extract.test_llamagen import write_folder

CPU = torch.device("cpu")
MODEL = ModelConfig(size="custom", dim=8, n_layer=1, n_head=1, vocab_size=64, num_classes=2, block_size=16)


def opened(store: Path, images: Path | None = None, **others: Any) -> TokenSource:
    data = DataConfig(source="store", path=str(store), images=None if images is None else str(images), **others)
    return from_store(data)


def batches(source: TokenSource, steps: range, workers: int, images: bool = True, rank: int = 0) -> list[Batch]:
    reader = BatchLoader(source, DataOrder(len(source), 6, 3), 3, rank, 2, CPU, images, workers)
    try:
        return [batch for step in steps for batch in reader.micro_batches(step)]
    finally:
        reader.close()


def same(a: list[Batch], b: list[Batch]) -> bool:
    pairs = [(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)  # type: ignore[arg-type]


def test_pixels_are_those_the_codes_were_made_of(store: Path, packed: Path, photos: Path, codebook: Path) -> None:
    """From the image store and from the original files: encoding them again gives the stored tokens."""
    tokenizer = open_tokenizer(codebook)
    from_files, from_packed = (batches(opened(store, images), range(7), 0) for images in (photos, packed))
    assert same(from_files, from_packed)
    seen = set()
    for batch in from_files:
        assert batch.images is not None
        assert batch.images.shape == (3, 3, 16, 16)
        assert torch.equal(tokenizer.encode(batch.images.permute(0, 2, 3, 1).contiguous()), batch.tokens)
        seen |= {int(v) for v in DataOrder.views(batch.keys, 10)}
    assert len(seen) >= 6


def test_every_view_of_every_image_to_the_pixel(store: Path, packed: Path, photos: Path) -> None:
    source, found, geometry = opened(store, packed), open_image_set(photos), ViewGeometry(16, "ten", 1.1)
    for i in range(18):
        crop = centre_crop(found.load(i).image, geometry.side)
        _, _, pixels = source.gather(torch.full((10,), i), torch.arange(10), images=True)
        wanted = np.stack([geometry.view(crop, v) for v in range(10)]).transpose(0, 3, 1, 2)
        assert pixels is not None
        assert np.array_equal(pixels.numpy(), wanted)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(workers: int, store: Path, packed: Path) -> None:
    source = opened(store, packed)
    for rank in (0, 1):
        plain = batches(source, range(8), 0, rank=rank)
        assert same(batches(source, range(8), workers, rank=rank), plain)
        assert same(batches(source, range(5, 8), workers, rank=rank), plain[5:])  # a resume
    reader = BatchLoader(source, DataOrder(18, 6, 3), 3, 0, 2, CPU, True, workers)
    plain = batches(source, range(8), 0)
    for step in (0, 1, 2, 6, 7, 1):  # jumps start anew
        assert same(list(reader.micro_batches(step)), plain[step : step + 1])
    reader.close()


def test_workers_do_not_touch_the_process_own_randomness(store: Path) -> None:
    source = opened(store)
    before = torch.get_rng_state()
    batches(source, range(2), 2, images=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_signals_to_the_whole_group_leave_the_workers_alone(
    store: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler signals every process: the rank must still be able to finish its step and save.  Worker 1 is still
    starting when the signals come."""
    quiet = loader._quiet_worker

    def late(number: int) -> None:
        time.sleep(2.0 * number)
        quiet(number)

    monkeypatch.setattr(loader, "_quiet_worker", late)
    source = opened(store, packed)
    plain = batches(source, range(6), 0)
    reader = BatchLoader(source, DataOrder(18, 6, 3), 3, 0, 2, CPU, True, 2)
    found = list(reader.micro_batches(0))
    children = [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    own = Path("/proc/self/cmdline").read_bytes()
    workers = [pid for pid, name in names.items() if name == own]
    assert len(workers) >= 2
    for pid in workers:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(pid, number)
    found += [batch for step in range(1, 6) for batch in reader.micro_batches(step)]
    assert same(found, plain)
    reader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_broke_since_is_one_line(workers: int, store: Path, photos: Path, tmp_path: Path) -> None:
    copy = tmp_path / "photos"
    shutil.copytree(photos, copy)
    source = opened(store, copy)
    victim = open_image_set(photos).names[5]
    (copy / victim).write_bytes((copy / victim).read_bytes()[:200])
    with pytest.raises(LocalError) as caught:
        [batches(source, range(3), workers, rank=rank) for rank in (0, 1)]
    assert "\n" not in str(caught.value)
    assert str(copy / victim) in str(caught.value)
    assert "it could be read when its codes were made" in str(caught.value)


def refused(pattern: str, *arguments: Any, **others: Any) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        opened(*arguments, **others)
    assert "\n" not in str(caught.value)


def test_images_that_do_not_belong_to_the_codes(
    store: Path, packed: Path, photos: Path, codebook: Path, tmp_path: Path
) -> None:
    refused("data.images = .*no such folder", store, tmp_path / "none")
    refused("is a token store; give an image store", store, store)
    refused("has no china/", store, tmp_path)
    extract_images(options(photos, tmp_path / "wide", crop_range=1.3), ALONE)
    refused("extract the images with the same settings", store, tmp_path / "wide")
    renamed = tmp_path / "renamed"
    shutil.copytree(photos, renamed)
    first = open_image_set(renamed).names[4]
    (renamed / first).rename(renamed / f"{first}.png")
    extract_images(options(renamed, tmp_path / "other"), ALONE)
    refused(f"was not made of the same images: image 4 is '{first}.png' there and '{first}'", store, tmp_path / "other")
    book = np.load(codebook)["codebook"]
    PatchCodebook(book[::-1].copy()).save(tmp_path / "turned.npz")
    refused("the store was made with patch-codebook", store, tokenizer=str(tmp_path / "turned.npz"))
    assert opened(store, tokenizer=str(codebook)).decoder is not None


def test_the_store_brings_its_codebook(store: Path, codebook: Path, photos: Path) -> None:
    source, tokenizer = opened(store), open_tokenizer(codebook)
    tokens = source.first_view(np.array([3]))
    assert np.array_equal(source.decode(tokens), tokenizer.decode(tokens))
    decoder = load_decoder(DataConfig(source="store", path=str(store)))
    assert decoder is not None
    assert decoder.vocab_size == 64
    gone = DataConfig(source="store", path="nowhere", tokenizer=str(codebook))
    assert load_decoder(gone) is not None
    with pytest.raises(UserError, match="nowhere: no such store"):
        load_decoder(DataConfig(source="store", path="nowhere"))


def test_held_out_samples(store: Path, photos: Path, codebook: Path, tmp_path: Path) -> None:
    config = DataConfig(source="store", path=str(store))
    whole = load_dataset(config, MODEL)
    assert (config.held_out_fraction, len(whole.train), len(whole.held_out)) == (0.0, 18, 0)
    part = load_dataset(DataConfig(source="store", path=str(store), held_out_fraction=0.25), MODEL)
    assert (len(part.train), len(part.held_out)) == (14, 4)
    assert sorted(part.held_out.labels.tolist()) == [0, 0, 1, 1]
    both = np.concatenate([part.train.places(np.arange(14)), part.held_out.places(np.arange(4))])
    assert sorted(both.tolist()) == list(range(18))
    codes = open_token_store(store).codes
    for source in (part.train, part.held_out):
        everyone = torch.arange(len(source))
        tokens, labels, _ = source.gather(everyone, torch.full_like(everyone, 3))
        assert np.array_equal(tokens.numpy(), codes[source.places(everyone.numpy()), 3])
        assert labels.tolist() == open_token_store(store).labels[source.places(everyone.numpy())].tolist()
        assert isinstance(source.codes, np.memmap)  # a split copies no codes
    other = tmp_path / "val"
    extract_codes(options(photos, other, crops="one"), ALONE, codebook)
    own = load_dataset(DataConfig(source="store", path=str(store), held_out_path=str(other)), MODEL)
    assert (len(own.train), len(own.held_out), own.held_out.num_views) == (18, 18, 1)
    assert np.array_equal(own.held_out.first_view().numpy(), open_token_store(other).codes[:, 0])
    turned = tmp_path / "turned.npz"
    PatchCodebook(np.load(codebook)["codebook"][::-1].copy()).save(turned)
    extract_codes(options(photos, tmp_path / "foreign", crops="one"), ALONE, turned)
    with pytest.raises(ConfigError, match=r"data.held_out_path = .* was made with patch-codebook .*, data.path with"):
        load_dataset(DataConfig(source="store", path=str(store), held_out_path=str(tmp_path / "foreign")), MODEL)


def held_out_refused(pattern: str, store: Path, held_out: Path) -> None:
    with pytest.raises(ConfigError, match=pattern) as caught:
        load_dataset(DataConfig(source="store", path=str(store), held_out_path=str(held_out)), MODEL)
    assert caught.value.field == "data.held_out_path"
    assert "\n" not in str(caught.value)


def test_held_out_labels_must_mean_the_same_classes(
    store: Path, photos: Path, codebook: Path, tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    """Class 0 of `flower` alone is `china` to the model; classes missing at the end move no label."""

    def extracted(name: str, *folders: str, **others: Any) -> Path:
        for folder in folders:
            shutil.copytree(photos / folder.removeprefix("z-"), tmp_path / name / folder)
        extract_codes(
            options(tmp_path / name, tmp_path / f"{name}-codes", **{"crops": "one", **others}), ALONE, codebook
        )
        return tmp_path / f"{name}-codes"

    held_out_refused("its label 0 is class 'flower', in data.path 'china'", store, extracted("moved", "flower"))
    more = extracted("more", "china", "flower", "z-flower")
    held_out_refused("its label 2 is class 'z-flower', data.path has no such label", store, more)
    larger = tmp_path / "larger"
    extract_codes(options(photos, larger, size=32, crops="one"), ALONE, codebook)
    held_out_refused("is of 32 pixels a side, data.path of 16", store, larger)
    told.clear()
    fewer = extracted("fewer", "china", crops="ten", crop_range=1.3)
    data = load_dataset(DataConfig(source="store", path=str(store), held_out_path=str(fewer)), MODEL)
    assert data.held_out.labels.tolist() == [0] * 9
    assert told.messages[1:] == [
        "data.held_out_path: its views are cut from 1.3 times their size, those from 1.1 times of data.path"
    ]


def test_an_older_store_with_a_systems_folder_as_a_class_is_told(
    store: Path, tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(store, tmp_path / "old")
    made = open_token_store(store).manifest
    write_manifest(tmp_path / "old", made.model_copy(update={"classes": [".ipynb_checkpoints", "flower"]}))
    opened(tmp_path / "old")
    assert told.messages == [
        f"data.path: {tmp_path / 'old'} counts '.ipynb_checkpoints' as a class, a system's folder: extract it again"
    ]


def test_what_an_imported_store_does_not_say_is_a_note(
    store: Path, photos: Path, tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    folder, imported = write_folder(tmp_path / "theirs", store), tmp_path / "imported"
    import_llamagen(Import(folder, options(folder, imported), None))
    config = DataConfig(source="store", path=str(store), held_out_path=str(imported))
    assert load_dataset(config, MODEL).held_out.labels.tolist() == [0] * 9 + [1] * 9
    assert told.messages == [
        "data.held_out_path: classes and tokenizers not compared with data.path's: not known of both"
    ]
    shutil.copytree(photos / "flower", tmp_path / "moved" / "a")
    shutil.copytree(photos / "china", tmp_path / "moved" / "b")
    named = tmp_path / "named"
    import_llamagen(Import(folder, options(folder, named), images=tmp_path / "moved"))
    held_out_refused("its label 0 is class 'a', in data.path 'china'", store, named)


def test_pixels_of_the_same_names_and_other_labels_are_refused(tmp_path: Path) -> None:
    """MNIST and Fashion-MNIST name their images alike."""
    levels = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)
    PatchCodebook(levels).save(tmp_path / "grey.npz")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
        write_idx(folder, "train", 7)
    labels = theirs / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x02")  # 6 % 3 is 0
    extract_codes(options(ours, tmp_path / "s", size=4, crops="one"), ALONE, tmp_path / "grey.npz")
    extract_images(options(theirs, tmp_path / "i", size=4, crops="one"), ALONE)
    for images in (theirs, tmp_path / "i"):
        refused("was not made of the same images: image 6 has label 2 there and 0 in the token", tmp_path / "s", images)
    assert opened(tmp_path / "s", ours).images is not None


def test_a_store_must_fit_the_model(store: Path) -> None:
    config = DataConfig(source="store", path=str(store))
    for name, value in (("vocab_size", 63), ("vocab_size", 65), ("block_size", 25), ("num_classes", 1)):
        with pytest.raises(ConfigError) as caught:
            load_dataset(config, MODEL.model_copy(update={name: value}))
        assert caught.value.field == f"model.{name}"


@pytest.mark.parametrize("images", ["files", "packed"])
def test_idx_files_end_to_end(images: str, tmp_path: Path) -> None:
    pixels, labels = write_idx(tmp_path, "train", 7)
    levels = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)
    PatchCodebook(levels).save(tmp_path / "grey.npz")  # a pixel a token: lossless
    extract_codes(options(tmp_path, tmp_path / "s", size=4, crops="one"), ALONE, tmp_path / "grey.npz")
    extract_images(options(tmp_path, tmp_path / "i", size=4, crops="one"), ALONE)
    source = opened(tmp_path / "s", tmp_path if images == "files" else tmp_path / "i")
    everyone = torch.arange(7)
    tokens, found, shown = source.gather(everyone, torch.zeros(7, dtype=torch.int64), images=True)
    assert shown is not None
    for i in range(7):
        from PIL import Image

        crop = centre_crop(Image.fromarray(pixels[i]), 4)[..., 0]
        assert np.array_equal(tokens[i].numpy().reshape(4, 4), crop)
        assert all(np.array_equal(shown[i, c].numpy(), crop) for c in range(3))
    assert found.tolist() == labels.tolist()


def test_a_store_is_read_ahead_in_order(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, read = opened(store), []
    real = loader.Path.open

    def watched(self: Path, *arguments: Any, **named: Any) -> Any:
        read.append(str(self))
        return real(self, *arguments, **named)

    monkeypatch.setattr(loader.Path, "open", watched)
    thread = loader.warm_page_cache(source)
    assert thread is not None
    thread.join()
    assert str(store / "codes.npy") in read
    monkeypatch.setattr(loader, "available_bytes", lambda: 2 * (store / "codes.npy").stat().st_size - 2)
    assert loader.warm_page_cache(source) is None  # it would push out what others need
    assert loader.warm_page_cache(TokenSource(np.array(source.codes), source.labels)) is None
    monkeypatch.undo()
    assert loader.available_bytes() > 2**26


def test_how_many_workers_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, ranks, wanted in ((2, 2, 0), (2, 1, 1), (16, 1, 8), (128, 8, 8), (32, 8, 3), (8, 8, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        assert auto_workers(True, ranks) == wanted
        assert auto_workers(False, ranks) == 0
