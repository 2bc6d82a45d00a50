"""Several stores as views of the same images: the authors' two crop ranges, a coin for each sample."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mirai_ds.config import ConfigError, DataConfig, ModelConfig, UserError
from mirai_ds.data import Batch, BatchLoader, DataOrder, TokenSource, check_files, load_dataset, loader
from mirai_ds.data.stacked import StackedCodes, StackedViews
from mirai_ds.data.store_source import from_store
from mirai_ds.data.stores import open_token_store
from mirai_ds.data.views import ArrayViews
from mirai_ds.extract import extract_codes
from mirai_ds.extract.llamagen import Import, import_llamagen
from mirai_ds.tokenizer import PatchCodebook, open_tokenizer
from tests.extract.conftest import ALONE, options
from tests.extract.test_llamagen import write_folder

CPU = torch.device("cpu")
# Of the first samples of seed 7, by splitmix64 in Python's own integers.
PINNED = [18, 3, 9, 5, 15, 0, 6, 9, 19, 3, 19, 0]
MODEL = ModelConfig(size="custom", dim=8, n_layer=1, n_head=1, vocab_size=64, num_classes=2, block_size=16)


@pytest.fixture(scope="module")
def wide(photos: Path, codebook: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as `store`, its ten crops cut from another range."""
    out = tmp_path_factory.mktemp("wide") / "codes"
    extract_codes(options(photos, out, crop_range=1.3), ALONE, codebook)
    return out


def config(store: Path, *more: Path, **others: Any) -> DataConfig:
    return DataConfig(source="store", path=str(store), more_views=[str(path) for path in more], **others)


def refused(pattern: str, store: Path, *more: Path) -> None:
    with pytest.raises(ConfigError, match=pattern) as caught:
        from_store(config(store, *more))
    assert caught.value.field == "data.more_views"
    assert "\n" not in str(caught.value)


def epoch(source: TokenSource, world: int, steps: range, images: bool = False) -> list[Batch]:
    """Global batches of 6, put together from all ranks' micro-batches of 6 / world."""
    order = DataOrder(len(source), 6, 3)
    readers = [BatchLoader(source, order, 6 // world, rank, world, CPU, images) for rank in range(world)]
    found = []
    for step in steps:
        parts = [batch for reader in readers for batch in reader.micro_batches(step)]
        found.append(Batch(*(None if p[0] is None else torch.cat(p) for p in zip(*parts, strict=True))))  # type: ignore[arg-type]
    return found


def test_a_view_is_a_store_and_one_of_its_views(store: Path, wide: Path) -> None:
    source, parts = from_store(config(store, wide)), [open_token_store(path).codes for path in (store, wide)]
    assert (source.num_views, source.codes.shape, len(source)) == (20, (18, 20, 16), 18)
    assert not np.array_equal(*parts)
    everyone = torch.arange(18)
    for view in range(20):
        tokens, _, _ = source.gather(everyone, torch.full((18,), view))
        assert np.array_equal(tokens.numpy(), parts[view // 10][:, view % 10])
    mixed = torch.tensor([3, 10, 19, 0, 10])
    tokens, labels, _ = source.gather(torch.tensor([5, 17, 0, 5, 5]), mixed)
    wanted = [parts[0][5, 3], parts[1][17, 0], parts[1][0, 9], parts[0][5, 0], parts[1][5, 0]]
    assert np.array_equal(tokens.numpy(), np.stack(wanted))
    assert labels.tolist() == [0, 1, 0, 0, 0]
    assert np.array_equal(source.first_view().numpy(), parts[0][:, 0])
    assert source.largest_code() == max(int(part.max()) for part in parts)


def test_the_draw_is_even_and_a_function_of_seed_epoch_and_sample() -> None:
    """Pinned: a coin that fell otherwise would be another run."""
    order = DataOrder(1000, 100, 7)
    drawn = [torch.cat([order.views(order.batch(step)[1], 20) for step in range(10 * e, 10 * e + 10)]) for e in (0, 1)]
    assert drawn[0][:12].tolist() == PINNED
    for views in drawn:
        second = int((views >= 10).sum())
        assert abs(second - 500) < 4 * 16  # four standard deviations of a fair coin
        assert torch.bincount(views, minlength=20).min() >= 25  # 50 each
    samples = [torch.cat([order.batch(step)[0] for step in range(10 * e, 10 * e + 10)]) for e in (0, 1)]
    by_sample = [views[torch.argsort(numbers)] for views, numbers in zip(drawn, samples, strict=True)]
    assert 400 < int(((by_sample[0] >= 10) != (by_sample[1] >= 10)).sum()) < 600  # a new coin in each epoch


def test_any_number_of_ranks_and_a_resume_draw_alike(store: Path, wide: Path, photos: Path) -> None:
    source = from_store(config(store, wide, images=str(photos)))
    whole = epoch(source, 1, range(7), images=True)
    keys = torch.cat([batch.keys for batch in whole])
    assert {int(view) // 10 for view in DataOrder.views(keys, 20)} == {0, 1}
    for world, first in ((2, 0), (3, 0), (1, 5), (2, 4)):
        for ours, theirs in zip(epoch(source, world, range(first, 7), images=True), whole[first:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))  # type: ignore[arg-type]


def test_pixels_are_those_the_codes_were_made_of(store: Path, wide: Path, photos: Path, codebook: Path) -> None:
    tokenizer, source = open_tokenizer(codebook), from_store(config(store, wide, images=str(photos)))
    for batch in epoch(source, 1, range(6), images=True):
        assert batch.images is not None
        assert torch.equal(tokenizer.encode(batch.images.permute(0, 2, 3, 1).contiguous()), batch.tokens)


def test_a_single_store_draws_and_is_identified_as_before(store: Path, wide: Path) -> None:
    alone, both = from_store(config(store)), from_store(config(store, wide))
    assert isinstance(alone.codes, np.memmap)
    turned, manifest = from_store(config(wide, store)), open_token_store(store).manifest
    seal = hashlib.sha256("".join(manifest.codes_digests).encode()).hexdigest()
    assert alone.digest() == hashlib.sha256(seal.encode() + np.repeat([0, 1], 9).astype(np.int64).tobytes()).hexdigest()
    assert len({alone.digest(), both.digest(), turned.digest()}) == 3  # what a resume compares


def test_a_split_and_held_out_samples(store: Path, wide: Path) -> None:
    part = load_dataset(config(store, wide, held_out_fraction=0.25), MODEL)
    assert (len(part.train), len(part.held_out), part.train.num_views) == (14, 4, 20)
    codes = open_token_store(wide).codes
    tokens, _, _ = part.train.gather(torch.arange(14), torch.full((14,), 13))
    assert np.array_equal(tokens.numpy(), codes[part.train.places(np.arange(14)), 3])
    own = load_dataset(config(store, wide, held_out_path=str(store)), MODEL)
    assert (own.train.num_views, own.held_out.num_views) == (20, 10)


def test_stores_that_are_no_views_of_the_same_images(
    store: Path, wide: Path, packed: Path, photos: Path, codebook: Path, tmp_path: Path
) -> None:
    refused("holds the same codes as .*store.*codes; give a store of another --crop-range", store, store)
    refused("holds the same codes as", store, wide, wide)

    def other(name: str, images: Path = photos, tokenizer: Path = codebook, **others: Any) -> Path:
        extract_codes(options(images, tmp_path / name, **others), ALONE, tokenizer)
        return tmp_path / name

    refused("has 1 views of 16 tokens an image, data.path 10 views of 16", store, other("one", crops="one"))
    refused("is of 32 pixels a side, data.path of 16", store, other("large", size=32))
    shutil.copytree(photos, tmp_path / "classes")
    (tmp_path / "classes" / "china").rename(tmp_path / "classes" / "porcelain")
    refused("its label 0 is class 'flower', in data.path 'china'", store, other("renamed", tmp_path / "classes"))
    shutil.copytree(photos, tmp_path / "fewer")
    (tmp_path / "fewer" / "china" / "003.JPEG").unlink()
    where = "was not made of the same images: image 3 is 'china/004.jpg' there and 'china/003.JPEG' in the token store"
    refused(where, store, other("short", tmp_path / "fewer", crop_range=1.3))
    PatchCodebook(np.load(codebook)["codebook"][::-1].copy()).save(tmp_path / "turned.npz")
    refused("was made with patch-codebook", store, other("foreign", tokenizer=tmp_path / "turned.npz"))
    refused("its photographs were turned by their orientation tag", store, other("upright", upright=True))
    with pytest.raises(UserError, match="this must be a store of format 'mirai_ds tokens 1'"):
        from_store(config(store, packed))
    with pytest.raises(ConfigError, match="or give the folder of the original images"):
        from_store(config(store, wide, images=str(packed)))


def test_imported_stores_are_compared_by_what_they_say(
    store: Path, wide: Path, tmp_path: Path, told: pytest.LogCaptureFixture
) -> None:
    """LlamaGen's two folders, as they are; a file that went missing at the end is seen."""
    made = {}
    for name, source in (("a", store), ("b", wide)):
        folder = write_folder(tmp_path / name, source)
        made[name] = tmp_path / f"{name}-codes"
        import_llamagen(Import(folder, options(folder, made[name], crop_range=1.1 if name == "a" else 1.3)))
    found = from_store(config(made["a"], made["b"]))
    assert np.array_equal(found.codes[np.arange(18), 12], open_token_store(wide).codes[:, 2])
    note = f"classes, tokenizers, file names of {made['b']} not compared with data.path's: not known of both"
    assert told.messages[-1] == f"data.more_views: {note}"
    for kind in ("codes", "labels"):
        (tmp_path / "b" / f"imagenet16_{kind}" / "17.npy").unlink()
    import_llamagen(Import(tmp_path / "b", options(tmp_path / "b", tmp_path / "short", crop_range=1.3)))
    refused("not made of the same images: it has 17, the token store 18", made["a"], tmp_path / "short")


def test_every_store_is_verified_and_read_ahead(store: Path, wide: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(wide, copy)
    codes = copy / "codes.npy"
    codes.write_bytes(codes.read_bytes()[:-1] + b"\x3f")
    check_files(config(store, wide))
    with pytest.raises(UserError, match="images 0 to 17 do not have the digest"):
        check_files(config(store, copy))
    thread = loader.warm_page_cache(from_store(config(store, wide)))
    assert thread is not None
    thread.join()


def test_stacked_pixels_of_any_mixture() -> None:
    parts = [np.arange(4 * 2 * 3, dtype=np.uint8).reshape(4, 2, 3, 1, 1) + 100 * i for i in range(2)]
    stacked = StackedViews([ArrayViews(part) for part in parts], 2)
    images, views = np.array([3, 0, 3]), np.array([2, 1, 0])
    assert stacked.gather(images, views)[:, 0, 0, 0].tolist() == [118, 3, 18]
    codes = StackedCodes([part[..., 0, 0] for part in parts])
    assert codes[images, views][:, 0].tolist() == [118, 3, 18]
    assert codes.max() == 123
