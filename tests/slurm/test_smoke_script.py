"""smoke.sbatch says PASS only when everything it claims has happened."""

from __future__ import annotations

from pathlib import Path

import pytest

from mirai_ds.submit import SubmitOptions, plan, read_cluster, render
from tests.slurm.conftest import cluster_file
from tests.slurm.stubs import FakeSlurm

# Stands for the Python of the ranks: trains (writes a checkpoint, then goes on for a while), resumes, compares.
TRAINER = """#!/bin/bash
[ "$3" != compare ] || { echo "compared ${*:4}" >>"$STUB/compared"; exit "${COMPARE:-0}"; }
run=${!#}
echo "$run" >>"$STUB/trained"
case $run in
  */whole) exit "${WHOLE:-0}" ;;
  *) [ ! -e "$run/checkpoints/latest" ] || exit "${RESUME:-0}"
     mkdir -p "$run/checkpoints"
     [ -z "$OVER" ] || exit 0
     echo step >"$run/checkpoints/latest"
     for i in $(seq 500); do /bin/sleep 0.02; done ;;
esac
"""
RANKS = 'while [[ $1 == --* ]]; do shift; done; export SLURM_PROCID=1 SLURM_NTASKS=2; {} exec "$@"'


@pytest.mark.parametrize(
    ("setting", "code", "last"),
    [
        ("", 0, "PASS: killed, resumed, the same curve on 2 nodes, 2 ranks"),
        ("COMPARE=1", 1, "FAIL: the curves differ"),
        ("WHOLE=75", 1, "FAIL: the undisturbed run ended with exit code 75"),
        ("RESUME=1", 1, "FAIL: the resumed run ended with exit code 1"),
        ("OVER=yes", 1, "FAIL: the run with a killed rank ended with exit code 0 (it may have been over before the "
                        "kill: give more steps)"),
    ],
)  # fmt: skip
def test_verdict(setting: str, code: int, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, run = tmp_path / "trainer", tmp_path / "smoke run"
    trainer.write_text(TRAINER)
    trainer.chmod(0o755)
    cluster = read_cluster(cluster_file(tmp_path, more=f"python: {trainer}\n"))
    job = plan(SubmitOptions("digits-mirai-e", template="smoke", nodes=2, run_dir=run), cluster)
    slurm = FakeSlurm(tmp_path / "stub")
    if setting:
        monkeypatch.setenv(*setting.split("="))
    text = render(job, cluster, tmp_path / "x.sbatch")
    for _ in range(2):  # what an earlier smoke test has left does not count
        slurm.set(RANKS.format(""))
        ran = slurm.run(text)
        assert (ran.code, ran.out.splitlines()[-1]) == (code, last), ran.out
    if not code:
        assert (slurm.folder / "compared").read_text() == f"compared {run}/whole {run}/killed\n"
        trained = (slurm.folder / "trained").read_text().splitlines()
        assert trained == [f"{run}/whole", f"{run}/killed", f"{run}/killed"]
    assert ran.requeued == []
