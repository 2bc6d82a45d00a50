"""SIGKILL at any instant: the same command goes on and ends in the same bytes."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mirai_ds.data.stores import open_image_store, open_token_store
from mirai_ds.extract import extract_codes, extract_images, run
from mirai_ds.extract.llamagen import Import, import_llamagen
from mirai_ds.resumable import parts
from mirai_ds.runtime.distributed import World
from tests.extract.conftest import ALONE, content, options
from tests.marks import by_hand

FORK = multiprocessing.get_context("fork")


class Killed(BaseException):
    """What stands for a kill inside this process: nothing catches it."""


def at_every_write(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any], verify: Callable[[], None]) -> int:
    """Kill `work` before and after each of its writes in turn, go on each time, verify; returns how many there are."""
    from mirai_ds.data.stores import files
    from mirai_ds.extract import codes, images

    kills = 0
    while True:
        left = [kills]

        def counted(real: Callable[..., Any], left: list[int] = left) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                for moment in ("before", "after"):
                    if left[0] == 0:
                        raise Killed(moment)
                    left[0] -= 1
                    if moment == "before":
                        result = real(*arguments, **named)
                return result

            return call

        with monkeypatch.context() as patch:
            for module in (files, parts, codes, images, run):
                for name in ("write_whole", "write_manifest", "write_lists", "tidy"):
                    if hasattr(module, name):
                        patch.setattr(module, name, counted(getattr(module, name)))
            patch.setattr(codes, "_write_codes", counted(codes._write_codes))
            patch.setattr(codes, "keep_codebook", counted(codes.keep_codebook))
            try:
                work()
            except Killed:
                kills += 1
            else:
                return kills
        work()
        verify()


def test_a_kill_between_any_two_writes_of_codes(
    store: Path, photos: Path, codebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, wanted = tmp_path / "s", content(store)

    def verify() -> None:
        assert content(out) == wanted
        shutil.rmtree(out)

    kills = at_every_write(monkeypatch, lambda: extract_codes(options(photos, out), ALONE, codebook, batch=7), verify)
    assert kills > 20


def test_a_kill_between_any_two_writes_of_images(
    packed: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, wanted = tmp_path / "s", content(packed)

    def verify() -> None:
        assert content(out) == wanted
        shutil.rmtree(out)

    kills = at_every_write(monkeypatch, lambda: extract_images(options(photos, out), ALONE), verify)
    assert kills > 20


def killed_at_random(work: Callable[[], Any], out: Path, seconds: float, generator: random.Random) -> bool:
    """Run `work` in a forked process and SIGKILL it after up to `seconds`; whether it was still running."""
    process = FORK.Process(target=work)
    process.start()
    time.sleep(generator.uniform(0, seconds))
    running = process.is_alive()
    if running:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return running


@pytest.mark.parametrize(("kind", "least"), [("codes", 6), ("images", 6), by_hand("codes", 24), by_hand("images", 24)])
def test_random_kills(
    kind: str, least: int, photos: Path, codebook: Path, store: Path, packed: Path, tmp_path: Path
) -> None:
    """One extraction, killed again and again with 1 to 3 ranks until it is through; then a whole round of others."""
    wanted = content(store if kind == "codes" else packed)
    generator, kills, rounds = random.Random(kind), 0, 0

    def work(rank: int = 0, world: int = 1) -> None:
        place = World(rank, rank, world, world)
        if kind == "codes":
            extract_codes(options(photos, out, workers=1), place, codebook, batch=7)
        else:
            extract_images(options(photos, out, workers=1), place)

    while kills < least:
        out = tmp_path / f"s{rounds}"
        whole = 0.05
        while not (out / "manifest.json").is_file():
            world = generator.choice((1, 1, 2, 3))
            others = [FORK.Process(target=work, args=(rank, world)) for rank in range(1, world)]
            for process in others:
                process.start()
            kills += killed_at_random(lambda world=world: work(0, world), out, whole, generator)
            whole *= 1.3  # so that it comes further each time
            for process in others:
                process.kill()
                process.join()
        work()
        assert content(out) == wanted
        rounds += 1
    (open_token_store if kind == "codes" else open_image_store)(out)


def test_an_import_goes_on_after_a_kill(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.extract.test_llamagen import write_folder

    folder = write_folder(tmp_path / "theirs", store)
    out = tmp_path / "s"
    request = Import(folder, options(folder, out), keep_duplicates=True)
    whole = Import(folder, options(folder, tmp_path / "whole"), keep_duplicates=True)
    import_llamagen(whole)
    wanted = content(tmp_path / "whole")

    def verify() -> None:
        assert content(out) == wanted
        shutil.rmtree(out)

    from mirai_ds.extract import llamagen

    monkeypatch.setattr(llamagen, "tidy", run.tidy)
    assert at_every_write(monkeypatch, lambda: import_llamagen(request), verify) > 15
