"""`data.stage`: one rank a node copies, all hear what went wrong on any, and training is the same to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirai_ds.data.staging import open_any, place_of
from tests.extract.conftest import codebook, content, photos, store  # noqa: F401  (fixtures)
from tests.rank_pool import RankPool
from tests.train.conftest import numbers
from tests.train.staging_cases import staging_case
from tests.train.test_stores import Shop, mirai_i, shop, train, with_image_store  # noqa: F401  (fixtures)


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


def test_losses_are_those_without_it(shop: Shop, with_image_store: Path, tmp_path: Path) -> None:  # noqa: F811
    """Codes and pixels from copies: the numbers of the run that reads the stores, to the last digit."""
    disk = tmp_path / "disk"
    more = [f"data.images={shop.images}", "data.workers=1", "sampling.at_end=true", f"data.stage={disk}"]
    done = train(shop, tmp_path / "run", mirai_i(shop), *more)
    assert done.code == 0, done.err[-3000:]
    assert f"data.stage: 2 stores read from {disk}" in done.out
    assert len(list(disk.glob("mirai_ds-*"))) == 2
    assert numbers(tmp_path / "run") == numbers(with_image_store)
    for copy in disk.glob("mirai_ds-*"):
        original = shop.images if open_any(copy).manifest.seal == open_any(shop.images).manifest.seal else shop.codes
        assert content(copy) == content(original)
