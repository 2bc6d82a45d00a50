"""Two curves are the same exactly when every value is; what differs is found, named and explained."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mirai_ds.analysis.compare import Point, compare_runs
from mirai_ds.analysis.compare_report import as_json, verdict_text
from mirai_ds.analysis.differences import of_configurations
from mirai_ds.runs.records import Curve, RunRecords
from tests.analysis.fake import changed, cli, curve, write_curve, write_run
from tests.one_line import one_line


def pair(tmp_path: Path, b: list[dict[str, Any]] | None = None, **changes: Any) -> tuple[Path, Path]:
    return write_run(tmp_path / "a"), write_run(tmp_path / "b", b, **changes)


def test_the_same_curve(tmp_path: Path) -> None:
    other = [{**record, "speed/images_per_s": 1.0, "memory/peak_gib": 9.0} for record in curve()]
    a, b = pair(tmp_path, other)
    result = compare_runs(a, b)
    assert verdict_text(result) == "same curve, to the last digit (4 metrics, 8 steps)"
    assert [(m.name, m.points, m.identical) for m in result.metrics] == [
        ("loss/total", 8, True), ("loss/ntp", 8, True), ("optimizer/lr", 8, True), ("held_out/ntp_ema", 2, True),
    ]  # fmt: skip
    assert (result.notes, result.configuration, result.environment, result.prefix) == ([], [], [], None)
    done = cli("compare", a, b)
    assert done.exit_code == 0
    assert done.output.splitlines()[-1] == "same curve, to the last digit (4 metrics, 8 steps)"
    assert "speed" not in done.output


def test_one_digit_of_one_value(tmp_path: Path) -> None:
    value = math.nextafter(3.0 - 5 / 8, 4.0)
    a, b = pair(tmp_path, changed(curve(), 50, loss_total=value))
    result = compare_runs(a, b)
    assert verdict_text(result) == f"different from step 50 on: loss/total, 2.375, {value!r}"
    total = result.metrics[0]
    assert (total.differing, total.first, total.beyond) == (1, Point(50, 2.375, value), Point(50, 2.375, value))
    assert total.largest_absolute is not None
    assert total.largest_absolute.absolute == 2.0**-51
    assert [m.identical for m in result.metrics] == [False, True, True, True]
    assert result.notes == ["settings, versions, code and ranks are the same: nothing that was recorded explains it"]
    assert cli("compare", a, b).exit_code == 1


def test_tolerance_is_of_each_value(tmp_path: Path) -> None:
    """loss/total at step 80 is 2.0, at step 10 2.875."""
    a, b = pair(tmp_path, changed(changed(curve(), 80, loss_total=2.01), 10, loss_total=2.875 * (1 + 1e-4)))
    within = compare_runs(a, b, tolerance=0.005)
    assert within.verdict == "within"
    assert verdict_text(within) == (
        "same curve within 0.005 (largest difference 0.005 of loss/total at step 80; 4 metrics, 8 steps)"
    )
    assert within.worst is not None
    assert within.worst[1].relative == pytest.approx(0.01 / 2.01)
    beyond = compare_runs(a, b, tolerance=0.001)
    assert verdict_text(beyond) == "different from step 80 on: loss/total, 2.0, 2.01"
    assert beyond.metrics[0].first == Point(10, 2.875, 2.875 * (1 + 1e-4))
    assert compare_runs(a, b).first_beyond == ("loss/total", Point(10, 2.875, 2.875 * (1 + 1e-4)), 1)
    assert cli("compare", a, b, "--tolerance", "0.005").exit_code == 0
    assert cli("compare", a, b, "--tolerance", "0.0049").exit_code == 1
    half = write_run(tmp_path / "half", changed(curve(), 80, loss_total=1.0))
    assert compare_runs(a, half, tolerance=0.5).verdict == "within"  # the tolerance itself is allowed
    for bad in (-0.1, 1.0, math.nan):
        one_line(lambda bad=bad: compare_runs(a, b, tolerance=bad), "--tolerance", "at least 0 and less than 1")


def test_largest_differences(tmp_path: Path) -> None:
    """The largest absolute one at step 10, where values are larger; the largest relative one at step 80."""
    a, b = pair(tmp_path, changed(changed(curve(), 80, loss_total=2.025), 10, loss_total=2.905))
    total = compare_runs(a, b).metrics[0]
    assert total.largest_absolute == Point(10, 2.875, 2.905)
    assert total.largest_relative == Point(80, 2.0, 2.025)
    (row,) = [line for line in cli("compare", a, b).output.splitlines() if line.startswith("loss/total  ")][:1]
    assert row.split() == [
        "loss/total", "8", "10:", "2.875,", "2.905", "0.03", "(step", "10)", "0.012", "(step", "80)",
    ]  # fmt: skip


def test_metrics_that_part_at_the_same_step_are_counted(tmp_path: Path) -> None:
    a, b = pair(tmp_path, changed(changed(curve(), 30, loss_total=0.0, optimizer_lr=0.5), 20, loss_ntp=9.0))
    assert verdict_text(compare_runs(a, b)) == "different from step 20 on: loss/ntp, 2.5, 9.0"
    later = compare_runs(a, b, from_step=30)
    assert verdict_text(later) == "different from step 30 on: loss/total, 2.625, 0.0 (and 1 more metric)"
    assert later.steps == [30, 40, 50, 60, 70, 80]
    assert compare_runs(a, b, from_step=31).verdict == "identical"
    assert verdict_text(compare_runs(a, b, metrics=["optimizer/lr"])) == (
        "different from step 30 on: optimizer/lr, 0.001, 0.5"
    )
    assert compare_runs(a, b, metrics=["held_out/ntp_ema"]).verdict == "identical"


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (math.nan, math.nan, True),
        (math.nan, 1.0, False),
        (1.0, math.nan, False),
        (math.inf, math.inf, True),
        (math.inf, -math.inf, False),
        (math.inf, 1.0, False),
        (None, math.nan, True),
        (0.0, 0.0, True),
    ],
)
def test_values_that_are_not_finite(left: Any, right: Any, same: bool, tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", changed(curve(), 40, loss_total=left))
    b = write_run(tmp_path / "b", changed(curve(), 40, loss_total=right))
    result = compare_runs(a, b, tolerance=0.5)
    assert (result.verdict == "identical") == same
    found = json.loads(cli("compare", a, b, "--json").output)
    assert found["verdict"] == ("identical" if same else "different")
    if not same:
        assert result.metrics[0].beyond is not None
        assert result.metrics[0].beyond.relative == math.inf
        assert found["metrics"][0]["largest_relative"]["relative"] == "inf"
    assert cli("compare", a, b).exit_code == (0 if same else 1)


def test_torn_lines(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    write_curve(b, curve(), end='{"step": 90, "epoch": 2.25, "loss/total": 1.')
    result = compare_runs(a, b)
    assert (result.verdict, result.prefix, result.only_b_steps) == ("identical", None, [])
    assert result.notes == ["B: 1 unreadable line left out (line 11)"]
    lines = (a / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[2:2] = [
        b'{"step": 20, "loss/total": 7\n',
        b"[1]\n",
        b'{"step": "20"}\n',
        b"\xff\xfe\n",
        b'{"loss": 1}\n',
        b"\n",
    ]
    (a / "metrics.jsonl").write_bytes(b"".join(lines))
    assert compare_runs(a, b).notes[0] == "A: 5 unreadable lines left out (lines 3, 4, 5, 6, 7)"
    assert compare_runs(a, b).verdict == "identical"


def test_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    a, b = pair(tmp_path, [*changed(curve(), 80, loss_total=5.0), curve()[-2]])
    assert compare_runs(a, b).verdict == "identical"


def test_one_is_the_beginning_of_the_other(tmp_path: Path) -> None:
    a, b = pair(tmp_path, curve(5))
    result = compare_runs(a, b)
    assert (result.prefix, result.only_a_steps, result.only_b_steps) == ("b", [60, 70, 80], [])
    assert "note: B is the beginning of A: it ends at step 50, A at step 80" in cli("compare", a, b).output
    assert compare_runs(b, a).prefix == "a"
    write_curve(b, [r for r in curve(4) if "loss/ntp" in r])  # stopped between the two lines of step 40
    assert compare_runs(a, b, metrics=["loss/total"]).prefix == "b"
    assert compare_runs(a, b).prefix == "b"
    write_curve(b, [*curve(5), {"step": 50, "epoch": 1.25, "held_out/ntp_ema": 2.0}])  # measured at its own end
    assert compare_runs(a, b).prefix is None
    write_curve(b, [r for r in curve(5) if r["step"] != 20])
    hole = compare_runs(a, b)
    assert (hole.verdict, hole.prefix, hole.only_a_steps) == ("identical", None, [20, 60, 70, 80])
    assert "note: only A has 4 steps: 20, 60, 70, 80" in cli("compare", a, b).output
    write_curve(b, changed(curve(5), 30, loss_total=9.0))
    assert compare_runs(a, b).prefix is None


def test_what_only_one_has(tmp_path: Path) -> None:
    a, b = pair(tmp_path, [{**r, "loss/alignment": -1.0} for r in curve() if "loss/ntp" in r])
    result = compare_runs(a, b)
    assert (result.verdict, result.only_a_metrics, result.only_b_metrics) == (
        "identical", ["held_out/ntp_ema"], ["loss/alignment"],
    )  # fmt: skip
    write_curve(b, [{**r, "step": r["step"] + (5 if "held_out/ntp_ema" in r else 0)} for r in curve()])
    apart = compare_runs(a, b)
    assert (apart.never_together, apart.only_b_steps) == (["held_out/ntp_ema"], [45, 85])
    assert "in both, but at no common step: held_out/ntp_ema" in apart.notes


def test_two_seeds_are_judged_by_their_last_quarter(tmp_path: Path) -> None:
    """Means of steps 70 and 80: 2.0625 against 2.0625 * 1.02, one point above and one below."""
    noisy = [{**r, "loss/total": r["loss/total"] * 1.02} if "loss/total" in r else r for r in curve()]
    noisy = changed(changed(noisy, 70, loss_total=2.125 * 1.05), 80, loss_total=2.0 * 0.99)
    a, b = pair(tmp_path, noisy, seed=1)
    result = compare_runs(a, b)
    quarter = result.metrics[0].last_quarter
    assert quarter is not None
    assert (quarter.points, quarter.first_step, quarter.last_step, quarter.mean_a) == (2, 70, 80, 2.0625)
    assert quarter.mean_b == pytest.approx((2.125 * 1.05 + 2.0 * 0.99) / 2)
    assert quarter.shift == pytest.approx(0.0860 / 4.125, rel=1e-2)
    assert quarter.mean_relative_difference == pytest.approx((0.05 / 1.05 + 0.01) / 2)
    assert result.metrics[1].last_quarter is None
    assert result.notes == ["settings that shape the curve differ and explain it: seed"]
    assert "+2.091%" in cli("compare", a, b).output


def test_differences_are_named_and_weighed(tmp_path: Path) -> None:
    other = changed(curve(), 40, loss_total=1.0)
    a = write_run(tmp_path / "a")
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"name": "x", "logging__every_steps": 3, "data__prefetch": 5}, {}, "nothing that was recorded explains it"),
        ({"train__grad_accum_steps": 2}, {"world_size": 4}, "train.grad_accum_steps, world_size): sums are rounded"),
        ({}, {"packages": {"torch": "2.16.0", "numpy": "2.4.6"}}, "(packages.torch): sums are rounded"),
        ({}, {"code": "b" * 40, "world_size": 4}, "the code differs"),
        ({"optimizer__lr": 1e-3}, {"code": "b" * 40}, "shape the curve differ and explain it: optimizer.lr"),
    ]
    for number, (settings, environment, said) in enumerate(cases):
        b = write_run(tmp_path / f"b{number}", other, environment, **settings)
        notes = compare_runs(a, b).notes
        assert len(notes) == 1, notes
        assert said in notes[0]
    result = compare_runs(a, tmp_path / "b1")
    assert result.configuration is not None
    assert result.environment is not None
    assert [(d.name, d.a, d.b) for d in result.configuration] == [("train.grad_accum_steps", None, 2)]
    assert [(d.name, d.a, d.b) for d in result.environment] == [("world_size", 2, 4)]
    same = compare_runs(a, write_run(tmp_path / "c", optimizer__lr=1e-3))
    assert same.verdict == "identical"
    assert same.notes == ["the same curve although these differ: optimizer.lr"]


def test_uncommitted_code_and_many_starts_are_mentioned(tmp_path: Path) -> None:
    told = {"code": "a" * 40 + "+changes"}
    a = write_run(tmp_path / "a", environment=told)
    b = write_run(tmp_path / "b", changed(curve(), 40, loss_total=1.0), told)
    with (b / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"unix_time": 1_790_000_100, **told, "world_size": 4}) + '\n{"torn')
    notes = compare_runs(a, b).notes
    assert notes[0] == "B: 2 starts with different ranks: 2, 4"
    assert notes[-1] == "both ran code with changes that are in no commit: it may differ all the same"


def test_settings_of_another_version(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    text = (b / "config.yaml").read_text()
    (b / "config.yaml").write_text(
        text.replace("ema:\n  decay: 0.98\n", "flavour: {patience: 3, more: [], other: null}\n")
    )
    result = compare_runs(a, b)
    assert result.configuration is not None
    assert [(d.name, repr(d.a), repr(d.b)) for d in result.configuration] == [
        ("ema.decay", "0.98", "(not there)"), ("flavour.patience", "(not there)", "3"),
    ]  # fmt: skip
    listed = as_json(result)["configuration"]
    assert listed == [
        {"name": "ema.decay", "effect": "curve", "a": 0.98}, {"name": "flavour.patience", "effect": "curve", "b": 3},
    ]  # fmt: skip


def test_files_and_what_is_not_beside_them(tmp_path: Path) -> None:
    a, b = pair(tmp_path, seed=1)
    assert [d.name for d in compare_runs(a / "metrics.jsonl", b).configuration or []] == ["seed"]
    lone = tmp_path / "reference.jsonl"
    lone.write_bytes((a / "metrics.jsonl").read_bytes())
    result = compare_runs(lone, b)
    assert (result.verdict, result.configuration, result.environment) == ("identical", None, None)
    assert result.notes == ["A: no readable configuration or environment beside the metrics, so it is not compared"]
    (b / "config.yaml").write_text("a: [")
    (b / "environment.json").write_text("{")
    assert compare_runs(a, b).notes == [
        "B: no readable configuration or environment beside the metrics, so it is not compared"
    ]


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    a, b = pair(tmp_path, [{**r, "step": r["step"] + 1} for r in curve()])
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "torn.jsonl").write_text('{"step": 1, "lo')
    one_line(lambda: compare_runs(a, tmp_path / "gone"), "gone: no such run folder")
    one_line(lambda: compare_runs(a, tmp_path / "empty"), "empty: is not a run folder with a curve")
    one_line(lambda: compare_runs(a, tmp_path / "none.jsonl"), "none.jsonl: holds no metrics; was the run stopped")
    one_line(lambda: compare_runs(a, tmp_path / "torn.jsonl"), "(1 of 1 lines are no records)")
    one_line(lambda: compare_runs(a, b), "no metric at any common step", "steps 10 to 80", "steps 11 to 81")
    one_line(lambda: compare_runs(a, a, from_step=81), "no metric at any common step from step 81 on")
    one_line(lambda: compare_runs(a, a, metrics=["loss/ntq"]), "--metric loss/ntq", "did you mean 'loss/ntp'?")
    one_line(lambda: compare_runs(a, a, metrics=["speed/images_per_s"]), "never compared")
    write_curve(b, [{k: v for k, v in r.items() if k != "loss/ntp"} for r in curve()])
    one_line(lambda: compare_runs(a, b, metrics=["loss/ntp"]), "--metric loss/ntp: only", "/a has it")
    for wrong in (("compare", a, tmp_path / "gone"), ("compare", a, a, "--csv", tmp_path / "no" / "x.csv")):
        done = cli(*wrong)
        assert done.exit_code == 2
        assert done.output.startswith("mirai-ds: error: ")
        assert done.output.count("\n") == 1


def test_csv_holds_every_value(tmp_path: Path) -> None:
    a, b = pair(tmp_path, changed(curve(), 50, loss_total=2.0))
    done = cli("compare", a, b, "--csv", tmp_path / "x.csv", "--metric", "loss/total", "--from", "50")
    assert done.output.splitlines()[-1] == f"{tmp_path / 'x.csv'}: 4 values"
    with (tmp_path / "x.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[:3] == [
        ["step", "metric", "a", "b", "absolute", "relative"],
        ["50", "loss/total", "2.375", "2.0", "0.375", repr(0.375 / 2.375)],
        ["60", "loss/total", "2.25", "2.25", "0.0", "0.0"],
    ]
    assert len(rows) == 5


def test_json_has_everything(tmp_path: Path) -> None:
    a, b = pair(tmp_path, changed(curve(6), 50, loss_total=2.0), seed=1)
    done = cli("compare", a, b, "--json", "--tolerance", "0.01")
    found = json.loads(done.output)
    assert done.exit_code == 1
    assert set(found) == {
        "verdict", "text", "tolerance", "a", "b", "steps_compared", "metrics", "only_a", "only_b", "prefix",
        "configuration", "environment", "notes",
    }  # fmt: skip
    assert found["verdict"] == "different"
    assert found["b"] == {"path": str(b), "steps": 6, "first_step": 10, "last_step": 60, "unreadable_lines": []}
    assert found["only_a"] == {"metrics": [], "steps": [70, 80]}
    assert found["configuration"] == [{"name": "seed", "effect": "curve", "a": 0, "b": 1}]
    assert found["metrics"][0]["first_difference"] == {
        "step": 50, "a": 2.375, "b": 2.0, "absolute": 0.375, "relative": 0.375 / 2.375,
    }  # fmt: skip
    assert found["metrics"][1]["last_quarter"] is None


def test_brackets_are_no_markup(tmp_path: Path) -> None:
    a, b = pair(tmp_path, data__source="npz", data__path="/data/[bold]x[/red].npz")
    assert "/data/[bold]x[/red].npz" in cli("compare", a, b).output


def test_needs_no_torch(tmp_path: Path) -> None:
    a, b = pair(tmp_path)
    code = (
        "import sys, mirai_ds.cli.main as c\n"
        f"try: c.main(['compare', {str(a)!r}, {str(b)!r}])\n"
        "except SystemExit as end: print(end.code)\n"
        "print([m for m in ('torch', 'numpy', 'deepspeed') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-2:] == ["0", "[]"]


def test_a_path_as_it_was_given_is_not_another_one() -> None:
    """Runs of an earlier version hold relative paths: that alone explains nothing.  Another file does."""

    def differing(a: str, b: str, field: str = "path") -> list[str]:
        runs = [RunRecords(Path(), Curve(), {"data": {field: value}}, None, []) for value in (a, b)]
        return [one.name for one in of_configurations(*runs) or []]

    assert differing("stores/codes", "/home/me/stores/codes") == differing("/a/codes", "codes") == []
    assert differing("stores/codes", "/home/me/stores/other") == ["data.path"]
    assert differing("codes", "stores/codes") == differing("/a/codes", "/b/codes") == ["data.path"]
    assert differing("npz", "/home/npz", "source") == ["data.source"]
