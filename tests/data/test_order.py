"""The data order: pinned numbers, a plain-Python reference, and independence of ranks and micro-batches."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from mirai_ds.data import Batch, BatchLoader, DataOrder, TokenSource
from mirai_ds.data.views import ArrayViews

MASK = (1 << 64) - 1


def mix(z: int) -> int:
    """splitmix64's output function (Steele et al. 2014) on Python integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def derive(key: int, site: int) -> int:
    """A key of one use of randomness."""
    return mix((key + mix((site + 1) * 0x9E3779B97F4A7C15 & MASK)) & MASK)


def signed(value: int) -> int:
    """As int64."""
    return value - (1 << 64) if value >> 63 else value


def source(samples: int, views: int = 1) -> TokenSource:
    """Codes that say which sample and view they are: code = 100 * sample + view."""
    codes = 100 * np.arange(samples)[:, None, None] + np.arange(views)[None, :, None]
    return TokenSource(codes, np.arange(samples) % 7)


def batches(order: DataOrder, views: int, micro: int, world: int, step: int) -> list[list[Batch]]:
    """[micro-step][rank] -> batch, of one global step."""
    data = source(order.num_samples, views)
    loaders = [BatchLoader(data, order, micro, r, world, torch.device("cpu"), images=False) for r in range(world)]
    per_rank = [list(loader.micro_batches(step)) for loader in loaders]
    return [list(together) for together in zip(*per_rank, strict=True)]


PINNED = {
    (0, 0): ([843, 435, 120, 349, 605, 608, 57, 571], "f9c1d37b9b6d92e9"),
    (0, 1): ([412, 946, 18, 673, 296, 340, 164, 727], "c593ef15a1724191"),
    (1, 0): ([135, 947, 926, 729, 828, 901, 614, 507], "a3c311340a484a48"),
    (123, 7): ([931, 665, 873, 513, 553, 837, 819, 562], "0e00337acf08d774"),
}


@pytest.mark.parametrize(("seed", "epoch"), PINNED)
def test_the_order_of_an_epoch_is_pinned(seed: int, epoch: int) -> None:
    """A changed order would silently change every run that is resumed."""
    permutation = DataOrder(1000, 10, seed).permutation(epoch)
    prefix, digest = PINNED[seed, epoch]
    assert permutation[:8].tolist() == prefix
    assert hashlib.sha256(permutation.numpy().astype("<i8").tobytes()).hexdigest()[:16] == digest
    root = derive(derive(0, seed), epoch)
    scores = [signed(derive((root + i) & MASK, 0)) for i in range(1000)]
    assert permutation.tolist() == sorted(range(1000), key=scores.__getitem__)


def test_indices_keys_and_views_of_a_batch_are_pinned() -> None:
    order = DataOrder(1000, 10, 5)
    indices, keys = order.batch(3)
    assert indices.tolist() == [834, 62, 1, 934, 960, 739, 900, 371, 888, 859]
    assert keys[:3].tolist() == [9064817274703053386, 3722178679153162738, 7328830869477019308]
    assert order.views(keys, 10).tolist() == [0, 2, 9, 4, 6, 1, 9, 0, 4, 2]
    root = derive(derive(0, 5), 0)
    expected = [derive((root + 30 + i) & MASK, 2) for i in range(10)]
    assert keys.tolist() == [signed(key) for key in expected]
    assert order.views(keys, 10).tolist() == [(derive(key, 1) & ((1 << 62) - 1)) % 10 for key in expected]


@pytest.mark.parametrize("samples", [1, 2, 7, 1000, 4096])
def test_the_order_is_a_permutation(samples: int) -> None:
    for epoch in range(3):
        order = DataOrder(samples, 1, 0).permutation(epoch)
        assert order.dtype == torch.int64
        assert sorted(order.tolist()) == list(range(samples))


def test_the_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    first = DataOrder(500, 5, 0).permutation(0).tolist()
    assert DataOrder(500, 50, 0).permutation(0).tolist() == first
    others = [DataOrder(500, 5, seed).permutation(epoch).tolist() for seed, epoch in ((0, 1), (1, 0), (1, 1), (2, 0))]
    assert all(other != first for other in others)
    assert len({tuple(other) for other in others}) == 4
    torch.manual_seed(123)
    torch.randn(10)
    assert DataOrder(500, 5, 0).permutation(0).tolist() == first


def test_the_incomplete_last_batch_is_dropped() -> None:
    order = DataOrder(23, 5, 3)
    assert order.steps_per_epoch == 4
    seen = [order.batch(step)[0].tolist() for step in range(8)]
    for epoch in (0, 1):
        expected = order.permutation(epoch).tolist()[:20]
        assert [index for batch in seen[4 * epoch : 4 * epoch + 4] for index in batch] == expected
        assert len(set(expected)) == 20


def test_a_piece_of_a_batch_is_that_piece_of_the_whole() -> None:
    order = DataOrder(100, 12, 1)
    indices, keys = order.batch(9)
    part, part_keys = order.batch(9, 5, 9)
    assert part.tolist() == indices[5:9].tolist()
    assert part_keys.tolist() == keys[5:9].tolist()


LAYOUTS = [(1, 12), (1, 4), (1, 1), (2, 6), (2, 3), (3, 2), (4, 1), (6, 2), (12, 1)]


@pytest.mark.parametrize(("world", "micro"), LAYOUTS)
def test_every_layout_sees_the_same_global_batches_in_order(world: int, micro: int) -> None:
    order = DataOrder(50, 12, 4)
    for step in (0, 3, 4, 9):
        indices, keys = order.batch(step)
        views = order.views(keys, 5)
        steps = batches(order, 5, micro, world, step)
        assert len(steps) == 12 // (world * micro)
        flat = [batch for together in steps for batch in together]
        assert torch.cat([b.tokens for b in flat])[:, 0].tolist() == (100 * indices + views).tolist()
        assert torch.cat([b.labels for b in flat]).tolist() == (indices % 7).tolist()
        assert torch.cat([b.keys for b in flat]).tolist() == keys.tolist()
        assert all(len(b.tokens) == micro and b.images is None for b in flat)


def test_a_layout_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"micro \* world = 5 \* 2 does not divide 12"):
        BatchLoader(source(50), DataOrder(50, 12, 0), 5, 0, 2, torch.device("cpu"), images=False)


def test_images_come_only_where_they_are_asked_for() -> None:
    images = np.arange(20 * 2 * 3, dtype=np.uint8).reshape(20, 2, 3, 1, 1)
    data = TokenSource(np.zeros((20, 2, 4), np.int32), np.zeros(20, np.int64), ArrayViews(images))
    order = DataOrder(20, 4, 0)
    with_images = next(BatchLoader(data, order, 4, 0, 1, torch.device("cpu"), images=True).micro_batches(1))
    indices, keys = order.batch(1)
    assert with_images.images is not None
    assert with_images.images.numpy().tolist() == images[indices.numpy(), order.views(keys, 2).numpy()].tolist()
    assert next(BatchLoader(data, order, 4, 0, 1, torch.device("cpu"), images=False).micro_batches(1)).images is None


OPEN_AT_THE_END = """
import torch
from mirai_ds.data import BatchLoader, DataOrder
from tests.data.test_order import source
reader = BatchLoader(source(8), DataOrder(8, 4, 0), 4, 0, 1, torch.device("cpu"), images=False, workers=2)
print(len(list(reader.micro_batches(0))))
raise ValueError("with workers")
"""


def test_a_process_that_fails_with_workers_open_ends() -> None:
    """They ignore the signal by which Python ends them at its exit, and it waits for them."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN_AT_THE_END], capture_output=True, text=True, check=False, timeout=100
    )
    assert (done.returncode, done.stdout) == (1, "1\n"), done.stderr
    assert done.stderr.endswith("ValueError: with workers\n")


def test_workers_follow_a_jump_back() -> None:
    """As after a rollback; read ahead, they hold the batches of later steps."""
    order = DataOrder(24, 4, 0)
    reader = BatchLoader(source(24), order, 4, 0, 1, torch.device("cpu"), images=False, workers=1)
    for step in (3, 4, 1):
        (batch,) = reader.micro_batches(step)
        assert batch.keys.tolist() == order.batch(step)[1].tolist()
    reader.close()


def test_keys_are_unique_across_positions_and_epochs() -> None:
    order = DataOrder(2000, 100, 0)
    keys = torch.cat([order.batch(step)[1] for step in range(100)])  # five epochs
    assert len(set(keys.tolist())) == 10_000
    other = torch.cat([DataOrder(2000, 100, 1).batch(step)[1] for step in range(100)])
    assert not set(keys.tolist()) & set(other.tolist())


def test_a_sample_has_another_key_in_every_epoch() -> None:
    order = DataOrder(10, 10, 0)
    keys = set()
    for epoch in range(50):
        indices, batch_keys = order.batch(epoch)
        keys.add(int(batch_keys[indices.tolist().index(3)]))
    assert len(keys) == 50


@pytest.mark.parametrize("views", [1, 2, 7, 10])
def test_views_are_uniform_and_cover_every_crop(views: int) -> None:
    order = DataOrder(20_000, 20_000, 0)
    counts = Counter(order.views(order.batch(0)[1], views).tolist())
    assert set(counts) == set(range(views))
    expected = 20_000 / views
    chi2 = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi2 < 30  # 9 degrees of freedom at most: p < 0.0005


def test_a_sample_shows_other_views_in_other_epochs() -> None:
    order = DataOrder(10, 10, 0)
    shown = []
    for epoch in range(400):
        indices, keys = order.batch(epoch)
        shown.append(int(order.views(keys, 10)[indices.tolist().index(0)]))
    counts = Counter(shown)
    assert set(counts) == set(range(10))
    assert sum((count - 40) ** 2 / 40 for count in counts.values()) < 30


def test_positions_are_shuffled_evenly() -> None:
    """Where sample 0 lands over 1,000 epochs is uniform."""
    order = DataOrder(10, 1, 9)
    counts = Counter(order.permutation(epoch).tolist().index(0) for epoch in range(1000))
    assert sum((counts[place] - 100) ** 2 / 100 for place in range(10)) < 30
