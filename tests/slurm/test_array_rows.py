"""Rows of a job array on a real Slurm: what is done to one of them is done to no other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.conftest import Slurm, cluster_file, log_of, until

pytestmark = pytest.mark.slurm

ROW = """#!/bin/bash
run=${!#}
mkdir -p "$run"
echo start >>"$run/starts"
trap 'echo "requeue a signal" >"$MIRAI_DS_OUTCOME"; exit 75' TERM USR1
until [ -e "$run/finish" ]; do sleep 0.2; done
echo "finished at step 9" >"$MIRAI_DS_OUTCOME"
"""


@pytest.fixture
def rows(slurm: Slurm, tmp_path: Path) -> Iterator[tuple[str, list[Path]]]:
    """An array of three rows that run until they are told to finish: its job id and their folders."""
    (tmp_path / "rank").write_text(ROW)
    (tmp_path / "rank").chmod(0o755)
    runs = [tmp_path / f"run{row}" for row in range(3)]
    (tmp_path / "list.txt").write_text("".join(f"digits-mirai-e --run-dir {run}\n" for run in runs))
    file = cluster_file(tmp_path, signal_seconds=1, more=f"python: {tmp_path}/rank\n")
    job_id = slurm.submit(str(tmp_path / "list.txt"), "--template", "array", "--cluster", file, "--run-dir",
                          str(tmp_path))[0]  # fmt: skip
    until(lambda: starts(runs) == [1, 1, 1], 60, lambda: log_of(tmp_path))
    yield job_id, runs
    slurm("scancel", job_id)


def starts(runs: list[Path]) -> list[int]:
    """How often each row has begun."""
    return [len((run / "starts").read_text().split()) if (run / "starts").exists() else 0 for run in runs]


def states(slurm: Slurm, job_id: str) -> list[tuple[str, str]]:
    """State and restarts of each row."""
    jobs = [slurm.job(f"{job_id}_{row}") for row in range(3)]
    return [(job["JobState"], job["Restarts"]) for job in jobs]


# Slurm gives the id of the array to the row that it starts last.
@pytest.mark.parametrize(
    ("how", "row"),
    [("usr1", 0), ("usr1", 2), ("requeue", 2), ("the time limit", 2), ("the time limit, hanging", 2)],
)
def test_one_row_is_requeued(how: str, row: int, slurm: Slurm, rows: tuple[str, list[Path]]) -> None:
    job_id, runs = rows
    name, wanted = f"{job_id}_{row}", [2 if number == row else 1 for number in range(3)]
    if how == "usr1":
        slurm("scancel", "--batch", "--signal=USR1", name)
    elif how == "requeue":
        slurm("scontrol", "requeue", name)
    else:
        if "hanging" in how:
            slurm("scancel", "--signal=STOP", f"{name}.0")
        slurm("scontrol", "update", f"job={name}", "TimeLimit=1")
    until(lambda: starts(runs) == wanted, 180, lambda: log_of(runs[0].parent))
    for run in runs:
        (run / "finish").touch()
    assert [slurm.wait(f"{job_id}_{number}")["JobState"] for number in range(3)] == ["COMPLETED"] * 3
    assert states(slurm, job_id) == [("COMPLETED", str(count - 1)) for count in wanted], log_of(runs[0].parent)


@pytest.mark.parametrize("cancelled", [{0}, {2}, {0, 1, 2}], ids=str)
def test_cancelled_rows_stay_cancelled(cancelled: set[int], slurm: Slurm, rows: tuple[str, list[Path]]) -> None:
    job_id, runs = rows
    slurm("scancel", *([job_id] if len(cancelled) == 3 else [f"{job_id}_{row}" for row in cancelled]))
    for row in cancelled:
        slurm.wait(f"{job_id}_{row}")
    time.sleep(8)  # longer than a requeued job waits
    wanted = [("CANCELLED" if row in cancelled else "RUNNING", "0") for row in range(3)]
    assert (states(slurm, job_id), starts(runs)) == (wanted, [1, 1, 1]), log_of(runs[0].parent)
