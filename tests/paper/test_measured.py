"""`mirai-ds table`: which row a run is, what counts as measured, and what is said of the rest."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mirai_ds.cli.main import main
from mirai_ds.config import dump, load
from mirai_ds.paper.measured import MeasuredRow, MeasuredTable, measure
from mirai_ds.paper.report import markdown
from tests.one_line import one_line

STEPS_80, STEPS_300 = 400_320, 1_501_200  # 5004 an epoch: floor(1,281,167 / 256)


def scores(fid: float, **changes: Any) -> dict[str, Any]:
    """An evaluation by the paper's protocol, with changes: `protocol__weights` is a key of `protocol`."""
    data: dict[str, Any] = {
        "fid": fid, "sfid": 7.0, "inception_score": 200.0, "precision": 0.8, "recall": 0.5, "num_samples": 50_000,
        "reference": {"name": "VIRTUAL_imagenet256_labeled.npz", "sha256": "a", "standard": True},
        "protocol": {"cfg_scale": 2.0, "weights": "ema", "step": STEPS_80}, "samples_sha256": f"samples of {fid}",
    }  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        where = data[section] if section else data
        if value is None:
            del where[name]
        else:
            where[name] = value
    return data


def make_run(
    folder: Path, recipe: str, *evaluations: dict[str, Any], name: str = "run", overrides: tuple[str, ...] = ()
) -> Path:
    """A run folder as training and `evaluate` leave it."""
    run = folder / name
    (run / "evaluations").mkdir(parents=True)
    (run / "config.yaml").write_text(dump(load(recipe, overrides)))
    for number, evaluation in enumerate(evaluations):
        (run / "evaluations" / f"{number}.json").write_text(json.dumps(evaluation))
    return run


def row(table: MeasuredTable, recipe: str, epochs: float = 80) -> MeasuredRow:
    (found,) = [m for m in table.rows if m.recipe == recipe and m.row.epochs == epochs]
    return found


def test_a_measured_row_and_missing_ones(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mirai-e-b-80", scores(5.31), overrides=("name=mine", "seed=3", "train.max_steps=400320"))
    table = measure("Table 1", [run])
    found = row(table, "mirai-e-b-80")
    assert (found.status, found.values("fid"), found.spread("fid")) == ("measured", [5.31], None)
    assert found.row.numbers is not None
    assert found.row.numbers.values == {"fid": 5.22, "inception_score": 197.14}
    others = [m for m in table.rows if m is not found]
    assert len(others) == 8
    assert {m.status for m in others} == {"missing"}
    (note,) = table.notes
    assert note.startswith('missing: "LlamaGen-B" (80 epochs), "output, 1D, K = 3" (80 epochs)')
    assert "2D, K = 3" not in note.replace("output, 2D", "")


def test_seeds_of_one_row_give_a_mean_and_a_spread(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, "mtp-2d-k3", scores(fid), name=f"seed{i}", overrides=(f"seed={i}",))
        for i, fid in enumerate((6.0, 6.2, 6.7))
    ]
    found = row(measure("1", [*runs, runs[0]]), "mtp-2d-k3")  # a run given twice counts once
    assert found.mean("fid") == pytest.approx(6.3)
    assert found.spread("fid") == pytest.approx(0.360555, rel=1e-5)  # sqrt((0.09 + 0.01 + 0.16) / 2)
    assert len(found.good) == 3


def test_several_evaluations_of_a_run_are_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mtp-1d-k3", scores(6.0), scores(7.0))
    found = row(measure("1", [run]), "mtp-1d-k3")
    assert (found.values("fid"), found.spread("fid")) == ([6.5], None)


PROTOCOLS: dict[str, tuple[dict[str, Any], str]] = {
    "reference": ({"reference__standard": False}, "reference VIRTUAL_imagenet256_labeled.npz is not the standard one"),
    "no-reference": ({"reference": None}, "reference not recorded is not the standard one"),
    "samples": ({"num_samples": 10_000}, "10000 samples, not 50000"),
    "cfg": ({"protocol__cfg_scale": 1.75}, "cfg_scale 1.75, not 2"),
    "raw": ({"protocol__weights": "raw"}, "weights raw, not ema"),
    "no-weights": ({"protocol__weights": None}, "weights not recorded, not ema"),
    "top-k": ({"protocol__top_k": 100}, "top_k 100, not 0"),
    "temperature": ({"protocol__temperature": 0.9}, "temperature 0.9, not 1"),
    "labels": ({"protocol__policy": "balanced"}, "balanced labels, not random ones"),
    "departure": ({"protocol__departures": ["the network ran in TF32"]}, "the network ran in TF32"),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_another_protocol_is_named_and_not_counted(name: str, tmp_path: Path) -> None:
    changes, words = PROTOCOLS[name]
    run = make_run(tmp_path, "mirai-i-layer6", scores(4.0, **changes))
    table = measure("2", [run])
    found = row(table, "mirai-i-layer6")
    assert (found.status, found.mean("fid")) == ("other protocol", None)
    assert table.notes[0] == f"{run}/evaluations/0.json: another protocol: {words}"
    good = make_run(tmp_path, "mirai-i-layer6", scores(4.0), name="good")
    assert row(measure("2", [run, good]), "mirai-i-layer6").values("fid") == [4.0]


def test_the_sampler_s_record_counts(tmp_path: Path) -> None:
    """`evaluate` puts the record beside the samples into `protocol.sampling`."""
    record = {
        "cfg_scale": 2.0, "weights": "ema", "checkpoint_step": STEPS_80, "top_k": 0, "top_p": 1.0, "temperature": 1.0,
        "cfg_interval": -1, "policy": "random",
    }  # fmt: skip
    run = make_run(
        tmp_path, "mtp-2d-k3", scores(6.1, protocol={"features": {}, "departures": [], "sampling": record}),
        scores(6.3, protocol={"departures": [], "sampling": {**record, "weights": "raw"}}),
        scores(6.5, protocol={"departures": [], "sampling": None}),
    )  # fmt: skip
    table = measure("1", [run])
    assert row(table, "mtp-2d-k3").values("fid") == [6.1]
    assert table.notes[0].endswith("1.json: another protocol: weights raw, not ema")
    assert table.notes[2].endswith(
        "2.json: another protocol: cfg_scale not recorded, not 2; weights not recorded, not ema"
    )


def test_the_rows_step_counts(tmp_path: Path) -> None:
    """One run of 300 epochs is four points of Fig. 7 and, at 80 epochs, the baseline of Table 1."""
    run = make_run(
        tmp_path, "llamagen-b", scores(5.3, protocol__step=STEPS_300), scores(6.4), scores(9.9, protocol__step=5004)
    )
    table = measure("fig7", [run])
    assert row(table, "llamagen-b", 300).values("fid") == [5.3]
    assert row(table, "llamagen-b", 80).values("fid") == [6.4]
    assert row(table, "llamagen-b", 40).status == "missing"
    wanted = "200,160 or 400,320 or 800,640 or 1,501,200"
    assert table.notes[0] == f"{run}/evaluations/2.json: of step 5,004, the row's is {wanted}; left out"
    assert row(measure("1", [run]), "llamagen-b-80").values("fid") == [6.4]


def test_a_step_that_is_not_recorded_is_the_last(tmp_path: Path) -> None:
    run = make_run(tmp_path, "llamagen-b-80", scores(6.4, protocol__step=None))
    table = measure("1", [run])
    assert row(table, "llamagen-b-80").values("fid") == [6.4]
    assert "no step is recorded; taken for the run's last, 400,320" in table.notes[0]
    long = make_run(tmp_path, "llamagen-b", scores(5.3, protocol__step=None), name="long")
    table = measure("1", [long])
    assert row(table, "llamagen-b-80").status == "missing"
    assert "of step 1,501,200, the row's is 400,320" in table.notes[1]


def test_the_same_samples_count_once(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, "mtp-1d-k3", scores(7.1), name=name) for name in ("a", "b")]
    table = measure("1", runs)
    assert len(row(table, "mtp-1d-k3").good) == 1
    assert table.notes[0] == (
        f"{runs[1]}/evaluations/0.json: the same samples as {runs[0]}/evaluations/0.json; left out"
    )


# What is no part of a row, and what is.
SAME = (
    "deepspeed=zero3", "train.micro_batch_size=16", "train.recompute.policy=full", "data.path=elsewhere", "seed=9",
    "foresight.kernel=reference", "train.epochs=100", "foresight.schedule={kind: step, at_epochs: [80]}",
    "checkpoint.every_steps=7", "foresight.num_heads=null", "model.size=custom",
)  # fmt: skip
OTHER = {
    "foresight.teacher_layer=5": "foresight.teacher_layer: 5, the recipe has 8",
    "optimizer.lr=2e-4": "optimizer.lr: 0.0002, the recipe has 0.0001",
    "optimizer.schedule=cosine": "optimizer.schedule: 'cosine to 0 over 80 epochs', the recipe has 'constant'",
    "optimizer.warmup_steps=10": "optimizer.schedule: 'after 10 steps of warm-up constant', the recipe has 'constant'",
    "foresight.warmup_epochs=14": "foresight.warmup_epochs: 14.0, the recipe has 15.0",
    "foresight.schedule={kind: step, at_epochs: [40]}": (
        "foresight.schedule: '1, 0.5 from epoch 40', the recipe has '1'"
    ),
    "foresight.weights=[2, 2, 1]": "foresight.weights: [2.0, 2.0, 1.0], the recipe has [2.0, 2.0, 2.0]",
    "foresight.border=mask": "foresight.border: 'mask', the recipe has 'flat shifts'",
    "foresight.teacher_weights=x.pt": "foresight.teacher_weights: 'given', the recipe has None",
    "train.global_batch_size=128": "train.global_batch_size: 128, the recipe has 256",
    "train.precision=bf16": "train.precision: 'bf16', the recipe has 'bf16-autocast'",
    "ema.decay=0.999": "ema.decay: 0.999, the recipe has 0.9999",
    "model.token_dropout=0": "model.token_dropout: 0.0, the recipe has 0.1",
}


def test_what_does_not_change_a_run_does_not_change_its_row(tmp_path: Path) -> None:
    custom = ("model.dim=768", "model.n_layer=12", "model.n_head=12")
    run = make_run(tmp_path, "mirai-e-b-80", scores(5.3), overrides=(*SAME, *custom))
    assert row(measure("1", [run]), "mirai-e-b-80").values("fid") == [5.3]


@pytest.mark.parametrize("override", OTHER)
def test_what_does_is_listed(override: str, tmp_path: Path) -> None:
    extra = ("foresight.warmup_epochs=15",) if "teacher_weights" in override else ()
    run = make_run(tmp_path, "mirai-e-b-80", scores(5.3), overrides=(override, *extra))
    table = measure("9", [run])
    assert row(table, "mirai-e-b-80").status == "missing"
    assert table.notes[0] == f"{run}: is not mirai-e-b-80: {OTHER[override]}"


def test_a_run_of_another_kind(tmp_path: Path) -> None:
    run = make_run(tmp_path, "digits-mirai-e", scores(5.3))
    (note, _) = measure("9", [run]).notes
    assert note.startswith(f"{run}: is no row of this table (nearest: mirai-")


def test_a_twin_has_a_row_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mirai-e-b-80@paper", scores(5.5))
    table = measure("9", [run])
    assert [m.recipe for m in table.rows][3:5] == ["mirai-e-b-80", "mirai-e-b-80@paper"]
    assert row(table, "mirai-e-b-80@paper").values("fid") == [5.5]
    assert row(table, "mirai-e-b-80").status == "missing"


def test_the_text_s_twin_has_one_too(tmp_path: Path) -> None:
    """With several heads; of one head `@text` is `@paper`, and the run is shown once."""
    table = measure("9", [make_run(tmp_path, "mirai-e-b-80@text", scores(5.6))])
    assert [m.recipe for m in table.rows][3:5] == ["mirai-e-b-80", "mirai-e-b-80@text"]
    assert row(table, "mirai-e-b-80@text").values("fid") == [5.6]
    one = measure("9", [make_run(tmp_path, "mirai-i-b-80@text", scores(4.8), name="one")])
    assert [m.recipe for m in one.rows if m.good] == ["mirai-i-b-80@paper"]


def test_unreadable_scores_are_said(tmp_path: Path) -> None:
    run = make_run(tmp_path, "mtp-1d-k3", scores(7.0), scores(7.0))
    (run / "evaluations" / "0.json").write_text("{")
    (run / "evaluations" / "1.json").write_text('{"fid": "low"}')
    notes = measure("1", [run]).notes
    assert "0.json: cannot be read" in notes[0]
    assert "1.json: holds none of fid, sfid" in notes[1]
    assert f"{run}: is mtp-1d-k3, and evaluations/ holds no scores" == notes[2]


def test_command_line(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path, "mirai-i-l", scores(fid, protocol__step=STEPS_300, protocol__cfg_scale=1.75), name=f"r{fid}")
        for fid in (3.0, 3.2)
    ]
    file = tmp_path / "table.csv"
    done = CliRunner().invoke(main, ["table", "8", *map(str, runs), "--markdown", "--csv", str(file)])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "**Table 8: size of Mirai-I's encoder for LlamaGen-L (paper / measured / difference)**"
    assert lines[2] == "| row | epochs | recipe | parameters, paper / here | FID | sFID | IS | P | R | runs |"
    measured = "3.07 / 3.10 ± 0.14 / +0.03 | 6.72 / 7.00 ± 0.00 / +0.28 | 263.70 / 200.00 ± 0.00 / -63.70"
    assert lines[6].startswith(
        f"| DINOv2-L | 300 | mirai-i-l | 300M / 304.4M | {measured} | 0.83 / 0.800 ± 0.000 / -0.030 |"
    )
    assert lines[6].endswith("| 2 |")
    assert lines[4].startswith("| LlamaGen-L | 300 | llamagen-l | - | 3.73 | 6.68 |")
    with file.open(newline="") as text:
        _, first, second = csv.DictReader(text)
    assert (first["recipe"], first["status"], first["measured_fid"]) == ("mirai-i-l-dinov2-b", "missing", "")
    assert (second["paper_fid"], float(second["measured_fid"]), second["runs"]) == ("3.07", pytest.approx(3.1), "2")
    assert (float(second["difference_fid"]), second["paper_parameters"]) == (pytest.approx(0.03), "300M")
    assert second["source"] == "arXiv 2601.14671, Tables 6, 8"
    plain = CliRunner().invoke(main, ["table", "8"])
    assert plain.exit_code == 0
    assert "measured" not in plain.output
    assert "│ DINOv2-L   │ 300    │ mirai-i-l          │ 300M / 304.4M            │ 3.07 │" in plain.output


def test_other_people_s_models_stand_beside(tmp_path: Path) -> None:
    """Table 6 with a run: all of its rows, in the paper's order, and all of them in the CSV."""
    run = make_run(tmp_path, "llamagen-b", scores(5.41, protocol__step=STEPS_300))
    file = tmp_path / "table.csv"
    done = CliRunner().invoke(main, ["table", "6", str(run), "--markdown", "--csv", str(file)])
    assert done.exit_code == 0, done.output
    rows = [line.split(" | ") for line in done.output.splitlines() if line.startswith("| ")][2:]
    assert [row[1] for row in rows[:3]] == ["BigGAN", "GigaGAN", "LDM-4"]
    assert len(rows) == 22
    assert rows[3] == ["| Diffusion", "DiT-XL", "1400", "-", "675M", "2.27", "4.60", "278.20", "0.83", "0.57", "- |"]
    assert rows[13][:6] == ["| AR+Mirai", "LlamaGen-B", "300", "llamagen-b", "111M / 110.9M", "5.34 / 5.41 / +0.07"]
    with file.open(newline="") as text:
        lines = list(csv.DictReader(text))
    assert [line["row"] for line in lines] == [row[1] for row in rows]
    assert (lines[3]["type"], lines[3]["paper_sfid"], lines[3]["recipe"]) == ("Diffusion", "4.6", "")


def test_table_13_prints_what_is_counted(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["table", "13", "--markdown"])
    assert done.exit_code == 0, done.output
    assert "| LlamaGen-B + Mirai-E | 80 | mirai-e-b-80 | 2.35e+11 | 2.348e+11 | +38.2 % | +37.8 % |" in done.output
    assert "- LlamaGen-B + Mirai-I: the FID of LlamaGen-B after 400 epochs at epoch 40" in done.output
    run = make_run(tmp_path, "llamagen-b-80", scores(6.4))
    one_line(lambda: measure("13", [run]), "Table 13 holds no scores", "give none")


def test_mistakes(tmp_path: Path) -> None:
    one_line(lambda: measure("14", []), "table '14'", "no recipe is a row of it")
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(main, ["table", "1", str(tmp_path / "empty")])
    assert done.exit_code == 2
    assert done.output.strip().endswith("not a run folder (it has no config.yaml)")
    table = measure("9", [make_run(tmp_path, "mirai-e-b-80", scores(5.0))])
    done = CliRunner().invoke(main, ["table", "9", "--csv", str(tmp_path / "no" / "file.csv")])
    assert (done.exit_code, "cannot be written" in done.output) == (2, True)
    assert markdown(table).count("\n| ") == 7  # headings, rule, five rows
