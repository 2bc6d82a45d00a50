"""`eval.loss.patience`: a run whose held-out loss has stopped falling is told, and finishes early, resumed or not."""

from __future__ import annotations

import json
from pathlib import Path

from mirai_ds.checkpoint import store
from tests.fault.faulty_ranks import Kill, curve, run_ranks

# Weights that do not move in fp32: every measurement after the first lies where the first does.
STILL = ["optimizer.lr=1e-30", "train.precision=fp32", "eval.loss.every_steps=3", "checkpoint.every_steps=3"]
RESUME = ("--resume", "if-present")


def measured(run: Path) -> list[int]:
    return [r["step"] for r in curve(run) if "held_out/ntp_ema" in r]


def test_a_loss_that_stopped_falling_ends_the_run(tmp_path: Path) -> None:
    """Three measurements after the lowest, of step 0: finished at step 9 with checkpoint, report and outcome."""
    run = tmp_path / "run"
    ended = run_ranks(run, *RESUME, settings=[*STILL, "eval.loss.patience=3"])
    assert (ended.codes, ended.outcome.split()[0]) == ([0, 0], "finished"), ended.out[-2000:]
    assert "at step 9" in ended.outcome
    assert measured(run) == [0, 3, 6, 9]
    assert store.list_steps(run)[-1] == 9
    report = json.loads((run / "report.json").read_text())
    assert (report["steps"], report["held_out/ntp_ema"]["lowest_step"]) == (9, 0)
    assert report["held_out/ntp_ema"]["lowest"] == report["held_out/ntp_ema"]["last"]
    assert ended.out.count("the run overfits, or has converged") == 1  # the main rank's alone
    assert "finishes after step 9: 3 measurements above the held-out loss of step 0" in ended.out

    again = run_ranks(run, *RESUME, settings=[*STILL, "eval.loss.patience=3"])
    assert (again.codes, again.outcome.split()[0]) == ([0, 0], "finished"), again.out[-2000:]
    assert measured(run) == [0, 3, 6, 9]


def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path: Path) -> None:
    """Killed at step 7, after two measurements above the lowest: the third ends it."""
    run = tmp_path / "run"
    settings = [*STILL, "eval.loss.patience=3"]
    killed = run_ranks(run, *RESUME, settings=settings, kill=Kill(rank=1, phase="step 7"))
    assert killed.codes != [0, 0]
    ended = run_ranks(run, *RESUME, settings=settings)
    assert "at step 9" in ended.outcome, ended.out[-2000:]
    assert measured(run) == [0, 3, 6, 9]


def test_a_loss_that_falls_ends_nothing(tmp_path: Path) -> None:
    """The digits learn: with patience for one measurement all steps are done, and nobody is warned."""
    run = tmp_path / "run"
    ended = run_ranks(run, *RESUME, settings=["eval.loss.every_steps=6", "eval.loss.patience=1"])
    assert ended.codes == [0, 0], ended.out[-2000:]
    losses = [r["held_out/ntp_ema"] for r in curve(run) if "held_out/ntp_ema" in r]
    assert losses == sorted(losses, reverse=True)
    assert measured(run)[-1] == 24
    assert "overfits" not in ended.out
