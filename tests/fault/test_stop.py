"""Requests to stop, in any phase: all ranks agree on one step, save, and say how to go on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mirai_ds.checkpoint import store
from mirai_ds.runtime import signals, watchdog
from mirai_ds.runtime.signals import REQUEUE, SAME_EVENT_SECONDS, STOP, StopRequests
from tests.fault.faulty_ranks import SETTINGS, curve, run_ranks, start_ranks, wait_for
from tests.fault.test_kills import IF_PRESENT, assert_same, finish
from tests.marks import by_hand
from tests.waiting import wait_until

SLOW = ["checkpoint.every_steps=1000"]  # so that only the request saves


def has_step(run: Path, step: int) -> bool:
    path = run / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()


def send_in_phase(phase: str, number: int, occurrence: int = 1) -> None:
    """In the rank itself: a signal when it enters a phase."""
    from mirai_ds.runtime.watchdog import Watchdog

    inner, count = Watchdog.beat, [0]

    def beat(self: Watchdog, name: str) -> None:
        inner(self, name)
        if name.startswith(phase):
            count[0] += 1
            if count[0] == occurrence:
                os.kill(os.getpid(), number)

    Watchdog.beat = beat  # type: ignore[method-assign]


def only_rank(rank: int, phase: str, number: int, occurrence: int = 1) -> None:
    if int(os.environ["RANK"]) == rank:
        send_in_phase(phase, number, occurrence)


@pytest.mark.parametrize(
    ("rank", "phase", "occurrence", "number", "saved"),
    [
        (1, "step ", 7, signal.SIGTERM, 8), by_hand(0, "step ", 7, signal.SIGUSR1, 8),
        (1, "evaluating", 3, signal.SIGUSR1, 9),
        (0, "sampling", 1, signal.SIGTERM, 13), (1, "preflight", 1, signal.SIGTERM, None),
    ],
)  # fmt: skip
def test_a_signal_to_one_rank_saves_one_step_on_all(
    whole: Path, tmp_path: Path, rank: int, phase: str, occurrence: int, number: int, saved: int | None
) -> None:
    run = tmp_path / "run"
    ended = run_ranks(run, settings=SLOW, prepare=only_rank, arguments=(rank, phase, number, occurrence))
    assert ended.codes == [75, 75], ended.out[-3000:]
    name = signal.Signals(number).name
    steps = store.list_steps(run)
    if phase == "step ":  # the thread that listens may be before or after this step's post to the other ranks
        assert steps in ([saved - 1], [saved])  # type: ignore[operator]
    else:
        assert steps == ([] if saved is None else [saved])
    assert ended.outcome == f"requeue {name} at step {steps[0] if steps else 0}\n"
    if saved is None:  # nothing to go on with: the run begins
        ended = run_ranks(run, *IF_PRESENT, settings=[*SLOW, "train.max_steps=2"])
        assert ended.outcome == "finished at step 2\n", ended.out[-3000:]
        return
    finish(run, settings=SLOW)
    # Only the interval of checkpoints differs from the uninterrupted run's, and that is no part of a curve.
    assert curve(run) == curve(whole)


def test_a_signal_while_saving_in_the_background(whole: Path, tmp_path: Path) -> None:
    """The save on its way is published before the next one begins."""
    run = tmp_path / "run"
    settings = ["checkpoint.background=true"]
    ended = run_ranks(run, settings=settings, prepare=only_rank, arguments=(1, "saving", signal.SIGTERM, 2))
    assert ended.codes == [75, 75], ended.out[-3000:]
    steps = store.list_steps(run)
    assert steps[:2] == [4, 8]
    assert steps[2] in (9, 10)
    finish(run, settings=settings)
    assert_same(run, whole, 24)


@pytest.mark.parametrize(
    ("text", "outcome", "codes"),
    [
        pytest.param("", "stopped stop file", [0, 0], marks=pytest.mark.matrix),
        ("requeue maintenance\n", "requeue maintenance", [75, 75]),
    ],
)
def test_a_stop_file(tmp_path: Path, text: str, outcome: str, codes: list[int]) -> None:
    run = tmp_path / "run"

    def ask(_: Any) -> None:
        wait_until("step 3", lambda: has_step(run, 3))
        (run / ".stop.new").write_text(text)
        os.replace(run / ".stop.new", run / "stop")

    ended = run_ranks(run, settings=[*SLOW, "train.max_steps=2000", "train.epochs=100"], during=ask)
    assert ended.codes == codes, ended.out[-3000:]
    assert ended.outcome.startswith(f"{outcome} at step ")
    assert store.list_steps(run) == [int(ended.outcome.split()[-1])]


def test_the_stop_file_of_an_earlier_stop_is_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "stop").touch()
    ended = run_ranks(run, settings=["train.max_steps=2"])
    assert ended.outcome == "finished at step 2\n", ended.out[-2000:]


def hang_in_step(rank: int, step: int, sign: Path) -> None:
    """The rank never ends that step, in C code that no Python handler interrupts; `sign` is there once it hangs."""
    if int(os.environ["RANK"]) != rank:
        return
    import threading

    from mirai_ds.train import loop

    inner = loop.train_step

    def stuck(session: Any, number: int) -> Any:
        if number == step:
            lock = threading.Lock()
            lock.acquire()
            sign.touch()
            while True:
                lock.acquire(timeout=1000)
        return inner(session, number)

    loop.train_step = stuck


def test_a_second_signal_ends_a_rank_that_hangs(tmp_path: Path) -> None:
    run, sign = tmp_path / "run", tmp_path / "hangs"

    def twice(processes: list[Any]) -> None:
        wait_until("rank 0 hangs in step 7", sign.exists)
        for process in processes:
            os.kill(process.pid, signal.SIGTERM)
        time.sleep(SAME_EVENT_SECONDS + 0.5)
        for process in processes:
            os.kill(process.pid, signal.SIGTERM)

    ended = run_ranks(run, prepare=hang_in_step, arguments=(0, 6, sign), during=twice)
    # Whoever hears its second signal last may find its peer gone before: that rank ends with 1.
    assert sorted(ended.codes) in ([75, 75], [1, 75]), ended.out[-3000:]
    assert ended.outcome == "requeue SIGTERM, then SIGTERM: left at once\n"
    assert store.list_steps(run) == [4]
    store.verify(store.folder_of(run, 4))


def test_the_deadline_ends_a_rank_that_hangs(tmp_path: Path) -> None:
    run, sign = tmp_path / "run", tmp_path / "hangs"
    processes, logs = start_ranks(
        run, settings=["guard.stop_deadline_seconds=3"], prepare=hang_in_step, arguments=(1, 6, sign)
    )
    wait_until("rank 1 hangs in step 7", sign.exists)
    for process in processes:
        os.kill(process.pid, signal.SIGUSR1)
    ended = wait_for(run, processes, logs)
    assert ended.codes == [75, 75], ended.out[-3000:]
    assert ended.outcome == "requeue SIGUSR1; not done within 3 s\n"


def test_a_hang_leaves_every_ranks_stacks_and_ends(whole: Path, tmp_path: Path) -> None:
    """Rank 1 hangs alone, rank 0 waits for it in a collective: both say where, and the run can go on."""
    run, sign = tmp_path / "run", tmp_path / "hangs"
    ended = run_ranks(run, settings=["guard.hang_seconds=10"], prepare=hang_in_step, arguments=(1, 6, sign))
    assert 75 in ended.codes, ended.out[-3000:]
    assert set(ended.codes) <= {75, 1}  # 1: it lost the other, which left a moment earlier
    assert ended.outcome.startswith("requeue hang: rank ")
    assert "in phase: step 7" in ended.outcome
    stacks = {p.name: p.read_text() for p in (run / "hang" / "start-00001").iterdir()}
    assert sorted(stacks) == ["rank-00000.txt", "rank-00001.txt"]
    assert "in stuck" in stacks["rank-00001.txt"]
    assert "train_step" in stacks["rank-00000.txt"]
    finish(run)
    assert_same(run, whole, 24)


def test_usr2_shows_where_a_rank_is_and_changes_nothing(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = run_ranks(run, settings=["train.max_steps=8"], prepare=only_rank, arguments=(1, "step ", signal.SIGUSR2, 5))
    assert ended.codes == [0, 0], ended.out[-3000:]
    assert "most recent call first" in ended.out
    assert "run_loop" in ended.out
    assert curve(run) == [record for record in curve(whole) if record["step"] <= 8]


def test_requests_in_one_process() -> None:
    """One event that arrives twice is one; the strongest kind wins; nothing is left at once while saving."""
    left: list[str] = []
    stop = StopRequests()
    stop.leave = left.append
    stop.request(REQUEUE, "SIGTERM")
    stop.request(REQUEUE, "SIGTERM")
    assert (stop.kind, stop.reason, left) == (REQUEUE, "SIGTERM", [])
    stop._first -= 6
    stop.is_saving = lambda: True
    stop.request(STOP, "SIGINT")
    assert (stop.kind, left) == (STOP, [])
    stop.is_saving = lambda: False
    stop.request(STOP, "SIGINT")
    assert left == ["SIGTERM, then SIGINT: left at once"]


def test_a_request_before_the_first_step_is_done_need_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first step can take ten minutes, and there is nothing to save; once steps are done, or a save or the loop's own
    leaving is under way, the request waits for those."""
    monkeypatch.setattr(signals, "LAST_SECONDS", 0.05)

    def after_request(**state: Any) -> list[str]:
        left: list[str] = []
        stop = StopRequests()
        stop.leave = left.append
        stop.unsaved_steps = lambda: 0
        stop.request(REQUEUE, "SIGTERM")
        for name, value in state.items():
            setattr(stop, name, value)
        time.sleep(0.3)
        return left

    assert after_request() == ["SIGTERM; no step to save"]
    assert after_request(unsaved_steps=lambda: 1) == []
    assert after_request(is_saving=lambda: True) == []
    assert after_request(obeyed=True) == []


def test_the_stop_file_is_seen_while_the_main_thread_is_in_a_step(tmp_path: Path) -> None:
    stop = StopRequests()
    stop.watch_file(tmp_path / "stop")
    (tmp_path / "stop.new").write_text("requeue SIGTERM")
    os.replace(tmp_path / "stop.new", tmp_path / "stop")  # an empty one would mean another thing
    wait_until("the file is seen", lambda: stop.kind)
    assert (stop.kind, stop.reason) == (REQUEUE, "SIGTERM")


def test_a_slow_machine_is_not_taken_for_a_hung_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of the phases of a run whose first step takes 700 s and whose later ones take up to 400 s."""
    now = [1000.0]
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(watchdog, "faulthandler", SimpleNamespace(dump_traceback_later=lambda *_, **__: None))
    monkeypatch.setattr(watchdog.Watchdog, "_run", lambda self: None)
    guard = watchdog.Watchdog(600, tmp_path, 0, 1, lambda text: None, 3600)
    limits = [guard.limit]
    for phase, seconds in (("loading", 5), ("step 1", 700), ("step 2", 400), ("saving", 5), ("step 3", 100)):
        guard.beat(phase)
        limits.append(guard.limit)
        now[0] += seconds
    guard.beat("step 4")
    assert limits == [600, 600, 3600, 1400, 600, 2000]
    assert guard.limit == 2000


def test_the_settings_are_what_the_names_here_assume() -> None:
    assert "eval.loss.every_steps=8" in SETTINGS
    assert IF_PRESENT == ("--resume", "if-present")
