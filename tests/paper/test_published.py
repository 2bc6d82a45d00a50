"""The paper's tables as data: what they print, and that each row's recipe trains what the row says."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import timm
import torch

from mirai_ds.config import load, recipe_names
from mirai_ds.config.encoder_config import ENCODERS
from mirai_ds.config.load import TWIN
from mirai_ds.paper import catalogue
from mirai_ds.paper.catalogue import all_rows, numbers_of, run_steps
from mirai_ds.paper.comparable import comparable_config, differences
from mirai_ds.paper.compute import (
    convergence_notes,
    counted_parameters,
    flops_cells,
    less_compute,
    millions,
    printed_parameters,
)
from mirai_ds.paper.published import choices_of, published, setting_of, table_key
from mirai_ds.planning.costs import costs_of
from mirai_ds.planning.flops import encoder_parameters
from tests.one_line import one_line
from tests.paper.read_back import read_back

TABLES = published().all_tables()
OURS = [(key, row) for key, table in TABLES.items() for row in table.rows if row.recipe is not None]

# FID of each row as printed, other models included; of figures nothing is printed.
FIDS = {
    "1": [6.36, 7.28, 6.48, 6.20, 5.22, 6.61, 5.64, 7.19, 6.42],
    "2": [6.36, 4.98, 4.81, 4.77, 5.06, 5.99, 5.62, 5.22, 5.53, 6.30],
    "3": [5.34, 5.00, 4.96, 5.19, 4.80, 4.49, 4.64, 4.97, 4.98],
    "4": [6.36, 4.77, 4.78, 5.02, 6.34, 6.01],
    "5": [6.36, 4.99, 4.77, 5.39, 5.22],
    "6": [
        6.95, 3.45, 3.60, 2.27, 2.15, 6.18, 3.49, 5.81, 3.55, 2.95, 15.78, 4.17, 7.55,
        5.34, 4.34, 4.49, 3.73, 3.07, 3.29, 3.16, 2.59, 2.76,
    ],
    "7": [5.34, 4.41, 4.34, 4.54, 4.59, 4.59],
    "8": [3.73, 3.47, 3.07],
    "9": [6.36, 4.77, 5.65, 5.22, 6.80],
    "10": [6.36, 8.32, 5.22],
    "11": [7.43, 4.91, 5.72],
    "12": [7.47, 5.59, 6.64],
    "13": [],
}  # fmt: skip


def test_every_printed_fid() -> None:
    found = {
        key: [row.fid for row in table.rows if row.fid is not None] for key, table in published().tables.items()
    }  # fmt: skip
    assert found == FIDS
    assert not any(row.metrics() for figure in published().figures.values() for row in figure.rows)


@pytest.mark.parametrize("key", TABLES)
def test_a_recipe_trains_what_its_row_says(key: str) -> None:
    """Every setting that the paper gives, and no foresight setting beside them; but for what of mtp it leaves open."""
    for row in TABLES[key].rows:
        if row.recipe is None:
            continue
        wanted, found = setting_of(TABLES[key], row), read_back(load(row.recipe))
        if wanted["method"] == "output":
            wanted["layer"] = 12  # Eq. 5: the last
        if "tokens" not in wanted:
            found.pop("tokens", None)
        assert found == wanted, f"{row.label} is {row.recipe}"


def test_every_row_has_one_recipe_and_every_recipe_a_row() -> None:
    for key, table in TABLES.items():
        ours = [row for row in table.rows if row.recipe is not None]
        assert key == "6" or len(ours) == len(table.rows), "only Table 6 has other people's models"
        for names in ([row.recipe for row in ours], [row.label for row in table.rows]):
            assert max(Counter(names).values()) == 1, key
    mine = {"digits-baseline", "digits-mirai-e", "fashion-mirai-e", "study-digits", "study-fashion"}
    beyond = [row.recipe for row in published().beyond]
    in_paper = catalogue.paper_recipes()
    assert sorted([*in_paper, *beyond, *mine]) == sorted(recipe_names())


def test_runs_last_to_their_marks() -> None:
    """Rows without marks are judged at the end of their run; a mark on the way has a command that stops there."""
    for row in all_rows():
        assert row.steps <= run_steps(row.recipe)
        config = load(row.recipe, () if row.whole else (row.command.split("--set ")[1],))
        steps = round(config.train.epochs * 5004)
        assert min(steps, config.train.max_steps or steps) == row.steps
    assert {row.recipe for row in all_rows() if row.whole} == {row.recipe for row in all_rows()}
    marks = {row.steps for row in all_rows() if row.table == "fig7"}
    assert marks == {200_160, 400_320, 800_640, 1_501_200}
    assert {row.steps for row in all_rows() if row.table == "fig3"} == {50_000}


def test_checkpoints_stay_at_every_mark() -> None:
    for row in all_rows():
        kept = load(row.recipe).checkpoint
        every = kept.keep_every_steps or 1 << 60
        assert row.whole or row.steps in kept.keep_steps or row.steps % every == 0, (row.recipe, row.steps)


def test_numbers_of_one_run_agree_between_tables() -> None:
    """A run that two tables print has the same numbers in both; the longer run has the shorter one's at its end."""
    seen: dict[tuple[str, int, str], float] = {}
    for key, row in OURS:
        for metric, value in row.metrics().items():
            place = (row.recipe or "", run_steps(row.recipe or ""), metric)
            assert seen.setdefault(place, value) == value, (key, row.label)
    run = numbers_of("mirai-e-b", 400_320)
    assert run is not None
    assert (run.values, run.source) == ({"fid": 5.22, "inception_score": 197.14}, "Tables 1, 2, 5, 9, 10")
    assert numbers_of("llamagen-b-400", 1_501_200) == numbers_of("llamagen-b", 1_501_200)
    assert numbers_of("mirai-e-b", 200_160) is None
    assert [(steps, n.values["fid"]) for steps, n in catalogue.numbers_at_marks("mirai-i-b")] == [
        (400_320, 4.77), (1_501_200, 4.34)
    ]  # fmt: skip


def test_a_longer_run_begins_as_the_shorter_one() -> None:
    for longer, shorter in published().begins_as.items():
        epochs = load(shorter).train.epochs
        assert epochs < load(longer).train.epochs
        assert not differences(comparable_config(load(longer), epochs), comparable_config(load(shorter), epochs))


def test_the_other_reading_of_a_choice_is_another_run() -> None:
    """Each override loads with each recipe whose row raises the question, and changes the run; all questions arise."""
    asked = set()
    for key, row in OURS:
        for choice in choices_of(setting_of(TABLES[key], row)):
            asked.add(choice.question)
            recipe = row.recipe or ""
            assert load(recipe, choice.set).model_dump() != load(recipe).model_dump(), (recipe, choice.question)
    assert asked == {choice.question for choice in published().choices.values()}


CHOSEN: dict[str, dict[str, Any]] = {
    "heads": {"foresight": {"heads_reduction": "sum"}},
    "midpoint": {"foresight": {"schedule": {"at_epochs": [150.0]}}},
    "short-runs": {"foresight": {"schedule": {"kind": "const"}}},
    "thirds": {"foresight": {"schedule": {"at_epochs": [100.0, 200.0]}}},
    "cosine-start": {"foresight": {"schedule": {"start_epoch": 0.0}}},
    "final-lr": {"optimizer": {"final_lr": 0.0}},
    "cross-layer": {"foresight": {"layer": 6, "teacher_layer": 8}},
    "head-attention": {"foresight": {"head_attention": "causal"}},
    "output-heads": {"foresight": {"head": "transformer", "weights": [1.0, 1.0]}},
    "teacher": {"foresight": {"teacher_weights": "runs/llamagen-b"}},
    "static-k": {"foresight": {"num_heads": 3}},
    "regions": {"model": {"par_tokens": 4}},
    "flat-stride": {"foresight": {"flat_stride": None, "border": "wrap"}},
}


def _holds(part: dict[str, Any], whole: dict[str, Any]) -> bool:
    return all(
        _holds(value, whole[name]) if isinstance(value, dict) else whole[name] == value for name, value in part.items()
    )


def test_recipes_follow_what_they_say_they_follow() -> None:
    """The chosen reading of every question, in every recipe that raises it; of block sizes the rows are the choice."""
    assert {*CHOSEN, "block-sizes"} == set(published().choices)
    for key, row in OURS:
        for name, choice in published().choices.items():
            if name in CHOSEN and choice.arises(setting_of(TABLES[key], row)):
                assert _holds(CHOSEN[name], load(row.recipe or "").model_dump()), (row.recipe, name)


def test_parameters_are_the_printed_ones() -> None:
    """As rounded as the paper rounds; DINOv2's "300M" is the large ViT's 304 million."""
    checked = 0
    for _, row in OURS:
        printed = printed_parameters(row)
        if printed is None:
            continue
        checked += 1
        counted = counted_parameters(row, load(row.recipe or "")) / 1e6
        value = float(printed.removesuffix("M"))
        step = 0.01 if "." in printed else 4.5 if printed == "300M" else 1.0
        assert abs(counted - value) <= step, (row.label, printed, counted)
    assert checked == 9 + 5 + 2 + 4
    assert [millions(7_344_896), millions(110_890_752)] == ["7.34M", "110.9M"]


def test_encoder_parameters_are_timm_s() -> None:
    with torch.device("meta"):
        for preset in ENCODERS.values():
            model = timm.create_model(preset.timm_name, pretrained=False, num_classes=0)
            whole = sum(p.numel() for p in model.parameters())
            assert encoder_parameters(preset.timm_name) == whole, preset.timm_name


def test_table_13_is_what_is_counted_here() -> None:
    """FLOPs within the paper's rounding (1.81e11 is cut off, not rounded), the overheads, and the compute saved."""
    rows = {row.label: row for row in published().tables["13"].rows}
    cells = {label: flops_cells(row, load(row.recipe or "")) for label, row in rows.items()}
    assert cells == {
        "LlamaGen-B": ["1.70e+11", "1.703e+11", "-", "-"],
        "LlamaGen-B + Mirai-I": ["1.81e+11", "1.816e+11", "+6.6 %", "+6.6 %"],
        "LlamaGen-B + Mirai-E": ["2.35e+11", "2.348e+11", "+38.2 %", "+37.8 %"],
    }
    notes = convergence_notes({label: load(row.recipe or "") for label, row in rows.items()})
    assert notes[0].endswith("9.4 times less compute, 9.4 as counted here, 7.5 with the encoder's forward passes")
    assert notes[1].endswith("3.6 times less compute, 3.6 as counted here, 3.8 where the warm-up costs no alignment")
    assert less_compute(costs_of(load("mirai-e-b-80")), 400, 80, warmup=80) == 5.0


def test_tables_as_people_write_them() -> None:
    written = {"3": "3", "Table 3": "3", "tab. 13": "13", "fig7": "fig7", "Fig. 7": "fig7", "figure 5": "fig5"}
    assert {text: table_key(text) for text in written} == written
    for text in ("14", "fig2", "", "x", "beyond"):
        one_line(partial(table_key, text), f"table {text!r}", "no recipe is a row of it")


def test_a_twin_s_rows_are_its_recipe_s() -> None:
    """`NAME@paper` is no recipe of a row: a table shows it only where a run is one."""
    assert not [row.recipe for row in all_rows() if row.recipe.endswith(TWIN)]
