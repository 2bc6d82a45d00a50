"""A store's copy on a node's own disk: whole or not there, redone, shared, and what goes wrong in one line."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import threading
from pathlib import Path

import pytest
from filelock import FileLock

from mirai_ds.config import DataConfig, UserError
from mirai_ds.data import staging
from mirai_ds.data.staging import open_any, place_of, stage_folder, stage_store
from tests.extract.conftest import codebook, content, packed, photos, store  # noqa: F401  (fixtures)
from tests.one_line import one_line
from tests.waiting import wait_until


@pytest.mark.parametrize("kind", ["store", "packed"])
def test_a_copy_is_the_store(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source, told = request.getfixturevalue(kind), []
    place = stage_store(source, tmp_path / "disk", lambda done, total: told.append((done, total)))
    assert place == place_of(open_any(source), tmp_path / "disk")
    assert content(place) == content(source)
    size = sum(len(data) for data in content(source).values())
    assert told == sorted(told)
    assert (size, 2 * size) in told
    assert told[-1] == (2 * size, 2 * size)
    made = {path: path.stat().st_ino for path in place.iterdir()}
    assert stage_store(source, tmp_path / "disk", lambda *_: pytest.fail("copied again")) == place
    assert {path: path.stat().st_ino for path in place.iterdir()} == made


def test_a_copy_that_was_killed_is_redone(store: Path, tmp_path: Path) -> None:  # noqa: F811
    """SIGKILL in the middle of it; what a process of another node left is nobody's here, and stays."""
    disk = tmp_path / "disk"
    child = os.fork()
    if child == 0:
        stage_store(store, disk, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    place = place_of(open_any(store), disk)
    left = list(disk.glob(f".{place.name}.{socket.gethostname()}-*.tmp"))
    assert len(left) == 1
    assert not place.exists()
    elsewhere = disk / f".{place.name}.another-node-1-1.tmp"
    elsewhere.mkdir()
    assert content(stage_store(store, disk)) == content(store)
    assert list(disk.glob(".*.tmp")) == [elsewhere]


def test_another_run_s_copy_is_waited_for(store: Path, tmp_path: Path) -> None:  # noqa: F811
    """Its bytes are the progress; when it is there nothing is copied."""
    disk = tmp_path / "disk"
    place = place_of(open_any(store), disk)
    other = disk / f".{place.name}.node-1-1.tmp"
    other.mkdir(parents=True)
    (other / "codes.npy").write_bytes(b"x" * 77)
    told, result = [], []
    with FileLock(disk / f".{place.name}.lock"):
        waiter = threading.Thread(target=lambda: result.append(stage_store(store, disk, lambda *p: told.append(p))))
        waiter.start()
        wait_until("it has looked", lambda: bool(told))
        shutil.copytree(store, place)
        before = content(place)
    waiter.join(60)
    assert result == [place]
    assert {done for done, _ in told} == {77}
    assert content(place) == before


def test_a_node_that_shares_the_folder_may_be_first(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    disk = tmp_path / "disk"
    place = place_of(open_any(store), disk)
    monkeypatch.setattr(staging, "_is_whole", lambda *_: False)  # it was not there when this one looked
    shutil.copytree(store, place)
    made = (place / "codes.npy").stat().st_ino
    assert stage_store(store, disk) == place
    assert (place / "codes.npy").stat().st_ino == made
    assert not list(disk.glob(".*.tmp"))


@pytest.mark.parametrize("name", ["codes.npy", "labels.npy", "manifest.json"])
def test_a_damaged_copy_is_told_and_left(name: str, store: Path, tmp_path: Path) -> None:  # noqa: F811
    place = stage_store(store, tmp_path)
    with (place / name).open("r+b") as file:
        file.truncate(100)
    one_line(lambda: stage_store(store, tmp_path), f"the copy in {place} is damaged", name, "remove it")
    assert (place / name).stat().st_size == 100


def test_a_damaged_store_gives_no_copy(store: Path, tmp_path: Path) -> None:  # noqa: F811
    source = tmp_path / "store"
    shutil.copytree(store, source)
    with (source / "codes.npy").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    one_line(lambda: stage_store(source, tmp_path / "disk"), "was not copied whole", "images 0 to", "digest")
    assert [path.name[-5:] for path in (tmp_path / "disk").iterdir()] == [".lock"]


def test_a_disk_without_room(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    one_line(lambda: stage_store(store, tmp_path), "0.00 GB free", "make room, or leave data.stage out")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(staging.os, "fsync", full)
    one_line(lambda: stage_store(store, tmp_path), "data.stage", "No space left on device", socket.gethostname())
    assert [path.name[-5:] for path in tmp_path.iterdir()] == [".lock"]


def test_folders_that_cannot_be_written(store: Path, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "file").touch()
    one_line(lambda: stage_store(store, tmp_path / "file" / "in"), "Not a directory", "leave data.stage out")
    one_line(lambda: stage_store(store, Path("/proc/mirai")), "/proc/mirai", "No such file")


def test_a_folder_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_DISK", "/local/7")
    assert stage_folder("$NODE_DISK/data") == Path("/local/7/data")
    monkeypatch.delenv("NODE_DISK")
    one_line(lambda: stage_folder("$NODE_DISK/data"), "a variable in it is not set", socket.gethostname())
    monkeypatch.setenv("NODE_DISK", "here")
    one_line(lambda: stage_folder("$NODE_DISK/data"), "'here/data', no whole path")


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ({"stage": "/local"}, ["data.stage = '/local'", "source: store"]),
        ({"source": "store", "path": "x", "stage": "local"}, ["data.stage = 'local'", "whole path"]),
        ({"source": "mine:source", "stage": "/local"}, ["data.stage", "source: store"]),
    ],
)
def test_mistakes_in_the_section(section: dict[str, str], parts: list[str]) -> None:
    with pytest.raises((UserError, ValueError)) as caught:
        DataConfig.model_validate(section)
    for part in parts:
        assert part in str(caught.value)
