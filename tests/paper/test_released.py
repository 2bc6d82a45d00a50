"""`mirai-ds reproduce`: drawn, judged and compared by stand-ins of the released files' layout."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from mirai_ds.checkpoint.llamagen import write_llamagen
from mirai_ds.cli import reproduce as command
from mirai_ds.cli.main import main
from mirai_ds.config import SIZES, ModelConfig
from mirai_ds.model import GPT
from mirai_ds.paper import released
from mirai_ds.paper.released import check_weights, released_models, verdict
from tests.model import plain_gpt as plain
from tests.one_line import one_line
from tests.warm_start import warm_mirai_ds


def row(fid: float | None, departures: list[str] | None = None, cfg: float | None = 2.0) -> dict[str, Any]:
    """What `evaluate --json` writes, as far as it is read."""
    return {"fid": fid, "protocol": {"departures": departures or [], "sampling": {"cfg_scale": cfg}}}


def test_rows_are_llamagen_s() -> None:
    rows = released_models()
    assert {name: (one.fid, one.cfg_scale) for name, one in rows.items()} == {
        "llamagen-b-256": (5.46, 2.0), "llamagen-b-384": (6.09, 2.0), "llamagen-l-256": (3.80, 2.0),
        "llamagen-l-384": (3.07, 2.0), "llamagen-xl-384": (2.62, 1.75), "llamagen-xxl-384": (2.34, 1.75),
        "llamagen-3b-384": (2.18, 1.65),
    }  # fmt: skip
    for name, one in rows.items():
        _, size, pixels = name.split("-")
        assert (one.size, one.image_size) == (f"GPT-{size.upper()}", int(pixels))
        assert one.size in SIZES
        assert one.file == f"c2i_{size.upper()}_{pixels}.pt"


@pytest.mark.parametrize(
    ("measured", "reproduced", "said"),
    [
        (row(5.50), True, "FID 5.50, LlamaGen's README says 5.46: reproduced, within 0.1"),
        (row(5.37), True, "reproduced"),
        (row(5.60), False, "+0.14, beyond 0.1"),
        (row(5.30), False, "-0.16, beyond 0.1"),
        (row(5.46, ["49 samples"]), False, "not comparable, because\n  49 samples"),
        (row(5.46, cfg=1.5), False, "guidance was 1.5, not 2"),
        (row(5.46, cfg=None), False, "guidance was None, not 2"),
        (row(None), False, "no FID was measured"),
    ],
)
def test_the_verdict(measured: dict[str, Any], reproduced: bool, said: str) -> None:
    judged = verdict("llamagen-b-256", measured)
    assert judged.reproduced is reproduced
    assert said in "\n".join(judged.lines())


def test_the_weights_are_of_the_row(tmp_path: Path) -> None:
    with torch.device("meta"):
        gpt = GPT(ModelConfig(size="GPT-B", vocab_size=16, num_classes=3))
    shapes = {name: value.shape for name, value in gpt.state_dict().items()}
    torch.save({"model": {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}}, tmp_path / "b.pt")
    check_weights(released_models()["llamagen-b-256"], "llamagen-b-256", tmp_path / "b.pt")
    one_line(
        lambda: check_weights(released_models()["llamagen-l-256"], "llamagen-l-256", tmp_path / "b.pt"),
        "b.pt: is a GPT-B, llamagen-l-256 is GPT-L: its file is c2i_L_256.pt",
    )


@pytest.fixture
def files(tmp_path: Path, inception_file: Path, tiny: Path) -> dict[str, Path]:
    """A small model that states its sizes, its codebook, and a reference with stored statistics."""
    model = torch.load(tiny / "weights.pt", weights_only=True)
    config = ModelConfig(size="custom", **plain.TINY)
    write_llamagen(tmp_path / "small.pt", model["model"], info=config.model_dump(mode="json"))
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=images)
    return {
        "weights": tmp_path / "small.pt", "tokenizer": tiny / "book.npz", "reference": tmp_path / "reference.npz",
        "inception": inception_file,
    }  # fmt: skip


def test_the_whole_chain(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = released.Released(file="small.pt", size="custom", image_size=8, cfg_scale=2.0, fid=3.0)
    monkeypatch.setattr(released, "released_models", lambda: {"small": small})
    monkeypatch.setattr(released, "check_weights", lambda *_: None)
    monkeypatch.setattr(released, "EVALUATED_AT", 64)
    given: list[str] = []

    def run(arguments: list[object]) -> None:
        words = [str(argument) for argument in arguments]
        given.append(shlex.join(words))
        done = warm_mirai_ds(*words)
        assert done.code == 0, done.out + done.err

    monkeypatch.setattr(command, "_run", run)
    options = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    asked = ["reproduce", "small", *options, "--num", "5", "--out", str(tmp_path / "out"), "--ranks", "1"]
    result = CliRunner().invoke(main, asked)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    scores = json.loads((tmp_path / "out/small-scores.json").read_text())
    assert scores["protocol"]["sampling"]["cfg_scale"] == 2.0
    assert scores["protocol"]["samples_resolution"] == [64, 64]
    assert (scores["num_samples"], scores["protocol"]["reference_images"]) == (5, 4)
    assert f"small: FID {scores['fid']:.2f}, LlamaGen's README says 3.00: not comparable, because" in result.output
    assert "5 samples; published scores are of 50000" in result.output
    first = (tmp_path / "out/small.npz").read_bytes()
    again = CliRunner().invoke(main, asked)  # what is there is taken, not drawn again
    assert (again.exit_code, again.output) == (1, result.output)
    assert (tmp_path / "out/small.npz").read_bytes() == first
    assert given[:2] == given[2:]


def test_mistakes_come_before_the_work(files: dict[str, Path], tmp_path: Path) -> None:
    options = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    for name, change, said in (
        ("llamagen-b", [], "llamagen-b: is no released model; did you mean 'llamagen-b-"),
        ("llamagen-b-256", ["--tokenizer", str(tmp_path / "none.pt")], "none.pt: no such file; docs/reproducing.md"),
    ):  # fmt: skip
        result = CliRunner().invoke(main, ["reproduce", name, *options, *change, "--out", str(tmp_path / "out")])
        assert result.exit_code == 2
        assert said in result.output
    assert not (tmp_path / "out").exists()
