"""The main arms on the digits, shortened: alignment does not worsen the held-out loss beyond noise, and Mirai-E's
features are smoother.  `pytest -m study`, about 12 minutes on one core.

Bounds: with three seeds an arm's 95 % interval of the paired difference must reach zero (it is not shown to be worse);
the smoothness' interval must lie above zero.  Both are those of docs/study.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mirai_ds.study.arms import STUDIES, choose_arms
from mirai_ds.study.results import Results
from mirai_ds.study.running import rows_of, run_study

SEEDS = 3
SHORT = """
base: study-digits
train: {epochs: 4}        # 176 steps
eval: {loss: {every_steps: 88}}
ema: {decay: 0.77}        # 1/40 of the run, as in the study
"""


@pytest.mark.study
def test_alignment_on_digits(tmp_path: Path) -> None:
    recipe = tmp_path / "short.yaml"
    recipe.write_text(SHORT, encoding="utf-8")
    study = replace(STUDIES["digits"], recipe=str(recipe), encoder_steps=300)
    run_study(study, tmp_path / "study", choose_arms("main"), SEEDS, None, None, print)
    results = Results(rows_of(tmp_path / "study"), "digits")
    assert all(results.seeds(arm) == [0, 1, 2] for arm in ("baseline", "e-official", "e-paper", "i"))
    for arm in ("e-official", "e-paper", "i"):
        loss = results.difference(arm, "ntp_ema")
        print(arm, "held-out loss", loss, "smoothness", results.difference(arm, "smoothness"))
        assert loss.mean - loss.half <= 0, f"{arm}: worse by {loss.mean:.4f} ± {loss.half:.4f} nats a token"
    for arm in ("e-official", "e-paper"):
        smoothness = results.difference(arm, "smoothness")
        assert smoothness.mean - smoothness.half > 0, f"{arm}: {smoothness}"
