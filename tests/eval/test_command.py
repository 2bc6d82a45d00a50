"""`mirai-ds evaluate` on handwritten digits: real halves are close, noise is far; mistakes are one line and exit 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from mirai_ds.cli.main import main
from tests.eval.judges import digits, saved


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "weights.pth"
    torch.save(timm.create_model("resnet10t", num_classes=0).state_dict(), path)
    return path


def test_more_noise_is_further_away(timm_file: Path, tmp_path: Path) -> None:
    """50 digits against 50 others, clean and with 20 and 80 grey levels of noise; even a random network sees that."""
    folder = tmp_path / "reference"
    folder.mkdir()
    for i, image in enumerate(digits(50)):
        Image.fromarray(image).save(folder / f"{i}.png")
    rows = []
    for noise in (0, 20, 80):
        samples = saved(tmp_path / f"noise{noise}.npz", digits(50, start=50, noise=noise))
        target = tmp_path / "evaluations" / f"noise{noise}.json"
        features = f"timm:resnet10t:{timm_file}"
        result = run(samples, folder, "--features", features, "--cache", tmp_path / "cache", "--json", target)
        assert result.exit_code == 0, result.output
        rows.append(json.loads(target.read_text()))
        assert f"Frechet distance   {rows[-1]['frechet_distance']:.6f}" in result.output
    near, middle, far = (row["frechet_distance"] for row in rows)
    assert middle > 3 * near
    assert far > 3 * middle
    assert rows[0]["precision"] > 0.8 > 0.2 > rows[2]["precision"]
    assert rows[0]["recall"] > 0.8 > 0.2 > rows[2]["recall"]
    assert [row["protocol"]["origin"]["reference"].split(":")[0] for row in rows[1:]] == ["cached", "cached"]
    wanted = {"fid", "sfid", "inception_score", "precision", "recall", "num_samples", "samples_sha256", "protocol"}
    assert wanted | {"reference", "frechet_distance", "samples"} == rows[0].keys()
    assert rows[0]["reference"].keys() == {"name", "sha256", "standard"}


@pytest.mark.matrix
def test_inception_sees_it_too(inception_file: Path, tmp_path: Path) -> None:
    """All metrics by the command with a random Inception: two halves of the digits, and one with noise.

    40 images in 2023 dimensions: most of sFID is how few they are (0.57 clean, 0.73 with noise, measured).
    """
    reference, found = saved(tmp_path / "r.npz", digits(40)), []
    for noise in (0, 80):
        samples = saved(tmp_path / f"s{noise}.npz", digits(40, start=40, noise=noise))
        target = tmp_path / f"{noise}.scores"
        result = run(
            samples, reference, "--weights", inception_file, "--cache", tmp_path, "--exact-pr", "--json", target
        )
        assert result.exit_code == 0, result.output
        found.append(json.loads(target.read_text()))
    clean, noisy = found
    assert noisy["fid"] > 3 * clean["fid"] > 0
    assert noisy["sfid"] > 1.1 * clean["sfid"] > 0
    assert clean["precision"] > noisy["precision"] + 0.3
    assert clean["recall"] > noisy["recall"] + 0.3
    assert 1 <= clean["inception_score"] < 1.1  # random classes: hardly told apart
    assert clean["frechet_distance"] is None
    assert "the Inception file's digest is not the published one's" in clean["protocol"]["departures"]


def test_mistakes_are_one_line(inception_file: Path, timm_file: Path, tmp_path: Path) -> None:
    samples, reference = saved(tmp_path / "s.npz", digits(5)), saved(tmp_path / "r.npz", digits(5))
    pair = (samples, reference)
    timm_features = ("--features", f"timm:resnet10t:{timm_file}")
    for arguments, part in (
        (pair, "--weights: give the Inception network's weights (the file is pt_inception"),
        ((*pair, "--weights", tmp_path / "none.pth"), "none.pth: no such file; the file is pt_inception"),
        ((*pair, "--weights", inception_file, *timm_features), "--weights and --features"),
        ((*pair, "--features", "timm:resnet10t"), "write timm:NAME:FILE"),
        ((*pair, "--features", "clip:a:b"), "write timm:NAME:FILE"),
        ((*pair, *timm_features, "--metrics", "fid,kid"), "'kid' is unknown; use some of fid,sfid,is,pr"),
        ((*pair, *timm_features, "--metrics", "sfid"), "'sfid' is not defined with timm:resnet10t"),
        ((*pair, *timm_features, "--device", "gpu"), "--device gpu: use auto, cpu, cuda or cuda:N"),
        ((*pair, *timm_features, "--device", "cuda:99"), "--device cuda:99: this machine has"),
        ((*pair, *timm_features, "--json", samples), "is an input; give another name"),
        ((*pair, *timm_features, "--json", tmp_path), "is a folder"),
        ((*pair, *timm_features, "--json", samples / "x.json"), "its folder cannot be made"),
        ((tmp_path / "none.npz", reference, *timm_features), "none.npz: no such file or folder"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert result.output.startswith("mirai-ds: error: "), result.output
        assert part in result.output
        assert result.output.count("\n") == 1
    for text in ("{}", "[3, 1, 4]", '{"cfg_scale": 1.5}', "no JSON"):
        (tmp_path / "s.json").write_text(text)
        assert "holds no scores" in run(*pair, *timm_features, "--json", tmp_path / "s.json").output
        assert (tmp_path / "s.json").read_text() == text
    (tmp_path / "s.json").unlink()
    for _ in range(2):  # scores are written again, and are no record of the samples
        again = run(*pair, *timm_features, "--json", tmp_path / "s.json")
        assert again.exit_code == 0, again.output
        assert "unknown: no record" in again.output


def test_too_few_images_are_named(timm_file: Path, tmp_path: Path) -> None:
    few, many = saved(tmp_path / "s.npz", digits(1)), saved(tmp_path / "r.npz", digits(5))
    result = run(few, many, "--features", f"timm:resnet10t:{timm_file}")
    assert (result.exit_code, "at least 2" in result.output) == (2, True)
    assert np.load(few)["arr_0"].shape == (1, 32, 32, 3)
