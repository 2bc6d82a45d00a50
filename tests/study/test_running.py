"""A study is planned within a budget, goes on where it was, and refuses what is not its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mirai_ds.cli.main import main
from mirai_ds.config import RunConfig, dump
from mirai_ds.study import running
from mirai_ds.study.arms import (
    ARMS,
    BASELINE,
    STUDIES,
    Planned,
    Study,
    StudyArm,
    choose_arms,
    find_study,
    planned_runs,
    run_config,
)
from mirai_ds.study.costs import compute_spent, run_seconds
from mirai_ds.study.measure import curve
from tests.one_line import one_line

COSTS = {
    arm.name: {"step_ms": 100.0 if arm.name == BASELINE else 200.0, "ratio": 2.0, "aligned_from": 50.0} for arm in ARMS
}
COST = {"step_ms": 1.0, "ratio": 1.0, "ratio_low": 1.0, "ratio_high": 1.0, "flops_ratio": 1.0, "aligned_from": 0.0}
DIGITS = STUDIES["digits"]


@pytest.mark.parametrize("study", STUDIES.values(), ids=list(STUDIES))
def test_arms_differ_in_their_foresight_alone(study: Study, tmp_path: Path) -> None:
    """Same data, order (seed), model, optimizer, average and length."""

    def rest(config: RunConfig) -> dict[str, object]:
        return config.model_dump(exclude={"foresight", "name"})

    baseline = run_config(study, ARMS[0], 3, tmp_path)
    assert baseline.foresight.method == "none"
    for arm in ARMS:
        config = run_config(study, arm, 3, tmp_path)
        assert rest(config) == rest(baseline)
        assert config.name == f"{arm.name}-s3"
        if config.foresight.method == "mirai-e":
            warm = 0.0 if "cold" in arm.name else 15 / 80 * config.train.epochs
            assert config.foresight.warmup_epochs == pytest.approx(warm, rel=1e-5)
    # The paper's average spans 10,000 of 400,320 steps.
    steps = {"digits": 6 * (1438 // 32), "fashion": 2 * 12_800 // 64}[study.name]
    assert 1 / (1 - baseline.ema.decay) == pytest.approx(steps / 40, rel=0.02)


def test_main_arms_come_first_seed_by_seed() -> None:
    names = [p.name for p in planned_runs(DIGITS, list(ARMS), 2)]
    assert names[:5] == ["baseline-s0", "e-official-s0", "e-paper-s0", "i-s0", "baseline-s1"]
    assert names[8] == "e-cold-s0"
    assert len(names) == len(set(names)) == 2 * len(ARMS)
    assert len(planned_runs(DIGITS, list(ARMS), None)) == 4 * DIGITS.main_seeds + 8 * DIGITS.side_seeds


def test_plan_keeps_to_its_budget_and_skips_what_is_done(tmp_path: Path) -> None:
    done = running.runs_folder(tmp_path, Planned(ARMS[0], 0))
    done.mkdir(parents=True)
    (done / running.ROW).write_text("{}")
    whole = running.make_plan(DIGITS, tmp_path, COSTS, list(ARMS), None, None)
    assert [p.name for p in whole.done] == ["baseline-s0"]
    assert len(whole.chosen) == 4 * DIGITS.main_seeds + 8 * DIGITS.side_seeds - 1
    assert whole.left_out == []
    first = whole.chosen[0][1]
    some = running.make_plan(DIGITS, tmp_path, COSTS, list(ARMS), None, first + 1.0)
    assert [p.name for p, _ in some.chosen] == ["e-official-s0"]
    assert len(some.left_out) == len(whole.chosen) - 1
    assert some.seconds <= first + 1.0


def test_costs_count_the_warm_up_as_the_baseline() -> None:
    assert run_seconds(COSTS, "e-official", 264) == pytest.approx((50 * 100 + 214 * 200) / 1000)
    assert compute_spent(COSTS["e-official"], [0, 50, 60]).tolist() == [0.0, 50.0, 70.0]


def test_names() -> None:
    assert [arm.name for arm in choose_arms("mtp")] == ["baseline", "mtp"]
    assert [arm.name for arm in choose_arms("main")] == ["baseline", "e-official", "e-paper", "i"]
    one_line(lambda: choose_arms("e-oficial"), "--arms e-oficial", "e-official")
    one_line(lambda: find_study("digit"), "study 'digit'", "digits")


TINY = """
base: study-digits
model: {dim: 16, n_layer: 2, n_head: 2}
train: {epochs: 0.1}
eval: {loss: {every_steps: 2, max_samples: 20}}
checkpoint: {every_steps: 2}
ema: {decay: 0.5}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Study:
    """Four steps of a tiny model."""
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY, encoding="utf-8")
    return Study("digits", "tiny", str(recipe), 1, 1, samples=40, reference=60, judge_epochs=1, encoder_steps=2)


def test_a_study_goes_on_and_repeats_nothing(tiny: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, said, arms, planned = tmp_path / "study", list[str](), [ARMS[0]], Planned(ARMS[0], 0)
    monkeypatch.setattr(running, "known_costs", lambda *_: COSTS)
    plan = running.run_study(tiny, folder, arms, None, None, None, said.append)
    assert [p.name for p, _ in plan.chosen] == ["baseline-s0"]
    assert said[-1].startswith("baseline-s0: held-out loss")
    run = running.runs_folder(folder, planned)
    row = (run / running.ROW).read_bytes()
    assert json.loads(row)["steps"] == 4
    assert [point.step for point in curve(tiny, planned, run)] == [0, 2, 4]

    # Killed between training and measuring: measured again, to the same row, and not trained again.
    def nothing(*_: object, **__: object) -> None:
        raise AssertionError("repeated")

    monkeypatch.setattr(running.subprocess, "Popen", nothing)
    (run / running.ROW).unlink()
    running.run_study(tiny, folder, arms, None, None, None, said.append)
    assert (run / running.ROW).read_bytes() == row
    monkeypatch.setattr(running, "train", nothing)
    assert running.run_study(tiny, folder, arms, None, None, None, said.append).done == [planned]
    (folder / running.COSTS).write_text(json.dumps({BASELINE: COST}), encoding="utf-8")
    assert [r.arm for r in running.rows_of(folder).runs] == ["baseline"]
    assert len(running.rows_of(folder).curves) == 3


def test_a_run_that_was_under_way_is_resumed(tiny: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the trainer, as a scheduler would; a run that ends in any other way than finished is an error."""
    commands: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **_: object) -> None:
            commands.append(command)

        def wait(self) -> int:
            return 75

    monkeypatch.setattr(running.subprocess, "Popen", Process)
    run = tmp_path / "runs" / "baseline-s0"
    run.mkdir(parents=True)
    (run / "outcome").write_text("requeue SIGTERM\n")
    one_line(lambda: running.train(tiny, Planned(ARMS[0], 0), tmp_path), "requeue SIGTERM", "log.txt", "again")
    assert commands[0][1:3] == ["-m", "mirai_ds.train"]
    at = commands[0].index("--resume")
    assert commands[0][at + 1] == "if-present"
    assert commands[0][commands[0].index("--run-dir") + 1] == str(run)


def test_a_folder_of_another_run(tiny: Study, tmp_path: Path) -> None:
    planned, other = Planned(ARMS[0], 0), StudyArm(BASELINE, "another rate", ("optimizer.lr=1e-5",))
    run = running.runs_folder(tmp_path, planned)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump(run_config(tiny, other, 0, tmp_path)), encoding="utf-8")
    one_line(lambda: running.train(tiny, planned, tmp_path), str(run), "holds a run with other settings", "--folder")


def test_mistakes_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / running.FACTS).write_text('{"study": "digits"}')
    for arguments, said in (
        (["run", "digit"], "study 'digit'"),
        (["plan", "digits", "--arms", "k9"], "--arms k9"),
        (["run", "fashion", "--folder", str(tmp_path / "digits")], "is of the study 'digits'; give another --folder"),
        (["rows", str(tmp_path)], "holds no measured run of a study"),
        (["run", "fashion", "--images", str(tmp_path / "no"), "--folder", str(tmp_path)], "no such folder"),
    ):
        found = CliRunner().invoke(main, ["study", *arguments])
        assert found.exit_code == 2
        assert said in found.output
        assert "Traceback" not in found.output
