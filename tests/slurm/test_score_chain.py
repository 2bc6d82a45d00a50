"""From `mirai-ds submit` to a row of a table on a real Slurm: train, draw, judge, each after the other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mirai_ds.cli.main import main
from mirai_ds.config import load
from mirai_ds.paper import measured
from mirai_ds.paper.catalogue import TableRow
from mirai_ds.paper.published import Row
from mirai_ds.runs.configuration import read_run_config
from tests.eval.conftest import random_state
from tests.eval.judges import digits, saved
from tests.slurm.conftest import Slurm, cluster_file, log_of, settings

pytestmark = pytest.mark.slurm


def test_a_submitted_run_gets_its_row(slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second job waits in the queue from the first on, when there is no run yet to draw from."""
    run, file = tmp_path / "run", cluster_file(tmp_path)
    reference, inception = saved(tmp_path / "ref.npz", digits(30)), tmp_path / "inception.pth"
    torch.save(random_state(), inception)
    trained = slurm.submit("digits-mirai-e", *settings("train.max_steps=2"), "--nodes", "2", "--run-dir", str(run),
                           "--cluster", file)[0]  # fmt: skip
    asked = ["--template", "sample_evaluate", "--nodes", "2", "--dependency", f"afterok:{trained}", "--cluster", file]
    asked += ["--run-dir", str(tmp_path / "drawing"), "--reference", str(reference), "--inception", str(inception)]
    asked += ["--", "--num", "20", "--cfg", "1.5", "--out", str(tmp_path / "drawn.npz")]
    judged = slurm.submit(str(run), *asked)[0]
    assert slurm.wait(trained)["JobState"] == "COMPLETED", log_of(run)
    assert slurm.wait(judged)["JobState"] == "COMPLETED", log_of(tmp_path / "drawing")
    with np.load(tmp_path / "drawn.npz") as drawn:
        assert len(drawn["arr_0"]) == 20
    scores = json.loads((run / "evaluations" / "drawn.json").read_text())

    tiny = Row(label="tiny", recipe="digits-mirai-e")
    row = TableRow("1", tiny, "digits-mirai-e", 2, True, None, ())
    config = read_run_config(run)
    monkeypatch.setattr(measured, "rows_of", lambda _: [row])
    monkeypatch.setattr(measured, "load", lambda name: config if name == row.recipe else load(name))
    (found,) = measured.measure("1", [run]).rows
    assert (found.status, found.other) == ("other protocol", 1)
    monkeypatch.setattr("mirai_ds.paper.measured.protocol_differences", lambda *_: [])  # of 20 digits
    said = CliRunner().invoke(main, ["table", "1", str(run), "--csv", str(tmp_path / "table.csv")])
    assert said.exit_code == 0, said.output
    (line,) = (tmp_path / "table.csv").read_text().splitlines()[1:]
    assert f",measured,1,,,{scores['fid']}," in line
    assert CliRunner().invoke(main, ["report", str(run), "--out", str(tmp_path / "page.html")]).exit_code == 0
    assert "drawn" in (tmp_path / "page.html").read_text()
