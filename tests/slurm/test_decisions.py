"""What train.sbatch does when its ranks have ended: by the outcome file and the job's state, never by exit codes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from mirai_ds.submit import SubmitOptions, plan, read_cluster, render
from tests.slurm.conftest import cluster_file
from tests.slurm.stubs import FakeSlurm

RUNNING, BEING_ENDED, TIME_LIMIT = "RUNNING None", "COMPLETING None", "COMPLETING TimeLimit"
SAY = 'echo "{}" >"$MIRAI_DS_OUTCOME"; exit {}'


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    return FakeSlurm(tmp_path / "stub")


@pytest.fixture
def script(tmp_path: Path) -> str:
    """train.sbatch with the run folder `tmp_path`/run.  Its Python is none: PATH keeps the stubs first."""
    cluster = read_cluster(cluster_file(tmp_path, more="python: python\n"))
    job = plan(SubmitOptions("digits-baseline", nodes=2, run_dir=tmp_path / "run"), cluster)
    return render(job, cluster, tmp_path / "x.sbatch")


@pytest.mark.parametrize(
    ("ranks", "state", "code", "requeued"),
    [
        (SAY.format("finished at step 9", 0), RUNNING, 0, False),
        (SAY.format("finished at step 9", 143), RUNNING, 0, False),  # the exit code does not matter
        (SAY.format("stopped by a stop file", 0), RUNNING, 0, False),
        (SAY.format("failed data.path: no such file", 2), RUNNING, 1, False),
        (SAY.format("failed data.path: no such file", 0), RUNNING, 1, False),
        (SAY.format("requeue SIGUSR1 at step 120", 75), RUNNING, 75, True),
        (SAY.format("requeue SIGUSR1 at step 120", 0), RUNNING, 75, True),
        (SAY.format("requeue SIGUSR1 at step 120", 1), RUNNING, 75, True),
        ("exit 137", RUNNING, 75, True),  # died without a word
        ("exit 0", RUNNING, 75, True),
        (": >\"$MIRAI_DS_OUTCOME\"; exit 0", RUNNING, 75, True),  # a torn file says nothing
        (SAY.format("requeue SIGTERM at step 5", 75), TIME_LIMIT, 75, True),
        ("exit 143", TIME_LIMIT, 75, True),
        (SAY.format("requeue SIGTERM at step 5", 75), BEING_ENDED, 75, False),  # scancel, scontrol requeue, preemption
        ("exit 143", BEING_ENDED, 75, False),
        (SAY.format("finished at step 9", 0), BEING_ENDED, 0, False),
    ],
)  # fmt: skip
def test_decision(ranks: str, state: str, code: int, requeued: bool, slurm: FakeSlurm, script: str) -> None:
    slurm.set(ranks, state)
    ran = slurm.run(script)
    assert ran.code == code, ran.out
    assert ran.requeued == (["requeue 7"] if requeued else []), ran.out
    assert len(ran.ranks) == 1


def test_a_finished_run_starts_no_ranks(slurm: FakeSlurm, script: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "outcome").write_text("finished at step 9\n")
    slurm.set("exit 1")
    ran = slurm.run(script)
    assert (ran.code, ran.ranks, ran.requeued) == (0, [], [])
    (tmp_path / "run" / "outcome").write_text("requeue SIGTERM at step 3\n")
    slurm.set(SAY.format("finished at step 9", 0))
    assert len(slurm.run(script).ranks) == 1


def test_an_earlier_start_cannot_speak_for_this_one(slurm: FakeSlurm, script: str, tmp_path: Path) -> None:
    """The run's own file still says what the start before said."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "outcome").write_text("failed long ago\n")
    ran = slurm.run(script, restart=3)
    assert ran.requeued == ["requeue 7"]
    names = {path.name for path in (tmp_path / "run" / "jobs").iterdir()}
    slurm.set(SAY.format("stopped by a stop file", 0))
    assert slurm.run(script, restart=4).code == 0
    assert {path.name for path in (tmp_path / "run" / "jobs").iterdir()} - names == {"outcome-7-4"}


def test_false_starts_end(slurm: FakeSlurm, script: str, tmp_path: Path) -> None:
    """Ranks that cannot begin leave no word: three times, then the job fails.  A start of the trainer counts anew."""
    codes = []
    for restart in range(2):
        slurm.set("exit 127")
        codes.append(slurm.run(script, restart).code)
    started = 'mkdir -p "{0}/incarnations"; echo >"{0}/incarnations/00001.json"; exit 137'.format(tmp_path / "run")
    for restart, ranks in enumerate([started, "exit 127", "exit 127", "exit 127"], start=2):
        slurm.set(ranks)
        ran = slurm.run(script, restart)
        codes.append(ran.code)
    assert codes == [75, 75, 75, 75, 75, 1]
    assert ran.requeued == []
    assert "3 starts in a row ended before the trainer had begun: giving up" in ran.out
    slurm.set("exit 127")
    assert slurm.run(script, restart=6).ranks == []  # requeued by somebody all the same
    assert slurm.run(script, restart=0, job=8).code == 75  # a new job may try again


def test_a_requeue_that_slurm_refuses(slurm: FakeSlurm, script: str) -> None:
    slurm.set("exit 137", requeue_works=False)
    ran = slurm.run(script)
    assert ran.code == 75  # the next job of a chain goes on
    assert ran.requeued == ["requeue 7"] * 3
    assert "could not be requeued" in ran.out


@pytest.mark.parametrize("then", [BEING_ENDED, ""])
def test_cancelled_while_a_requeue_is_tried(then: str, slurm: FakeSlurm, script: str) -> None:
    """Slurm's controller was busy, and the user has cancelled since: `scontrol requeue` would bring the job back."""
    slurm.set("exit 137", requeue_works=False)
    (slurm.folder / "next-state").write_text(then)
    ran = slurm.run(script)
    assert (ran.code, ran.requeued) == (75, ["requeue 7"]), ran.out


RUNS = ': >"$STUB/running"; until [ -e "$STUB/signalled" ]; do /bin/sleep 0.02; done; '


@pytest.mark.parametrize(
    ("number", "state", "requeued"),
    [
        (signal.SIGUSR1, RUNNING, True),
        (signal.SIGTERM, RUNNING, True),
        (signal.SIGTERM, TIME_LIMIT, True),
        (signal.SIGTERM, BEING_ENDED, False),
    ],
)
def test_signals_reach_the_ranks(
    number: signal.Signals, state: str, requeued: bool, slurm: FakeSlurm, script: str
) -> None:
    slurm.set(RUNS + SAY.format("requeue a signal at step 5", 75), state)
    ran = slurm.run(script, send=(number,))
    assert ran.cancelled[0] == f"--signal={number.name.removeprefix('SIG')} 7.0"
    assert ran.requeued == (["requeue 7"] if requeued else []), ran.out
    assert ran.code == 75
    assert "requeue a signal at step 5" in ran.out  # it waited for the ranks after the signal


def test_a_signal_before_there_are_ranks_is_not_said_to_have_reached_them(slurm: FakeSlurm, script: str) -> None:
    slurm.set(': >"$STUB/running"; /bin/sleep 1; ' + SAY.format("finished at step 9", 0))
    (slurm.folder / "no-step").touch()
    ran = slurm.run(script, send=(signal.SIGUSR1,))
    assert (ran.code, ran.cancelled) == (0, [])
    assert "USR1 received, and no ranks to hand it on to" in ran.out
    assert "handed on" not in ran.out


@pytest.mark.parametrize("state", ["CONFIGURING None", "PREEMPTED None", "CANCELLED None", "COMPLETED None"])
def test_the_states_in_which_a_job_may_come_back(state: str, slurm: FakeSlurm, script: str) -> None:
    slurm.set("exit 137", state)
    assert slurm.run(script).requeued == (["requeue 7"] if state.startswith(("CONF", "PRE")) else [])


def test_a_job_sent_from_a_restarted_one_counts_its_own_starts(slurm: FakeSlurm, script: str, tmp_path: Path) -> None:
    """Slurm leaves the variable of the sender in place: a first start would not forget the false starts before it."""
    (tmp_path / "run" / "jobs").mkdir(parents=True)
    (tmp_path / "run" / "jobs" / "false-starts").write_text("3 0\n")
    slurm.set(SAY.format("finished at step 9", 0))
    ran = slurm.run(script, restart=0, inherited=4)
    assert (ran.code, len(ran.ranks)) == (0, 1), ran.out
    assert "mirai-ds job 7, start 1: " in ran.out
    assert (tmp_path / "run" / "jobs" / "outcome-7-0").exists()


def test_at_the_time_limit_it_requeues_before_the_ranks_are_gone(slurm: FakeSlurm, script: str) -> None:
    """They may hang, and KillWait takes the script with them."""
    slurm.set(': >"$STUB/running"; until [ -e "$STUB/scontrol.calls" ]; do /bin/sleep 0.02; done', TIME_LIMIT)
    ran = slurm.run(script, send=(signal.SIGTERM,))
    assert ran.requeued == ["requeue 7"]
    assert ran.code == 75


@pytest.fixture
def array(tmp_path: Path) -> str:
    """array.sbatch of two rows."""
    table = tmp_path / "table.txt"
    table.write_text(
        "# ablation\n\ndigits-baseline --set 'name=one'   # the first\n"
        f"digits-mirai-e --run-dir '{tmp_path}/the second' --set foresight.num_heads=2\n"
    )
    cluster = read_cluster(cluster_file(tmp_path, more="python: python\n"))
    job = plan(SubmitOptions(str(table), template="array", nodes=2, at_once=1, run_dir=tmp_path / "table"), cluster)
    return render(job, cluster, tmp_path / "x.sbatch")


def test_array_tasks_have_their_own_run(slurm: FakeSlurm, array: str, tmp_path: Path) -> None:
    assert "#SBATCH --array=0-1%1\n" in array
    slurm.set(SAY.format("finished at step 9", 0))
    ran = slurm.run(array, array_task=1)
    assert ran.code == 0, ran.out
    assert ran.ranks == [["--kill-on-bad-exit=1", "python", "-m", "mirai_ds", "train", "digits-mirai-e", "--set",
                          "foresight.num_heads=2", "--resume", "if-present", "--run-dir",
                          f"{tmp_path}/the second"]]  # fmt: skip
    assert (tmp_path / "the second" / "jobs" / "outcome-7_1-0").exists()
    assert ran.out.startswith("mirai-ds job 7_1, start 1: ")
    assert slurm.run(array, array_task=5).code == 1


def test_a_row_speaks_of_itself_alone(slurm: FakeSlurm, array: str) -> None:
    """Slurm gives the row that starts last the id of the whole array: to Slurm 7 would be all rows."""
    slurm.set(RUNS + SAY.format("requeue SIGUSR1 at step 5", 75))
    squeue = "#!/bin/bash\necho RUNNING None; [[ $* = *--jobs=7_1\\ * ]] || echo RUNNING None\n"
    (slurm.folder / "bin" / "squeue").write_text(squeue)
    ran = slurm.run(array, array_task=1, send=(signal.SIGUSR1,))
    assert (ran.code, ran.cancelled, ran.requeued) == (75, ["--signal=USR1 7_1.0"], ["requeue 7_1"]), ran.out


def test_extraction_is_requeued_at_the_warning(slurm: FakeSlurm, tmp_path: Path) -> None:
    cluster = read_cluster(cluster_file(tmp_path, more="python: python\n"))
    arguments = ("--images", "my images", "--size", "32", "--out", "o u t")
    job = plan(SubmitOptions("images", template="extract", nodes=2, arguments=arguments, check=False), cluster)
    text = render(job, cluster, tmp_path / "x.sbatch")
    slurm.set(': >"$STUB/running"; until [ -e "$STUB/scontrol.calls" ]; do /bin/sleep 0.02; done')
    ran = slurm.run(text, send=(signal.SIGUSR1,))
    assert ran.requeued == ["requeue 7"]
    assert ran.ranks == [["python", "-m", "mirai_ds", "extract", "images", *arguments]]
    slurm.set("exit 2")
    ran = slurm.run(text)
    assert (ran.code, ran.requeued) == (2, [])


@pytest.mark.parametrize(("ranks", "code", "steps"), [("exit 0", 0, 2), ("exit 2", 2, 1)])
def test_many_images_are_judged_when_they_are_there(
    ranks: str, code: int, steps: int, slurm: FakeSlurm, tmp_path: Path
) -> None:
    cluster = read_cluster(cluster_file(tmp_path, more="python: python\n"))
    arguments = ("--num", "10", "--out", "x.npz")
    judged = {"check": False, "reference": Path("ref.npz"), "inception": Path("i.pth")}
    job = plan(SubmitOptions("runs/x", template="sample_evaluate", nodes=2, arguments=arguments, **judged), cluster)
    slurm.set(ranks)
    ran = slurm.run(render(job, cluster, tmp_path / "x.sbatch"))
    drawing = ["python", "-m", "mirai_ds", "sample", "runs/x", *arguments]
    judging = ["--ntasks=1", "--nodes=1", "python", "-m", "mirai_ds", "evaluate", "x.npz", "ref.npz"]
    judging += ["--weights", "i.pth", "--json", "runs/x/evaluations/x.json"]
    assert ran.code == code, ran.out
    assert ran.ranks == [drawing, judging][:steps]
    slurm.set(': >"$STUB/running"; until [ -e "$STUB/scontrol.calls" ]; do sleep 1; done')
    ran = slurm.run(render(job, cluster, tmp_path / "x.sbatch"), send=(signal.SIGUSR1,))
    assert ran.requeued == ["requeue 7"], ran.out
