"""A rank that dies before there is a collective to fail, and ranks whose launcher, or the command itself, is killed:
the others end, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mirai_ds.checkpoint import store
from mirai_ds.cli.output import world_or_launch
from mirai_ds.runs.outcome import exit_code
from mirai_ds.runtime import processes
from mirai_ds.runtime.processes import Identity, as_parent, start_time, watch_starter
from mirai_ds.runtime.signals import REQUEUE, StopRequests
from tests.fault.faulty_ranks import SETTINGS, run_ranks
from tests.fault.test_kills import assert_same
from tests.marks import rest_by_hand
from tests.waiting import wait_until
from tests.warm_start import start_mirai_ds

PLACES = ["engine.start.start_process_group", "train.agree.agree_on_kernel", "train.build.load_dataset",
          "train.build.TrainEngine", "train.preflight.preflight", "train.loop.train_step"]  # fmt: skip


def die_at(place: str, victim: int) -> None:
    """In a rank: end without a word where `place` is called; the other rank goes on to whatever waits for it."""
    import importlib

    module, _, name = place.rpartition(".")
    owner = importlib.import_module(f"mirai_ds.{module}")

    def gone(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == str(victim):
        setattr(owner, name, gone)


@pytest.mark.parametrize(("place", "victim"), rest_by_hand(
    [(place, victim) for place in PLACES for victim in (0, 1)],
    {(PLACES[0], 1), *((place, number % 2) for number, place in enumerate(PLACES))},  # and both before there is a group
))  # fmt: skip
def test_a_rank_that_dies_early_ends_the_other(tmp_path: Path, place: str, victim: int) -> None:
    """No launcher is there to end it, and none of these places is a collective that would fail by itself."""
    ended = run_ranks(tmp_path / "run", settings=["train.max_steps=2"], prepare=die_at, arguments=(place, victim))
    assert ended.codes[victim] == -signal.SIGKILL
    assert ended.codes[1 - victim] == 1, ended.out[-3000:]
    assert ended.outcome.startswith(f"requeue rank {1 - victim} lost another rank"), ended.outcome
    assert "Traceback" not in ended.out


def hang_before_the_group(signs: Path) -> None:
    """In a rank: the process group never forms for it, as behind a firewall."""
    from mirai_ds.engine import start

    def hang(*_: Any) -> None:
        (signs / f"hangs-{os.environ['RANK']}").touch()
        time.sleep(1000)

    start.start_process_group = hang


def test_a_rank_that_dies_in_a_rendezvous_that_would_wait_for_half_an_hour(tmp_path: Path) -> None:
    def kill_the_second(ranks: list[Any]) -> None:
        wait_until("both ranks wait for their group", lambda: len(list(tmp_path.glob("hangs-*"))) == 2)
        os.kill(ranks[1].pid, signal.SIGKILL)

    ended = run_ranks(tmp_path / "run", prepare=hang_before_the_group, arguments=(tmp_path,), during=kill_the_second)
    assert ended.codes == [1, -signal.SIGKILL]
    assert re.search(r"rank 0: rank 1 is gone \(\S+, pid \d+\)", ended.out)


def never_starts(rank: str) -> None:
    """In that rank: not even its first line."""
    if os.environ["RANK"] == rank:
        time.sleep(1000)


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.parametrize("waiting", [0, 1])
def test_a_rank_that_waits_for_one_that_never_started_can_be_stopped(tmp_path: Path, waiting: int) -> None:
    """With or without the key-value store, which is rank 0's."""

    def stop_it(ranks: list[Any]) -> None:
        wait_until("the rank listens to signals", lambda: catches(ranks[waiting].pid, signal.SIGTERM))
        os.kill(ranks[waiting].pid, signal.SIGTERM)
        ranks[waiting].join(60)
        ranks[1 - waiting].kill()

    ended = run_ranks(tmp_path / "run", prepare=never_starts, arguments=(str(1 - waiting),), during=stop_it)
    assert ended.codes[waiting] == 75, ended.out[-3000:]
    assert ended.outcome == "requeue SIGTERM before all ranks had started\n"


def test_a_port_of_somebody_else_is_told(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        env = {"MASTER_PORT": str(other.getsockname()[1])}
        ended = run_ranks(tmp_path / "run", env=env, during=lambda ranks: ranks[1].kill())
    assert ended.codes[0] == 2, ended.out[-3000:]
    assert re.search(r"rank 0 cannot listen at MASTER_ADDR 127.0.0.1, MASTER_PORT \d+ .*set MASTER_PORT", ended.out)
    assert ended.outcome.startswith("failed rank 0 cannot listen")
    assert "Traceback" not in ended.out


def test_a_rank_alone_needs_no_port(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        env = {"MASTER_PORT": str(other.getsockname()[1])}
        ended = run_ranks(tmp_path / "run", world=1, env=env, settings=["train.max_steps=1"])
    assert ended.codes == [0], ended.out[-3000:]


# --- the command, its launcher, its ranks ----------------------------------------------------------------------------


def family(pid: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def ends_with(everyone: dict[int, str]) -> None:
    """Waits until none of the processes is left, by pid and start time."""
    wait_until("all have ended", lambda: all(start_time(pid) != began for pid, began in everyone.items()))


@pytest.mark.matrix
@pytest.mark.parametrize("victim", ["command", "launcher"])
def test_who_starts_the_ranks_is_killed(tmp_path: Path, victim: str) -> None:
    """An out-of-memory killer, or an editor's stop button: the ranks save after their step and end."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "mirai_ds", *long_run(run)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    everyone = that_train(run, process.pid)
    assert len(everyone) >= 4  # the command, the launcher, two ranks
    launcher = next(pid for pid in everyone if pid != process.pid)
    os.kill(process.pid if victim == "command" else launcher, signal.SIGKILL)
    process.wait(300)
    ended_and_saved(run, everyone)


def test_who_has_forked_the_ranks_is_killed(tmp_path: Path) -> None:
    """The same without a launcher between the command and its ranks."""
    run = tmp_path / "run"
    process = start_mirai_ds(long_run(run), [tmp_path / "out", tmp_path / "err"])
    assert process.pid is not None
    everyone = that_train(run, process.pid)
    assert len(everyone) == 3
    process.kill()
    process.join(300)
    ended_and_saved(run, everyone)


def long_run(run: Path) -> list[str]:
    """What trains for hours."""
    long = ["train.max_steps=100000", "train.epochs=10000", "checkpoint.every_steps=50000",
            "eval.loss.every_steps=null", "sampling.every_steps=null"]  # fmt: skip
    settings = [part for o in (*SETTINGS, *long) for part in ("--set", o)]
    return ["train", "digits-mirai-e", "--run-dir", str(run), "--ranks", "2", *settings]


def that_train(run: Path, command: int) -> dict[int, str]:
    """The processes of a run, by pid and start time, once a step is done."""
    wait_until("a step", lambda: (run / "metrics.jsonl").is_file() and "loss" in (run / "metrics.jsonl").read_text())
    return {pid: start_time(pid) for pid in family(command)}


def ended_and_saved(run: Path, everyone: dict[int, str]) -> None:
    """None of them is left, the step they were in is kept, and why they ended is told."""
    ends_with(everyone)
    (step,) = store.list_steps(run)
    store.verify(store.folder_of(run, step))
    assert (run / "outcome").read_text().startswith("requeue process ")
    assert "is gone" in (run / "outcome").read_text()


def test_a_launcher_that_only_imports_dies_with_the_command(tmp_path: Path) -> None:
    """It takes seconds until it has ranks that could notice."""
    command = [sys.executable, "-m", "mirai_ds", "train", "digits-mirai-e", "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen([*command, "--ranks", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until("the launcher", lambda: len(family(process.pid)) == 2)
    launcher = family(process.pid)[1]
    started = start_time(launcher)
    os.kill(launcher, signal.SIGSTOP)  # as if its imports took for ever
    process.kill()
    process.wait()
    wait_until("the launcher's end", lambda: start_time(launcher) != started)
    assert not (tmp_path / "run").exists()


def test_whose_end_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that is named, by its start time too, and the parent; nobody where no launcher was."""
    told: list[str] = []
    monkeypatch.setattr(processes, "LOOK_SECONDS", 0.02)
    for name in processes._LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    watch_starter(told.append)
    child = subprocess.Popen(["sleep", "1000"])
    monkeypatch.setenv(processes.PARENT, f"{child.pid} {start_time(child.pid)}")
    assert as_parent()[processes.PARENT] == f"{os.getpid()} {start_time(os.getpid())}"
    watch_starter(told.append)
    time.sleep(0.2)
    assert told == []
    child.kill()  # not waited for: a process that is dead already
    wait_until("it is told", lambda: told == [f"process {child.pid}, which started this one, is gone"])
    child.wait()


def test_a_pid_that_is_used_again_is_another_process() -> None:
    me = Identity.of(os.getpid())
    assert not me.is_gone()
    assert Identity(me.host, me.space, me.pid, "1").is_gone()
    assert not Identity("elsewhere", "another boot", me.pid, "1").is_gone()


def test_abandoned_ranks_leave_after_their_step_or_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that hangs does not keep a rank that nobody waits for."""
    monkeypatch.setattr("mirai_ds.runtime.signals.ABANDONED_SECONDS", 0.1)
    left: list[str] = []
    stop = StopRequests()
    stop.leave = left.append  # type: ignore[assignment]
    stop.abandon("process 7, which started this one, is gone")
    assert (stop.kind, stop.poll()) == (REQUEUE, REQUEUE)
    wait_until("it leaves", lambda: left == ["process 7, which started this one, is gone; left within a step"])


@pytest.mark.parametrize("victim", ["the launcher", "a rank"])
def test_who_is_killed_without_a_word_may_start_again(victim: str, tmp_path: Path) -> None:
    """No outcome is written, and launchers say 247 or -9.  When the command has ended nobody is left."""
    command = [sys.executable, "-m", "mirai_ds", "train", "digits-mirai-e", "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen([*command, "--ranks", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until("the command, its launcher, two ranks", lambda: len(family(process.pid)) == 4)
    everyone = {pid: start_time(pid) for pid in family(process.pid)}
    os.kill(list(everyone)[1 if victim == "the launcher" else 3], signal.SIGKILL)
    assert process.wait(300) == 75
    ends_with(everyone)


@pytest.mark.parametrize(
    ("outcome", "launcher", "code"),
    [(None, -9, 75), (None, 247, 75), (None, 0, 0), (None, 1, 1), (None, 2, 2), (("failed", ""), 2, 2),
     (("failed", ""), 0, 1), (("failed", ""), 247, 1), (("requeue", ""), 1, 75), (("finished", ""), 247, 0),
     (("stopped", ""), 1, 0)],
)  # fmt: skip
def test_exit_codes(outcome: Any, launcher: int, code: int) -> None:
    assert exit_code(outcome, launcher) == code


def test_a_rank_of_another_verb_that_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished stays, and a later start does the rest."""
    monkeypatch.setattr("mirai_ds.runtime.launch.launch", lambda *_: 247)
    with pytest.raises(SystemExit) as ended:
        world_or_launch("sample", 2)
    assert ended.value.code == 75


@pytest.mark.parametrize(
    ("seed", "kills"),
    [pytest.param(0, 6, marks=pytest.mark.matrix)]
    + [pytest.param(seed, 30, marks=pytest.mark.exhaustive) for seed in range(1, 11)],
)
def test_kills_of_any_process_at_any_time(
    whole: Path, tmp_path: Path, seed: int, kills: int, record_property: Callable[[str, object], None]
) -> None:
    """The command, its launcher or a rank, from its first instant on: nobody is left after it, nothing is lost, and in
    the end the run is the one that nobody disturbed.  300 kills by hand (`make test-exhaustive`)."""
    source, run, struck, slowest = random.Random(seed), tmp_path / "run", 0, 0.0
    settings = [part for o in (*SETTINGS, "guard.max_restarts=1000") for part in ("--set", o)]
    command = [sys.executable, "-m", "mirai_ds", "train", "digits-mirai-e", "--run-dir", str(run), "--ranks", "2"]
    command += ["--resume", "if-present", *settings]
    while struck < kills:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(source.uniform(0, 12))
        everyone = {pid: start_time(pid) for pid in family(process.pid)}
        victim = source.choice(sorted(everyone))
        if process.poll() is not None:  # it has finished before: begin again
            shutil.rmtree(run)
            continue
        os.kill(victim, signal.SIGKILL)
        began = time.monotonic()
        process.wait(300)
        ends_with(everyone)
        struck, slowest = struck + 1, max(slowest, time.monotonic() - began)
    record_property("slowest_s", round(slowest, 1))
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert_same(run, whole, 24)
