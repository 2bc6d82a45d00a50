"""SIGKILL any rank at any instant, start again: from the last checkpoint on everything is bit-identical."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from mirai_ds.checkpoint import store
from tests.fault.faulty_ranks import Kill, curve, pictures, random_kill, run_ranks, tensors
from tests.marks import by_hand

IF_PRESENT = ("--resume", "if-present")


def assert_same(run: Path, whole: Path, steps: int) -> None:
    """Losses, metrics, samples, and every tensor of the last checkpoint."""
    assert curve(run) == curve(whole)
    assert pictures(run) == pictures(whole)
    assert len(pictures(whole)) >= 1
    assert tensors(run, steps) == tensors(whole, steps)
    assert len(tensors(whole, steps)) == 2


def finish(run: Path, **options: Any) -> str:
    """Start until the run is finished; at most thrice, since nothing disturbs it any more."""
    for _ in range(3):
        ended = run_ranks(run, *IF_PRESENT, **options)
        if ended.outcome.startswith("finished"):
            assert ended.codes == [0, 0], ended.out[-3000:]
            return ended.out
    raise AssertionError(f"did not finish: {ended.outcome} {ended.out[-3000:]}")


def killed(run: Path, kill: Kill, **options: Any) -> bool:
    """One start with a kill; whether it struck.  The other rank has ended by itself and says whom it lost."""
    ended = run_ranks(run, *IF_PRESENT, kill=kill, **options)
    struck = ended.codes[kill.rank] == -9
    if struck:
        assert ended.codes[1 - kill.rank] in (0, 1), ended.out[-3000:]
        assert not ended.outcome or ended.outcome.split()[0] in ("requeue", "finished"), ended.outcome
    return struck


@pytest.mark.parametrize("kill", [
    Kill(1, "step ", 7, 0.01), Kill(0, "saving", 3, 0.002), by_hand(Kill(1, "evaluating", 5)),
])  # fmt: skip
def test_a_killed_run_repeats_itself_to_the_last_digit(whole: Path, tmp_path: Path, kill: Kill) -> None:
    run = tmp_path / "run"
    assert killed(run, kill)
    finish(run)
    assert_same(run, whole, 24)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.matrix if seed < 2 else pytest.mark.exhaustive) for seed in range(10)]
)
def test_fifty_random_kills(whole: Path, tmp_path: Path, seed: int, record_property: Any) -> None:
    """Ten runs, eight of them only by hand (`make test-exhaustive`); each is killed until five kills struck, then
    finished.  Background saves in every second run."""
    source = random.Random(seed)
    run, struck = tmp_path / "run-0", []
    settings = [f"checkpoint.background={str(bool(seed % 2)).lower()}", "guard.max_restarts=50"]
    while len(struck) < 5:
        kill = random_kill(source, 2)
        if killed(run, kill, settings=settings):
            struck.append(f"{kill.phase.strip()}@{kill.occurrence}")
        else:  # the phase does not come any more: that run is finished
            assert_same(run, whole, 24)
            run = tmp_path / f"run-{len(struck)}-{source.random()}"
    record_property("kills", struck)
    finish(run, settings=settings)
    assert_same(run, whole, 24)


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.matrix), by_hand(1)])
def test_random_kills_of_mirai_i(whole_i: Path, encoder: list[str], tmp_path: Path, seed: int) -> None:
    """Three kills each, every block recomputed."""
    source = random.Random(100 + seed)
    run = tmp_path / "run"
    settings = [*encoder, "guard.max_restarts=50"]
    for _ in range(3):
        kill = Kill(
            source.randrange(2), source.choice(["step ", "saving"]), source.randint(1, 3), source.random() * 0.05
        )
        killed(run, kill, settings=settings, recipe="digits-baseline")
    finish(run, settings=settings, recipe="digits-baseline")
    assert_same(run, whole_i, 12)


@pytest.mark.matrix
def test_kills_at_file_system_events(whole: Path, tmp_path: Path) -> None:
    """Rank 0 dies at its 20th, 26th, 32nd ... touch of a file of the run, saves included, until a start gets through:
    each leaves only whole checkpoints, and the end is the uninterrupted run's."""
    run, struck = tmp_path / "run", 0
    settings = ["guard.max_restarts=1000"]
    while killed(run, Kill(0, event=20 + 6 * struck), settings=settings):
        struck += 1
        for step in store.list_steps(run):
            store.verify(store.folder_of(run, step))
        assert struck < 200
    assert struck >= 10
    assert_same(run, whole, 24)
