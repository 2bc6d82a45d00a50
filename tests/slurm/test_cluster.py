"""Jobs on a real Slurm of three nodes: they end, are warned, requeued, killed, cancelled, and learn the same."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.slurm.conftest import Slurm, cluster_file, log_of, settings, steps, until
from tests.train.conftest import numbers

pytestmark = pytest.mark.slurm


def train(slurm: Slurm, run: Path, *options: str, **cluster: int) -> str:
    """Submit the small recipe on two nodes; the job's id."""
    run.parent.mkdir(parents=True, exist_ok=True)
    arguments = [
        "digits-mirai-e",
        *settings("train.max_steps=24"),
        "--nodes",
        "2",
        "--partition",
        "gpu",
        "--run-dir",
        str(run),
    ]
    return slurm.submit(*arguments, "--cluster", cluster_file(run.parent, **cluster), *options)[0]


def same_losses(run: Path, whole: Path) -> None:
    """The run's log is, to the last digit, that of the uninterrupted one."""
    assert [record["step"] for record in numbers(whole)] == list(range(1, 25))
    assert numbers(run) == numbers(whole)


def test_finishes(slurm: Slurm, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "it's a run"  # quotes and spaces all the way down
    job = slurm.wait(train(slurm, run))
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), log_of(run)
    assert (run / "outcome").read_text().startswith("finished")
    same_losses(run, whole)
    again = slurm.try_submit("digits-mirai-e", *settings("train.max_steps=24"), "--run-dir", str(run), "--cluster",
                             cluster_file(tmp_path))  # fmt: skip
    assert again.code == 2
    assert "this run is finished" in again.err


def test_options_of_the_site_reach_slurm(slurm: Slurm, tmp_path: Path) -> None:
    """sbatch reads the value as it was given, srun takes its options, and setup lines are done on every node."""
    value, seen = 'a "b" \'c\' #d \\e $HOME `f` $(g) \\"', tmp_path / "seen"
    more = "\n".join([
        "sbatch: " + json.dumps({"comment": value, "nice": 5, "hold": True}), "srun: [--label]",
        "setup: " + json.dumps([f"echo ${{SLURM_PROCID:-script}} $(hostname) >>{seen}"]), "",
    ])  # fmt: skip
    run = tmp_path / "run"
    arguments = ["digits-mirai-e", *settings("train.max_steps=2"), "--nodes", "2", "--run-dir", str(run)]
    job_id = slurm.submit(*arguments, "--cluster", cluster_file(tmp_path, more=more))[0]
    held = slurm("scontrol", "show", "job", job_id)
    assert re.search(r"Comment=(.*)", held)[1].strip() == value  # type: ignore[index]
    assert "Reason=JobHeldUser" in held
    assert "Nice=5" in held
    slurm("scontrol", "release", job_id)
    assert slurm.wait(job_id)["JobState"] == "COMPLETED", log_of(run)
    assert re.search(r"^0: ", log_of(run), re.MULTILINE)  # --label
    said = [line.split() for line in seen.read_text().splitlines()]
    assert sorted(who for who, _ in said) == ["0", "0", "1"]  # the script, whose number is 0 too, and both ranks
    assert len({node for _, node in said}) == 2


def test_warned_before_the_time_limit(slurm: Slurm, whole: Path, tmp_path: Path) -> None:
    """Slurm itself sends USR1; the ranks save, the job requeues itself and goes on."""
    run = tmp_path / "run"
    job_id = train(slurm, run, "--time", "0:02:00", signal_seconds=30)
    until(lambda: steps(run) >= 8, 120, lambda: log_of(run))
    slurm("scancel", "--signal=STOP", f"{job_id}.0")  # so that it cannot be over before the warning
    until(lambda: "USR1 received" in log_of(run), 120, lambda: log_of(run))
    slurm("scancel", "--signal=CONT", f"{job_id}.0")
    job = slurm.wait(job_id, timeout=500)
    assert job["JobState"] == "COMPLETED", log_of(run)
    assert int(job["Restarts"]) >= 1
    assert "requeue SIGUSR1 at step" in log_of(run)
    same_losses(run, whole)


@pytest.mark.parametrize("how", ["usr1", "requeue"])
def test_requeued(how: str, slurm: Slurm, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job_id = train(slurm, run)
    until(lambda: steps(run) >= 8, 120, lambda: log_of(run))
    if how == "usr1":
        slurm("scancel", "--batch", "--signal=USR1", job_id)
    else:
        slurm("scontrol", "requeue", job_id)
    job = slurm.wait(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log_of(run)
    assert "resumed after step" in log_of(run)
    same_losses(run, whole)


def test_cancelled_stays_cancelled(slurm: Slurm, tmp_path: Path) -> None:
    """`scontrol requeue` brings even a cancelled job back, and a script that requeues itself calls it."""
    run = tmp_path / "run"
    job_id = train(slurm, run)
    until(lambda: steps(run) >= 2, 120, lambda: log_of(run))
    slurm("scancel", job_id)
    job = slurm.wait(job_id)
    time.sleep(8)  # longer than a requeued job waits
    job = slurm.job(job_id)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), log_of(run)
    assert (run / "outcome").read_text().startswith("requeue")


def test_a_node_whose_daemon_died_is_fenced_off(slurm: Slurm, whole: Path, tmp_path: Path) -> None:
    """Slurm thinks the node is lost and requeues the job; its ranks live on, on the same file system."""
    run = tmp_path / "run"
    job_id = train(slurm, run)
    until(lambda: steps(run) >= 8, 120, lambda: log_of(run))
    job = slurm.job(job_id)
    slurm("scancel", "--signal=STOP", f"{job_id}.0")  # they wake up when the new start has taken the run
    pids = [one for start in (run / "incarnations").glob("*.json") for one in [json.loads(start.read_text())["pid"]]]
    assert len(pids) == 1
    first = job["BatchHost"]
    slurm.cluster("cut-node", first)
    try:
        until(lambda: (run / "incarnations" / "00002.json").exists(), 200, lambda: log_of(run))
        slurm.cluster("on", first, "pkill", "-CONT", "-f", "mirai_ds")
        job = slurm.wait(job_id)
    finally:
        slurm.cluster("heal-node", first)
    assert job["JobState"] == "COMPLETED", log_of(run)
    same_losses(run, whole)
    starts = sorted(json.loads(p.read_text())["number"] for p in (run / "incarnations").glob("*.json"))
    assert starts == [1, 2]


@pytest.mark.parametrize("which", ["a rank's", "the script's"])
def test_a_node_dies(which: str, slurm: Slurm, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job_id = train(slurm, run)
    until(lambda: steps(run) >= 8, 120, lambda: log_of(run))
    job = slurm.job(job_id)
    names = slurm("scontrol", "show", "hostnames", job["NodeList"]).split()
    lost = next(name for name in names if (name == job["BatchHost"]) == (which == "the script's"))
    slurm.cluster("kill-node", lost)
    try:
        job = slurm.wait(job_id)
    finally:
        slurm.cluster("start-node", lost)
    assert job["JobState"] == "COMPLETED", log_of(run)
    assert int(job["Restarts"]) >= 1
    assert lost not in slurm("scontrol", "show", "hostnames", job["NodeList"]).split()
    same_losses(run, whole)


def test_preempted(slurm: Slurm, whole: Path, tmp_path: Path) -> None:
    """A job of a partition of higher priority takes all nodes for a while; Slurm requeues the run by itself."""
    run = tmp_path / "run"
    job_id = train(slurm, run)
    until(lambda: steps(run) >= 8, 120, lambda: log_of(run))
    slurm("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    job = slurm.wait(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log_of(run)
    assert "left to Slurm" in log_of(run)
    same_losses(run, whole)


def test_a_mistake_is_not_requeued(slurm: Slurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job_id = train(slurm, run, "--no-check", "--set", "data.source=npz", "--set", "data.path=/no/such.npz",
                   "--set", "data.held_out_fraction=0.1")  # fmt: skip
    job = slurm.wait(job_id)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "1:0", "0"), log_of(run)
    assert "failed" in log_of(run)
    assert "/no/such.npz" in log_of(run)


def test_a_python_that_is_not_there(slurm: Slurm, tmp_path: Path) -> None:
    """Nobody can write an outcome: the job is not requeued for ever."""
    run = tmp_path / "run"
    file = cluster_file(tmp_path, more="python: /no/such/python\n")
    job_id = slurm.submit("digits-mirai-e", "--nodes", "2", "--run-dir", str(run), "--cluster", file)[0]
    job = slurm.wait(job_id)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "1:0", "2"), log_of(run)
    assert "3 starts in a row ended before the trainer had begun" in log_of(run)


def test_ranks_that_hang_at_the_time_limit(slurm: Slurm, tmp_path: Path) -> None:
    """They are killed, and so is the script; it has asked for the next start before that."""
    run, rank = tmp_path / "run", tmp_path / "rank"
    rank.write_text(
        '#!/bin/bash\n[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || { echo finished >"$MIRAI_DS_OUTCOME"; exit 0; }\n'
        'trap "" TERM USR1\nwhile :; do sleep 1; done\n'
    )
    rank.chmod(0o755)
    file = cluster_file(tmp_path, signal_seconds=1, more=f"python: {rank}\n")
    job_id = slurm.submit(
        "digits-mirai-e", "--nodes", "2", "--time", "0:01:00", "--run-dir", str(run), "--cluster", file
    )[0]
    job = slurm.wait(job_id)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log_of(run)
    assert "requeued: the time limit" in log_of(run)


def test_chain(slurm: Slurm, tmp_path: Path) -> None:
    """The second waits for the first, and has nothing left to do."""
    run = tmp_path / "run"
    ids = slurm.submit("digits-mirai-e", *settings("train.max_steps=2"), "--nodes", "2", "--run-dir", str(run),
                       "--chain", "2", "--cluster", cluster_file(tmp_path))  # fmt: skip
    assert len(ids) == 2
    assert slurm.job(ids[1])["Dependency"].startswith(f"afterany:{ids[0]}")
    assert slurm.wait(ids[0])["JobState"] == "COMPLETED", log_of(run)
    second = slurm.wait(ids[1])
    assert (second["JobState"], second["ExitCode"]) == ("COMPLETED", "0:0")
    assert "finished already: nothing to do" in log_of(run)
    assert steps(run) == 2


def test_array(slurm: Slurm, tmp_path: Path) -> None:
    """An ablation: a line a run, two at a time, each in its own folder."""
    file = cluster_file(tmp_path)
    options = " ".join(settings("train.max_steps=2"))
    lines = [f"digits-mirai-e {options} --set name={name} --set output_dir={tmp_path}" for name in ("one", "two")]
    lines[1] += " --set foresight.num_heads=2"
    (tmp_path / "table.txt").write_text("# two rows\n" + "\n".join(lines) + "\n")
    arguments = [
        str(tmp_path / "table.txt"),
        "--template",
        "array",
        "--nodes",
        "2",
        "--at-once",
        "1",
        "--cluster",
        file,
    ]
    job_id = slurm.submit(*arguments, "--run-dir", str(tmp_path / "table"))[0]
    until(lambda: all((tmp_path / name / "outcome").exists() for name in ("one", "two")), 200,
          lambda: log_of(tmp_path / "table"))  # fmt: skip
    slurm.wait(f"{job_id}_1")
    heads = []
    for task, name in enumerate(("one", "two")):
        assert (tmp_path / name / "outcome").read_text() == "finished at step 2\n"
        assert slurm.wait(f"{job_id}_{task}")["JobState"] == "COMPLETED"
        heads.append("num_heads: 2" in (tmp_path / name / "config.yaml").read_text())
    assert heads == [False, True]


def test_extract_and_sample(slurm: Slurm, whole: Path, tmp_path: Path) -> None:
    """The two templates that do not train."""
    source = np.random.default_rng(0)
    for name in "abcd":
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(3):
            pixels = source.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "in" / name / f"{number}.png")
    file, store = cluster_file(tmp_path), tmp_path / "store"
    extract = slurm.submit("images", "--template", "extract", "--nodes", "2", "--cluster", file, "--run-dir",
                           str(tmp_path / "extract"), "--", "--images", str(tmp_path / "in"), "--size", "16",
                           "--out", str(store))[0]  # fmt: skip
    sample = slurm.submit(str(whole), "--template", "sample_evaluate", "--cluster", file, "--run-dir",
                          str(tmp_path / "sample"), "--dependency", f"afterok:{extract}", "--", "--classes", "0,3",
                          "--per-class", "2", "--out", str(tmp_path / "drawn"))[0]  # fmt: skip
    assert slurm.wait(extract)["JobState"] == "COMPLETED", log_of(tmp_path / "extract")
    assert json.loads((store / "manifest.json").read_text())["num_images"] == 12
    assert slurm.wait(sample)["JobState"] == "COMPLETED", log_of(tmp_path / "sample")
    with np.load(tmp_path / "drawn" / "tokens.npz") as drawn:
        assert sorted(drawn["labels"].tolist()) == [0, 0, 3, 3]


def test_smoke(slurm: Slurm, tmp_path: Path) -> None:
    """What a user runs first: two nodes, a rank killed, resumed, compared."""
    job_id = slurm.submit("digits-mirai-e", "--template", "smoke", "--nodes", "2", "--run-dir", str(tmp_path / "smoke"),
                          "--set", "model.dim=48", "--set", "model.n_head=2", "--cluster",
                          cluster_file(tmp_path))[0]  # fmt: skip
    job = slurm.wait(job_id)
    log = log_of(tmp_path / "smoke")
    assert log.splitlines()[-1].startswith("PASS"), log
    assert job["JobState"] == "COMPLETED"
    starts = (tmp_path / "smoke" / "killed" / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["world_size"] for line in starts] == [2, 2]


def test_sbatch_refuses(slurm: Slurm, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = slurm.try_submit("digits-mirai-e", "--partition", "nowhere", "--run-dir", str(run), "--cluster",
                            cluster_file(tmp_path))  # fmt: skip
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "sbatch refused the job: " in done.err
    assert "invalid partition specified: nowhere" in done.err
    assert not run.exists()
