"""The encoder sees no masked pixel, both networks come out the same again, and the trainer takes the encoder's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mirai_ds.config.load import load
from mirai_ds.foresight import EncoderTeacher
from mirai_ds.study import networks
from mirai_ds.study.arms import ARMS, Study, encoder_file, run_config
from mirai_ds.study.images import Pixels, digit_pixels
from mirai_ds.study.networks import MaskedPatches, judged, open_judge, pretrain_encoder, train_judge

TINY = Study("digits", "tiny", "study-digits", 1, 1, 10, 60, judge_epochs=2, encoder_steps=2)


def test_masked_pixels_do_not_matter() -> None:
    torch.manual_seed(0)
    model = MaskedPatches(4, 17, 10).eval()
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[:, 5] = True  # cell (1, 1): pixels 2..3 of both axes
    changed = images.clone()
    changed[:, :, 2:4, 2:4] = 255 - changed[:, :, 2:4, 2:4]
    with torch.no_grad():
        first, second = model(images, masked), model(changed, masked)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
        seen = torch.zeros_like(masked)
        seen[:, 6] = True
        assert not torch.equal(model(images, seen)[0], model(changed, seen)[0])


def test_the_trainer_takes_the_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And sees with it what pretraining saw."""
    monkeypatch.setattr(networks, "BATCH", 8)
    monkeypatch.setattr(networks, "PROBED", 16)
    facts = pretrain_encoder(TINY, tmp_path)
    weights = encoder_file(tmp_path).read_bytes()
    assert pretrain_encoder(TINY, tmp_path) == facts
    assert encoder_file(tmp_path).read_bytes() == weights
    arm = next(arm for arm in ARMS if arm.name == "i")
    config = run_config(TINY, arm, 0, tmp_path)
    assert config.foresight.encoder is not None
    teacher = EncoderTeacher(config.foresight.encoder, 8, torch.device("cpu"))
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    model = MaskedPatches(8, 17, 10).eval()
    model.encoder.load_state_dict(teacher.encoder.state_dict())
    with torch.no_grad():
        expected = model.features(images)
    torch.testing.assert_close(teacher.features(torch.zeros(2, 64), torch.zeros(2), images), expected)
    assert expected.shape == (2, 64, 64)


def test_the_judge_learns_and_comes_out_the_same(tmp_path: Path) -> None:
    """Two epochs of 1,438 digits; one in ten would be chance."""
    train, test = digit_pixels(TINY)
    facts = train_judge(TINY, tmp_path, train, test)
    assert 0.5 < float(facts["judge_accuracy"]) < 1.0
    assert train_judge(TINY, tmp_path, train, test) == facts
    features, right = judged(open_judge(tmp_path), test)
    assert features.shape == (359, 64)
    assert right.mean() == facts["judge_accuracy"]
    wrong, _ = judged(open_judge(tmp_path), Pixels(np.zeros_like(test.images), test.labels))
    assert np.ptp(wrong, axis=0).max() == 0.0


def test_digits_are_those_of_the_recipe() -> None:
    train, test = digit_pixels(TINY)
    assert (len(train.labels), len(test.labels)) == (1438, 359)
    assert load(TINY.recipe).data.held_out_fraction == 0.2
