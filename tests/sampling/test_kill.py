"""SIGKILL at any instant: the same command goes on and ends in the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mirai_ds.config import UserError
from mirai_ds.resumable import parts
from mirai_ds.runtime.distributed import World
from mirai_ds.sampling import draw_archive, run
from mirai_ds.sampling import job as drawing
from tests.sampling.conftest import ALONE, content, request_of

FORK = multiprocessing.get_context("fork")


class Killed(BaseException):
    """What stands for a kill inside this process: nothing catches it."""


@pytest.fixture(scope="module")
def wanted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed start."""
    folder = tmp_path_factory.mktemp("whole")
    draw_archive(request_of(tiny, folder / "x.npz", num=9, png=True), ALONE)
    return content(folder)


def test_a_kill_between_any_two_writes(
    tiny: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after each write in turn; then the same command again."""
    request = request_of(tiny, tmp_path / "x.npz", num=9, png=True)
    kills = 0
    while True:
        left = [kills]

        def counted(real: Callable[..., Any], left: list[int] = left) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                if left[0] == 0:
                    raise Killed("before")
                left[0] -= 1
                result = real(*arguments, **named)
                if left[0] == 0:
                    raise Killed("after")
                left[0] -= 1
                return result

            return call

        with monkeypatch.context() as patch:
            for module, names in ((parts, ["write_whole"]), (run, ["write_whole", "write_sample_archive"]),
                                  (drawing, ["write_pngs"]), (shutil, ["rmtree"])):  # fmt: skip
                for name in names:
                    patch.setattr(module, name, counted(getattr(module, name)))
            try:
                draw_archive(request, ALONE)
            except Killed:
                kills += 1
            else:
                break
        draw_archive(request, ALONE)
        assert content(tmp_path) == wanted
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert kills == 2 * (1 + 3 * 2 + 1 + 2 + 1 + 1)  # plan, parts and PNGs, archive, two files, record, tidying up


def test_random_kills_of_several_ranks(tiny: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
    """Killed again and again with 1 to 3 ranks until it is through; anew until there were ten kills."""
    generator, kills, rounds = random.Random(1), 0, 0

    def work(rank: int = 0, world: int = 1) -> None:
        draw_archive(request_of(tiny, folder / "x.npz", num=9, png=True, stall_timeout=30), World(rank, rank, world, 2))

    while kills < 10:
        folder, longest = tmp_path / str(rounds), 0.1
        folder.mkdir()
        while not (folder / "x.npz.json").is_file():
            world = generator.choice((1, 2, 3))
            processes = [FORK.Process(target=work, args=(rank, world)) for rank in range(world)]
            for process in processes:
                process.start()
            time.sleep(generator.uniform(0, longest))
            longest *= 1.3  # so that it comes further each time
            for process in processes:
                assert process.pid is not None
                if process.is_alive():
                    kills += 1
                    os.kill(process.pid, signal.SIGKILL)
                process.join()
        work()
        assert content(folder) == wanted
        rounds += 1


@pytest.mark.parametrize("damage", ["cut", "png", "emptied"])
def test_a_damaged_part_is_drawn_again(
    damage: str, tiny: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(tiny, tmp_path / "x.npz", num=9, png=True)
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_sample_archive", lambda *a: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            draw_archive(request, ALONE)
    part = tmp_path / "x.npz.work" / "parts" / "000002.npz"
    if damage == "png":
        (tmp_path / "x" / "000008.png").write_bytes(b"")
    else:
        part.write_bytes(part.read_bytes()[:-100] if damage == "cut" else b"")
    draw_archive(request, ALONE)
    assert content(tmp_path) == wanted


def test_other_settings_do_not_go_on(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run, "wait_for_parts", lambda *a: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            draw_archive(request_of(tiny, tmp_path / "x.npz"), ALONE)
    for change in ({"cfg_scale": 1.5}, {"precision": "bf16"}, {"num": 22}, {"png": True}):
        with pytest.raises(UserError, match=f"was begun with {next(iter(change))} = "):
            draw_archive(request_of(tiny, tmp_path / "x.npz", **change), ALONE)


@pytest.mark.parametrize("batch", [3, 7])
def test_another_batch_goes_on_where_images_do_not_depend_on_it(
    batch: int, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32 on a CPU: to the bytes of the first batch.  In bf16 the reason is said."""
    request = request_of(tiny, tmp_path / "a" / "x.npz", batch=5)
    draw_archive(request, ALONE)
    for name, precision in (("b", "fp32"), ("c", "bf16")):
        begun = replace(request, out=tmp_path / name / "x.npz", precision=precision)
        with monkeypatch.context() as patch:
            patch.setattr(run, "wait_for_parts", lambda *a: (_ for _ in ()).throw(Killed()))
            with pytest.raises(Killed):
                draw_archive(begun, ALONE)
        parts = sorted((tmp_path / name / "x.npz.work" / "parts").iterdir())
        for part in parts[1:]:
            part.unlink()
        if precision == "fp32":
            draw_archive(replace(begun, batch=batch), ALONE)
        else:
            with pytest.raises(UserError, match=f"batch = 5, this is {batch}; on this device and at this precision"):
                draw_archive(replace(begun, batch=batch), ALONE)
    assert content(tmp_path / "b") == content(tmp_path / "a")
    draw_archive(replace(request, batch=batch), ALONE)  # finished is finished
