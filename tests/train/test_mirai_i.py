"""Mirai-I through the command line: a frozen timm encoder from a local file watches the digits' images."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from tests.train.conftest import SMALL, numbers, small_train

ARMS = [o for o in SMALL if not o.startswith(("foresight.warmup", "eval", "sampling"))]


def test_mirai_i_trains_against_a_timm_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "encoder.pth"
    torch.save(timm.create_model("test_vit", num_classes=0, img_size=128).state_dict(), weights)  # 8 x 8 patches of 16
    encoder = f"foresight={{method: mirai-i, projector_dim: 64, encoder: {{name: test_vit, weights: {weights}}}}}"
    steps = ["train.max_steps=12", "checkpoint.every_steps=null", "eval.classifier.enabled=false",
             "eval.loss.at_end=false", "eval.loss.every_steps=null", "sampling.at_end=false"]  # fmt: skip
    arms = [o for o in ARMS if not o.startswith("foresight")]
    done = small_train(tmp_path / "run", recipe="digits-baseline", overrides=[*arms, encoder, *steps])
    assert done.code == 0, done.out[-2000:] + done.err[-2000:]
    found = numbers(tmp_path / "run")
    assert [r["step"] for r in found] == list(range(1, 13))
    for r in found:  # one head, weight 2, no warm-up
        assert r["loss/alignment"] == pytest.approx(-2 * r["cosine/head1_down0_right0"], rel=1e-5)
        assert r["loss/total"] == pytest.approx(r["loss/ntp"] + r["loss/alignment"], rel=1e-5)
    assert found[-1]["cosine/head1_down0_right0"] - found[0]["cosine/head1_down0_right0"] > 0.3


def test_a_missing_encoder_file_is_one_line(tmp_path: Path) -> None:
    encoder = "foresight={method: mirai-i, encoder: {name: test_vit, weights: nowhere.pth}}"
    done = small_train(tmp_path / "run", recipe="digits-baseline", overrides=[encoder])
    assert done.code == 2
    here = Path("nowhere.pth").absolute()
    assert done.err.strip() == f"mirai-ds: error: foresight.encoder.weights = '{here}': no such file"
