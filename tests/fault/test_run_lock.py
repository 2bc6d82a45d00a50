"""Two starts of one run: one of them writes."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mirai_ds.checkpoint import store
from mirai_ds.checkpoint.store import CheckpointInfo
from mirai_ds.config import UserError
from mirai_ds.runs import lock
from mirai_ds.runs.lock import Attempt, RunLock, RunTakenOverError, starts_without_progress, valid_attempts
from tests.fault.faulty_ranks import curve, run_ranks, start_ranks, wait_for
from tests.fault.test_kills import IF_PRESENT, assert_same, finish
from tests.waiting import wait_until


def elsewhere(run: Path, **changes: Any) -> None:
    """Make the last start one of another node."""
    last = lock.read_all(run)[-1]
    other = replace(last, **{"host": "node7", "space": "another boot", "pid": 1, **changes})
    lock.path_of(run, last.number).write_text(json.dumps(asdict(other)))


def test_a_second_start_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    first = RunLock.take(tmp_path)
    with pytest.raises(UserError, match=r"is being trained by start 1 \(host .*touch .*/stop"):
        RunLock.take(tmp_path)
    first.release("stopped by hand")
    second = RunLock.take(tmp_path)
    assert second.mine.number == 2
    with pytest.raises(RunTakenOverError, match=r"was taken over by start 2 .*this is start 1"):
        first.check()
    second.check()


def test_a_holder_on_another_node_is_known_by_its_heartbeat(tmp_path: Path) -> None:
    """No clocks: it either beats or it does not."""
    first = RunLock.take(tmp_path)
    elsewhere(tmp_path, id=first.mine.id)
    beat = tmp_path / lock.FOLDER / lock.HEARTBEAT
    began = time.monotonic()
    second = RunLock.take(tmp_path, patience=0.6)
    assert time.monotonic() - began >= 0.6
    assert second.mine.number == 2
    elsewhere(tmp_path)

    import threading

    done = threading.Event()
    thread = threading.Thread(target=lambda: [beat.write_text(f"2 {i}") or done.wait(0.05) for i in range(40)])
    thread.start()
    with pytest.raises(UserError, match=r"is being trained by start 2 \(host node7"):
        RunLock.take(tmp_path, patience=5)
    done.set()
    thread.join()


def test_a_requeued_job_takes_over_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own earlier start may still be alive on a node whose daemon died."""
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    first = RunLock.take(tmp_path)
    first.watch()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    looks, look = [], lock._heartbeat
    monkeypatch.setattr(lock, "_heartbeat", lambda run: (looks.append(run), look(run))[1])
    second = RunLock.take(tmp_path)
    assert looks == [tmp_path]  # once, to know its own from it; not until the earlier start falls silent
    assert (second.mine.job, second.mine.restart) == ("41", 1)
    wait_until("the first one's heartbeat sees it", lambda: first.lost)


def test_of_two_that_start_at_once_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loser saw no holder; the file is created exclusively."""
    monkeypatch.setattr(lock, "check_free", lambda run, patience: None)
    monkeypatch.setattr(lock, "read_all", lambda run: [])
    RunLock.take(tmp_path)
    with pytest.raises(UserError, match="another job is starting in it at this moment"):
        RunLock.take(tmp_path)


def test_a_folder_that_is_another_runs_now(tmp_path: Path) -> None:
    """--fresh set the run aside while an old rank was still alive."""
    first = RunLock.take(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "run.old-1")
    with pytest.raises(RunTakenOverError, match="its files are gone"):
        first.check()
    RunLock.take(tmp_path / "run")
    with pytest.raises(RunTakenOverError, match="was taken over by start 1"):
        first.check()


def start(number: int, after: int | None, parent: int | None = None, ended: str | None = None) -> Attempt:
    return Attempt(number, str(number), "h", "", 0, "", "", 0, 0.0, after, parent, ended)


def test_what_the_run_still_builds_upon() -> None:
    inf = float("inf")
    assert valid_attempts([]) == {}
    assert valid_attempts([start(1, None)]) == {}
    assert valid_attempts([start(1, 0)]) == {1: inf}
    assert valid_attempts([start(1, 0), start(2, 40, 1)]) == {2: inf, 1: 40}
    assert valid_attempts([start(1, 0), start(2, 40, 1), start(3, None)]) == {2: inf, 1: 40}  # 3 never began
    assert valid_attempts([start(1, 0), start(2, 40, 1), start(3, 20, 1)]) == {3: inf, 1: 20}  # 2 left behind
    assert valid_attempts([start(1, 0), start(2, 40, 1), start(3, 80, 1)]) == {3: inf, 1: 80}  # and taken up again
    assert valid_attempts([start(1, 0), start(2, 40, 1), start(3, 60, 2)]) == {3: inf, 2: 60, 1: 40}
    assert valid_attempts([start(1, 0), start(2, 0)]) == {2: inf}  # began anew
    assert valid_attempts([start(1, 30, 0)]) == {1: inf, 0: 30}  # checkpoints from before there were fences


def test_the_checkpoint_that_was_gone_on_from_counts_and_no_later_one_of_its_start() -> None:
    """Else a run that is killed before its next checkpoint goes back further each time."""
    valid = valid_attempts([start(1, 0), start(2, 40, 1)])
    counts = {
        (step, number): store.is_valid(CheckpointInfo(step, 32, 0, 2, 2, "fp32", "mirai-e", "", step, number), valid)
        for step, number in ((36, 1), (40, 1), (44, 1), (44, 2), (44, 3))
    }
    assert counts == {(36, 1): True, (40, 1): True, (44, 1): False, (44, 2): True, (44, 3): False}


def test_deaths_without_progress_are_counted() -> None:
    died = [start(n, 40, 1) for n in (2, 3, 4)]
    assert starts_without_progress([start(1, 0), *died], 40) == 3
    assert starts_without_progress([start(1, 0), *died], 44) == 0
    assert starts_without_progress([*died, start(5, 40, 1, "requeue SIGTERM at step 42")], 40) == 0
    assert starts_without_progress([*died, start(5, None)], 40) == 4  # died while it was being built
    assert starts_without_progress([*died, start(5, 40, 1, "failed disk full")], 40) == 4


def pretend_requeued(*_: Any) -> None:
    os.environ.update(SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")


def pretend_first(*_: Any) -> None:
    os.environ.update(SLURM_JOB_ID="7")
    slow_down()


def slow_down() -> None:
    """Steps of a tenth of a second, so that there is time for a second start."""
    from mirai_ds.train import loop

    inner = loop.train_step

    def slow(session: Any, number: int) -> Any:
        time.sleep(0.15)
        return inner(session, number)

    loop.train_step = slow


def test_the_earlier_incarnation_stops_with_an_error(whole: Path, tmp_path: Path) -> None:
    """Real ranks: the first start lives on while the scheduler has requeued the job."""
    run = tmp_path / "run"
    old, old_logs = start_ranks(run, prepare=pretend_first)
    wait_until("a checkpoint of the first start", lambda: store.list_steps(run))
    aside = [log.rename(log.with_suffix(".first")) for log in old_logs]
    new = run_ranks(run, *IF_PRESENT, prepare=pretend_requeued)
    first = wait_for(run, old, aside)
    assert new.codes == [0, 0], new.out[-3000:]
    assert first.codes[0] == 2, first.out[-3000:]
    assert first.codes[1] in (1, 2)  # told of it, or of rank 0's end
    assert "was taken over by start 2 (job 7 restart 1" in first.out
    assert new.outcome == "finished at step 24\n"
    assert_same(run, whole, 24)


def test_a_second_job_by_mistake_is_refused_and_harms_nothing(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    old, old_logs = start_ranks(run, prepare=slow_down)
    wait_until("a checkpoint of the first start", lambda: store.list_steps(run))
    aside = [log.rename(log.with_suffix(".first")) for log in old_logs]
    named = tmp_path / "job-outcome"
    second = run_ranks(run, *IF_PRESENT, env={"MIRAI_DS_OUTCOME": str(named)})
    assert second.codes == [2, 2]
    assert "is being trained by start 1" in second.out
    assert named.read_text().startswith("failed ")
    first = wait_for(run, old, aside)
    assert first.codes == [0, 0], first.out[-3000:]
    assert_same(run, whole, 24)


def late_write(run: str, source: str) -> None:
    """What a fenced rank 0 could still rename into place in the moment between its look and its write."""
    import shutil

    shutil.copytree(source, store.folder_of(Path(run), 20))


def test_what_slips_through_the_fence_is_never_loaded(whole: Path, tmp_path: Path) -> None:
    """Start 1 wrote step 20 after start 2 had gone on from step 8: whole by its digests, and of another branch."""
    run = tmp_path / "run"
    finish(run)
    late = tmp_path / "late"
    store.folder_of(run, 20).rename(late)
    for step in store.list_steps(run):
        if step > 8:
            import shutil

            shutil.rmtree(store.folder_of(run, step))
    assert store.list_steps(run) == []  # keep_last had let the early ones go: begin again, as start 2
    ended = run_ranks(run, "--resume", "if-present", "--set", "train.max_steps=8")
    assert ended.codes == [0, 0], ended.out[-2000:]
    late_write(str(run), str(late))
    _, info, skipped = store.find(run, "auto")
    assert info.step == 8
    assert len(skipped) == 1
    assert "after a later attempt had resumed from an earlier step; ignored" in skipped[0]
    out = finish(run)
    assert "skipped" in out
    assert "resumed after step 8" in out
    assert curve(run) == curve(whole)
