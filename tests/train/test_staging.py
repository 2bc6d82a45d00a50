"""`data.stage`: one rank a node copies, all hear what went wrong on any, and training is the same to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mirai_ds.data.staging import open_any, place_of
from tests.extract.conftest import codebook, content, photos, store  # noqa: F401  (fixtures)
from tests.rank_pool import RankPool
from tests.train.conftest import numbers, small_train
from tests.train.staging_cases import staging_case
from tests.train.test_stores import Shop, mirai_i, shop, train  # noqa: F401  (fixtures)
from tests.warm_start import Done


@pytest.mark.parametrize("nodes", [1, 2])
def test_one_rank_a_node_copies(nodes: int, store: Path, tmp_path: Path, ranks: dict[int, RankPool]) -> None:  # noqa: F811
    disks = [str(tmp_path / f"disk{min(rank, nodes - 1)}") for rank in range(2)]
    found = ranks[2].run(staging_case, str(store), disks, nodes)
    for rank, disk in enumerate(disks):
        place = place_of(open_any(store), Path(disk))
        assert found[rank]["path"] == str(place)
        assert content(place) == content(store)
        assert found[rank]["digests"][0] == found[rank]["digests"][1]
        assert bool(found[rank]["copied"]) == (rank == 0 or nodes == 2)
        assert found[rank]["beats"] == {"copying data to the node's disk"}
    again = ranks[2].run(staging_case, str(store), disks, nodes)
    assert [one["copied"] for one in again] == [[], []]


def test_what_goes_wrong_on_one_node_is_every_rank_s_mistake(
    store: Path, tmp_path: Path, ranks: dict[int, RankPool]  # noqa: F811
) -> None:  # fmt: skip
    (tmp_path / "file").touch()
    found = ranks[2].run(staging_case, str(store), [str(tmp_path / "disk"), str(tmp_path / "file" / "in")], 2)
    assert found[0] == found[1]
    assert f"{tmp_path}/file/in" in found[0]["mistake"]
    assert "Not a directory" in found[0]["mistake"]


def test_a_node_that_copies_nothing_is_given_up(store: Path, tmp_path: Path, ranks: dict[int, RankPool]) -> None:  # noqa: F811
    disks = [str(tmp_path / f"disk{rank}") for rank in range(2)]
    found = ranks[2].run(staging_case, str(store), disks, 2, minutes=0.02, slow=True)
    assert found[0] == found[1]
    assert "has copied nothing for 0 minutes (0 of " in found[0]["mistake"]


def without_and_with(run: Callable[..., Done], folder: Path) -> Done:
    """The same run from the stores and from copies of them: the same numbers to the last digit, and the same data to
    its checkpoints, so that each goes on from the other's."""
    disk = folder / "disk"
    plain, staged = run(folder / "plain"), run(folder / "staged", f"data.stage={disk}")
    assert (plain.code, staged.code) == (0, 0), plain.err[-2000:] + staged.err[-2000:]
    assert numbers(folder / "staged") == numbers(folder / "plain")
    more = run(folder / "staged", "train.max_steps=10", f"data.stage={disk}/other", options=("--resume", "auto"))
    longer = run(folder / "plain", "train.max_steps=10", f"data.stage={disk}", options=("--resume", "auto"))
    assert (more.code, longer.code) == (0, 0), more.err[-2000:] + longer.err[-2000:]
    assert [record["step"] for record in numbers(folder / "staged")] == list(range(1, 11))
    assert numbers(folder / "staged") == numbers(folder / "plain")
    return staged


def test_losses_are_those_without_it(store: Path, tmp_path: Path) -> None:  # noqa: F811
    model = "{size: custom, dim: 32, n_layer: 3, n_head: 2, vocab_size: 64, num_classes: 2, block_size: 16}"
    settings = [
        f"model={model}", f"data={{source: store, path: {store}}}", "foresight={method: none}",
        "train.global_batch_size=6", "train.max_steps=6", "logging.every_steps=1", "checkpoint.at_end=true",
        "eval.classifier.enabled=false", "eval.loss.at_end=false", "eval.loss.every_steps=null",
        "sampling.at_end=false",
    ]  # fmt: skip

    def run(folder: Path, *more: str, options: tuple[str, ...] = ()) -> Done:
        return small_train(folder, *options, recipe="digits-baseline", overrides=[*settings, *more])

    staged = without_and_with(run, tmp_path)
    assert f"data.stage: 1 store read from {tmp_path}/disk" in staged.out
    (copy,) = (tmp_path / "disk").glob("mirai_ds-*")
    assert content(copy) == content(store)


@pytest.mark.matrix
def test_losses_are_those_without_it_with_pixels(shop: Shop, tmp_path: Path) -> None:  # noqa: F811
    """Mirai-I: codes and packed crops from copies."""

    def run(folder: Path, *more: str, options: tuple[str, ...] = ()) -> Done:
        mine = (f"data.images={shop.images}", "data.workers=1", "checkpoint.at_end=true", *more)
        return train(shop, folder, mirai_i(shop), *mine, options=options)

    staged = without_and_with(run, tmp_path)
    assert f"data.stage: 2 stores read from {tmp_path}/disk" in staged.out
    for copy in (tmp_path / "disk").glob("mirai_ds-*"):
        original = shop.images if open_any(copy).manifest.seal == open_any(shop.images).manifest.seal else shop.codes
        assert content(copy) == content(original)
