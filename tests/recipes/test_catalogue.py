"""The shipped recipes as a catalogue: names, headers, the documentation, the wheel, and what each row is about."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mirai_ds.cli.main import main
from mirai_ds.config import UserError, load, recipe_names, recipe_text
from mirai_ds.config.load import TWIN, paper_entry, read_recipe
from mirai_ds.config.paper_rows import TABLES, read_entry
from mirai_ds.paper import catalogue
from mirai_ds.paper.comparable import comparable_config, differences
from mirai_ds.runtime import markdown
from tests.one_line import one_line

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "mirai_ds" / "config" / "recipes"
PAPER = [name for name in recipe_names() if paper_entry(name) is not None]
ALIGNED = [name for name in PAPER if load(name).foresight.active]
COSINE = {"kind": "cosine", "start_epoch": 0.0, "final": 0.0}
STEP = {"kind": "step", "at_epochs": [150.0], "multipliers": [1.0, 0.5]}
THREE = {"kind": "step", "at_epochs": [100.0, 200.0], "multipliers": [1.0, 0.5, 0.25]}

# What each recipe is about: (field, value) of its resolved configuration.
ABOUT: dict[str, dict[str, Any]] = {
    "llamagen-b": {"model.size": "GPT-B", "foresight.method": "none", "train.epochs": 300.0},
    "llamagen-l": {"model.size": "GPT-L", "sampling.cfg_scale": 1.75, "optimizer.schedule": "constant"},
    "llamagen-xl": {"model.size": "GPT-XL", "sampling.cfg_scale": 1.75, "optimizer.schedule": "cosine"},
    "mirai-i-b": {"foresight.method": "mirai-i", "foresight.layer": 8, "foresight.num_heads": 1},
    "mirai-i-l": {"model.size": "GPT-L", "foresight.layer": 16, "foresight.encoder.name": "dinov2-l"},
    "mirai-i-xl": {"model.size": "GPT-XL", "foresight.layer": 24, "optimizer.schedule": "cosine"},
    "mirai-e-b": {"foresight.method": "mirai-e", "foresight.schedule": STEP, "foresight.warmup_epochs": 15.0},
    "mirai-e-l": {"model.size": "GPT-L", "foresight.layer": 16, "foresight.schedule": STEP},
    "mirai-e-xl": {"model.size": "GPT-XL", "foresight.layer": 24, "foresight.method": "mirai-e"},
    "llamagen-b-80": {"train.epochs": 80.0, "foresight.method": "none"},
    "mirai-i-b-80": {"train.epochs": 80.0, "foresight.encoder.name": "dinov2-b", "foresight.weights": [2.0]},
    "mirai-e-b-80": {"train.epochs": 80.0, "foresight.schedule.kind": "const", "foresight.weights": [2.0] * 3},
    **{
        f"mtp-{layout}-k{k}": {
            "foresight.method": "mtp", "foresight.layout": layout, "foresight.num_heads": k, "foresight.layer": 12,
            "foresight.weights": [1.0] * (k - 1),
        }
        for layout in ("1d", "2d") for k in (3, 4, 9)
    },
    **{f"mirai-e-1d-k{k}": {"foresight.layout": "1d", "foresight.num_heads": k} for k in (3, 4, 9)},
    **{f"mirai-e-k{k}": {"foresight.layout": "2d", "foresight.num_heads": k} for k in (1, 4, 9)},
    **{f"mirai-i-k{k}": {"foresight.method": "mirai-i", "foresight.num_heads": k} for k in (3, 4, 9)},
    **{f"mirai-e-layer{n}": {"foresight.layer": n, "foresight.teacher_layer": n} for n in (4, 6, 10)},
    **{f"mirai-i-layer{n}": {"foresight.layer": n, "foresight.method": "mirai-i"} for n in (4, 6, 10)},
    "mirai-e-layer8-to-6": {"foresight.layer": 6, "foresight.teacher_layer": 8},
    "mirai-e-lambda-const": {"foresight.schedule.kind": "const", "train.epochs": 300.0},
    "mirai-e-lambda-3step": {"foresight.schedule": THREE},
    "mirai-e-lambda-cosine": {"foresight.schedule": COSINE},
    "mirai-i-lambda-step": {"foresight.schedule": STEP, "foresight.method": "mirai-i"},
    "mirai-i-lambda-3step": {"foresight.schedule": THREE, "foresight.method": "mirai-i"},
    "mirai-i-lambda-cosine": {"foresight.schedule": COSINE, "foresight.method": "mirai-i"},
    "mirai-i-dinov2-l": {"foresight.encoder.name": "dinov2-l", "model.size": "GPT-B"},
    "mirai-i-dinov3-b": {"foresight.encoder.name": "dinov3-b"},
    "mirai-i-mae-b": {"foresight.encoder.layer": 8, "foresight.encoder.final_norm": False},
    "mirai-i-mae-l": {"foresight.encoder.layer": 16, "foresight.encoder.final_norm": False},
    **{f"mirai-i-block{b}": {"foresight.encoder.block_causal": b} for b in (1, 16, 64, 128)},
    "mirai-e-right": {"foresight.offsets": [[0, 1]]},
    "mirai-e-below": {"foresight.offsets": [[1, 0]]},
    "mirai-e-right-below": {"foresight.offsets": [[0, 1], [1, 0]]},
    "mirai-e-current-right": {"foresight.offsets": [[0, 0], [0, 1]]},
    "mirai-e-current-below": {"foresight.offsets": [[0, 0], [1, 0]]},
    "mirai-i-l-dinov2-b": {"model.size": "GPT-L", "foresight.encoder.name": "dinov2-b"},
    **{f"mirai-{m}-transformer-head": {"foresight.head": "transformer", "foresight.head_attention": "causal",
                                       "foresight.method": f"mirai-{m}"} for m in ("e", "i")},
    **{f"mirai-e-warmup{n}": {"foresight.warmup_epochs": float(n)} for n in (0, 5, 30)},
    "llamagen-b-384": {"model.grid_size": 24, "data.path": "stores/codes-384"},
    "mirai-i-b-384": {"model.grid_size": 24, "data.images": "stores/images-384"},
    "mirai-e-b-384": {"model.grid_size": 24, "foresight.flat_stride": None},
    "par-b": {"model.par_tokens": 4},
    "mirai-i-par-b": {"model.par_tokens": 4, "foresight.method": "mirai-i"},
    "mirai-e-par-b": {"model.par_tokens": 4, "foresight.method": "mirai-e"},
    **{
        f"mirai-e-static-k{k}": {
            "foresight.teacher_weights": "runs/llamagen-b", "foresight.num_heads": k, "foresight.warmup_epochs": 0.0,
        }
        for k in (1, 3, 4, 9)
    },
}  # fmt: skip


def test_every_recipe_is_about_something() -> None:
    assert set(ABOUT) == set(PAPER)
    assert len({tuple(sorted((k, repr(v)) for k, v in about.items())) for about in ABOUT.values()}) == len(ABOUT)


@pytest.mark.parametrize("name", PAPER)
def test_what_a_recipe_is_about(name: str) -> None:
    values = load(name).model_dump(mode="json")
    for path, wanted in ABOUT[name].items():
        value: Any = values
        for part in path.split("."):
            value = value[part]
        if isinstance(wanted, dict):
            value = {key: value[key] for key in wanted}
        assert value == wanted, path
    common = {"train.global_batch_size": 256, "optimizer.lr": 1e-4, "ema.decay": 0.9999, "optimizer.weight_decay": 0.05}
    for path, wanted in common.items():
        section, field = path.split(".")
        assert values[section][field] == wanted


def test_every_table_has_rows_and_no_two_recipes_are_one() -> None:
    """Two rows of a table are different runs (or different lengths of one)."""
    for table in TABLES:
        rows = catalogue.rows_of(table)
        assert len(rows) >= 2, table
        for places in ({(row.recipe, row.epochs) for row in rows}, {(row.row, row.epochs) for row in rows}):
            assert len(places) == len(rows)
    configs = {name: comparable_config(load(name), load(name).train.epochs) for name in PAPER}
    for i, one in enumerate(PAPER):
        for other in PAPER[i + 1 :]:
            if load(one).train.epochs == load(other).train.epochs:
                assert differences(configs[one], configs[other]), f"{one} and {other} are the same run"


def test_numbers_that_two_recipes_share_are_of_one_run() -> None:
    """`80: mirai-e-b-80` in a recipe's numbers: up to epoch 80 the two are the same."""
    shared = 0
    for name in PAPER:
        for epochs, numbers in paper_entry(name).numbers.items():  # type: ignore[union-attr]
            if numbers.of is not None:
                shared += 1
                assert not differences(
                    comparable_config(load(name), epochs), comparable_config(load(numbers.of), epochs)
                )
    assert shared == 3


def test_the_papers_numbers() -> None:
    """One table in full, and a mark that is another recipe's."""
    found = {row.row: row.numbers.values() if row.numbers else {} for row in catalogue.rows_of("1")}
    assert {label: values for label, values in found.items() if values} == {
        "baseline": {"fid": 6.36, "inception_score": 185.54},
        "output, 1D, K = 3": {"fid": 7.28, "inception_score": 163.31},
        "output, 2D, K = 3": {"fid": 6.48, "inception_score": 185.57},
        "internal, 1D, K = 3": {"fid": 6.20, "inception_score": 176.36},
        "internal, 2D, K = 3": {"fid": 5.22, "inception_score": 197.14},
    }
    marks = {r.epochs: r.numbers for r in catalogue.rows_of("fig7") if r.recipe == "mirai-e-b"}
    assert [marks[e].fid if marks[e] else None for e in (40, 80, 160, 300)] == [None, 5.22, None, 4.49]  # type: ignore


def test_names_are_unique_and_today_s_still_there() -> None:
    files = [*FOLDER.rglob("*.yaml")]
    assert sorted(file.stem for file in files) == sorted(recipe_names())
    assert {"digits-baseline", "digits-mirai-e", "fashion-mirai-e"} <= set(recipe_names())


@pytest.mark.parametrize("name", PAPER)
def test_header_and_metadata_agree(name: str) -> None:
    """`python -m mirai_ds.paper.catalogue --write` makes them agree."""
    assert recipe_text(name) == catalogue.with_header(recipe_text(name), catalogue.header(name))


def test_a_header_says_what_is_promised() -> None:
    text = catalogue.header("mirai-i-layer6")
    for part in (
        "mirai-ds train mirai-i-layer6", "8 A100", "400,320 (80 epochs of 5,004)", 'Table 2 "Mirai-I, layer 6"',
        "not at hand", "mirai-i-layer6@paper",
    ):  # fmt: skip
        assert part in text
    assert "FID 5.22, IS 197.14 (arXiv 2601.14671)" in catalogue.header("mirai-e-b-80")


def test_the_documentation_is_the_catalogue() -> None:
    document = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert document == markdown.replaced(document, catalogue.BEGIN, catalogue.page(), catalogue.END, "recipes.md")
    assert document.count("| `mirai-e-b-80` |") == 7


def test_the_wheel_holds_every_recipe_and_the_reports_template(tmp_path: Path) -> None:
    """By the build script alone: an older list of sources in the tree (egg-info) would hide what it leaves out."""
    (tmp_path / "info").mkdir()
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path / "info")]
    command += ["build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    shipped = tmp_path / "lib" / "mirai_ds" / "config" / "recipes"
    wanted = {file.relative_to(FOLDER): file.read_bytes() for file in FOLDER.rglob("*.yaml")}
    assert {file.relative_to(shipped): file.read_bytes() for file in shipped.rglob("*.yaml")} == wanted
    assert (tmp_path / "lib" / "mirai_ds" / "analysis" / "report.html.j2").is_file()


# --- twins ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALIGNED)
def test_a_twin_is_the_text_at_the_same_total_weight(name: str) -> None:
    ours, twin = load(name), load(name + TWIN)
    assert (twin.name, twin.foresight.convention) == (f"{name}-paper", "paper")
    assert (ours.foresight.heads_reduction, twin.foresight.heads_reduction) == ("sum", "mean")
    weights = twin.foresight.weights or []
    assert sum(weights) / len(weights) == pytest.approx(sum(ours.foresight.weights or []))
    assert (twin.foresight.slots, twin.foresight.border) == ("predict", "mask")
    assert twin.foresight.teacher_sees_last_token is (True if ours.foresight.method != "mtp" else None)
    left = twin.model_dump(exclude={"name": True, "foresight": True})
    assert left == ours.model_dump(exclude={"name": True, "foresight": True})
    for field in ("method", "layer", "teacher_layer", "num_heads", "schedule", "warmup_epochs", "head", "encoder"):
        assert getattr(twin.foresight, field) == getattr(ours.foresight, field)


def test_twins_of_files_and_bases(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: mirai-e-b-80\nname: mine\nforesight: {weights: [1, 2, 3]}\n")
    assert load(f"{tmp_path}/mine.yaml@paper").foresight.weights == [3.0, 6.0, 9.0]
    (tmp_path / "more.yaml").write_text("base: mirai-e-b-80@paper\nname: more\nseed: 4\n")
    more = load(f"{tmp_path}/more.yaml")
    assert (more.name, more.foresight.convention, more.foresight.weights) == ("more", "paper", [6.0] * 3)
    one_line(lambda: load("llamagen-b@paper"), "no such twin", "foresight.method is none", "use llamagen-b")
    one_line(lambda: load(f"{tmp_path}/more.yaml@paper"), "it is in the paper's convention")
    one_line(lambda: load("mirai-e-bb@paper"), "recipe 'mirai-e-bb': no such recipe")


# --- `paper:` and the command line ---------------------------------------------------------------------------------


def test_paper_is_checked_and_never_inherited(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(recipe_text("mirai-e-b-80"))  # a copy, as `recipes show` prints it, loads
    assert load(str(path)) == load("mirai-e-b-80")
    assert "paper" not in read_recipe("mirai-e-b-80")
    for text, parts in {
        "paper: {rows: [{table: 33, row: x}]}": ("paper.rows.table = '33'", "did you mean"),
        "paper: {rows: [{table: 3}]}": ("row",),
        "paper: {rows: [{table: 3, row: x}], numbers: {80: {fid: 5}}}": ("source",),
        "paper: {rows: [{table: 3, row: x, fid: 5}]}": ("fid", "unknown key"),
        "paper: {rows: [{table: 3, row: x}], numbers: {80: {source: x}}}": ("paper.numbers", "give numbers"),
        "paper: 3": ("paper",),
    }.items():
        path.write_text(text)
        one_line(lambda: load(str(path)), str(path), *parts)
    assert read_entry({"rows": [{"table": 3, "row": "x"}]}, "x").rows[0].table == "3"


def test_tables_as_people_write_them() -> None:
    written = {"3": "3", "Table 3": "3", "tab. 12": "12", "fig7": "fig7", "Fig. 7": "fig7", "figure 5": "fig5"}
    assert {text: catalogue.table_key(text) for text in written} == written
    for text in ("13", "fig9", "", "x"):
        with pytest.raises(UserError):
            catalogue.table_key(text)


def test_recipes_on_the_command_line() -> None:
    run = CliRunner().invoke
    group, listed = run(main, ["recipes", "--table", "10"]), run(main, ["recipes", "list", "--table", "10"])
    assert (group.exit_code, group.output) == (0, listed.output)
    lines = group.output.splitlines()
    assert lines[0] == "Table 10: epochs of warm-up, Mirai-E"
    assert [line.split(",")[0] for line in lines[1::2]] == ["0 epochs", "5 epochs", "15 epochs", "30 epochs"]
    assert lines[6].strip() == "mirai-ds train mirai-e-b-80"
    everything = run(main, ["recipes", "list"])
    assert everything.exit_code == 0
    assert [line.split()[0] for line in everything.output.splitlines()] == recipe_names()
    assert run(main, ["recipes"]).output.startswith("Usage:")
    shown = run(main, ["recipes", "show", "mirai-e-k4"])
    assert shown.output == recipe_text("mirai-e-k4")
    assert "convention: paper" in run(main, ["recipes", "show", "mirai-e-k4@paper"]).output
    wrong = run(main, ["recipes", "--table", "13"])
    assert (wrong.exit_code, wrong.output.count("\n")) == (2, 1)
