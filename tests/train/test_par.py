"""PAR from the command line: train with Mirai-E on ZeRO-3, sample, export, sample the export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mirai_ds.checkpoint.gpt_file import read_gpt_file
from mirai_ds.checkpoint.llamagen import infer_model_config
from mirai_ds.cli.main import main
from mirai_ds.config.sizes import parameter_count
from mirai_ds.runs.configuration import read_run_config
from tests.train.conftest import records, small_train

PAR = ["model.par_tokens=4", "train.epochs=1", "eval.classifier.enabled=false", "checkpoint.every_steps=44"]
NOTE = "mirai-ds: foresight: targets that are decoded already, kept"


def invoke(*arguments: object) -> None:
    done = CliRunner().invoke(main, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output + done.stderr


@pytest.mark.exhaustive
def test_par_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = small_train(run, *[part for o in PAR for part in ("--set", o)], "--deepspeed", "zero3")
    assert done.code == 0, done.out[-2000:] + done.err[-3000:]
    assert done.out.count(NOTE) == 1
    # 8 at the seams; `wrap` adds one that goes on from the upper regions' last cell to the first of the lower ones.
    assert "down 0 right 1: 9 of 62 (14.5%); down 1 right 0: 8 of 55 (14.5%)" in done.out
    held_out = [r["held_out/ntp_ema"] for r in records(run) if "held_out/ntp_ema" in r]
    assert held_out[0] == pytest.approx(np.log(17), abs=1e-6)
    assert held_out[0] - held_out[-1] > 0.3  # 44 steps: how often each grey level is there
    config = read_run_config(run).model
    choice = ("--per-class", 2, "--classes", "3,8")
    invoke("sample", run, *choice, "--out", tmp_path / "a")
    invoke("export", run, "--weights", "ema", "--out", tmp_path / "e.pt")
    weights = read_gpt_file(tmp_path / "e.pt", "ema").weights
    assert weights["spe_tok_embeddings.special_embeddings.weight"].shape == (3, 64)
    assert sum(value.numel() for value in weights.values()) == parameter_count(config)
    assert infer_model_config(weights, 64, n_head=2).par_tokens == 4
    invoke("sample", tmp_path / "e.pt", "--recipe", run / "config.yaml", *choice, "--out", tmp_path / "b")
    a, b = (np.load(tmp_path / name / "tokens.npz") for name in "ab")
    assert np.array_equal(a["tokens"], b["tokens"])
    assert np.array_equal(a["images"], b["images"])
