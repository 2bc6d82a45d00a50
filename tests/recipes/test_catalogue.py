"""The shipped recipes as a catalogue: names, headers, the documentation, the wheel, and what each row is about."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mirai_ds.cli.main import main
from mirai_ds.config import load, recipe_names, recipe_text
from mirai_ds.config.load import TWIN
from mirai_ds.paper import catalogue, pages
from mirai_ds.paper.comparable import comparable_config, differences
from mirai_ds.paper.published import published
from tests.one_line import one_line

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "mirai_ds" / "config" / "recipes"
PAPER = [*catalogue.paper_recipes(), *(row.recipe for row in published().beyond)]
ALIGNED = [name for name in PAPER if load(name).foresight.active]

# The recipes that are no row of the paper; what is one is compared with its row in tests/paper.
BEYOND: dict[str, dict[str, Any]] = {
    **{
        f"mtp-{layout}-k{k}": {"method": "mtp", "layout": layout, "num_heads": k, "weights": [1.0] * (k - 1)}
        for layout in ("1d", "2d") for k in (4, 9)
    },
    "mirai-e-right": {"method": "mirai-e", "offsets": [[0, 1]]},
    "mirai-e-below": {"method": "mirai-e", "offsets": [[1, 0]]},
    "mirai-e-current-right": {"method": "mirai-e", "offsets": [[0, 0], [0, 1]]},
    "mirai-e-current-below": {"method": "mirai-e", "offsets": [[0, 0], [1, 0]]},
    "mirai-i-lambda-3step": {"method": "mirai-i", "weights": [2.0], "schedule": {
        "kind": "step", "at_epochs": [100.0, 200.0], "multipliers": [1.0, 0.5, 0.25], "start_epoch": 0.0, "final": 0.0,
    }},
    **{f"mirai-e-warmup{n}": {"method": "mirai-e", "warmup_epochs": float(n)} for n in (5, 30)},
}  # fmt: skip


def test_what_is_beyond_the_paper() -> None:
    assert set(BEYOND) == {row.recipe for row in published().beyond}
    for name, about in BEYOND.items():
        config = load(name)
        found = config.foresight.model_dump()
        assert {key: found[key] for key in about} == about, name
        assert config.train.epochs == (300 if name.startswith("mirai-i") else 80)


def test_no_two_recipes_are_one_run() -> None:
    configs = {name: comparable_config(load(name), load(name).train.epochs) for name in PAPER}
    for i, one in enumerate(PAPER):
        for other in PAPER[i + 1 :]:
            if catalogue.run_steps(one) == catalogue.run_steps(other):
                assert differences(configs[one], configs[other]), f"{one} and {other} are the same run"


def test_names_are_unique_and_today_s_still_there() -> None:
    files = [*FOLDER.rglob("*.yaml")]
    assert sorted(file.stem for file in files) == sorted(recipe_names())
    assert {"digits-baseline", "digits-mirai-e", "fashion-mirai-e"} <= set(recipe_names())


def test_headers_are_made_from_the_paper_s_data() -> None:
    """`python -m mirai_ds.paper.pages --write` makes them so."""
    for name in PAPER:
        assert recipe_text(name) == pages.with_header(recipe_text(name), pages.header(name)), name


def test_a_header_says_what_is_promised() -> None:
    text = pages.header("mirai-e-lambda-step-to-half")
    for part in (
        "mirai-ds train mirai-e-lambda-step-to-half", "8 A100", "1,501,200 (300 epochs of 5,004)",
        'Table 3 "step 2 -> 0.5"', "after 300 epochs, cfg 2, 50,000 images of the EMA: FID 4.80 (Table 3)",
        "where lambda falls: at the midpoint, epoch 150\n", "--set 'foresight.schedule.at_epochs=[80]'",
        "mirai-e-lambda-step-to-half@paper",
    ):  # fmt: skip
        assert part in text
    assert "FID 5.22, IS 197.14 (Tables 1, 2, 5, 9, 10)" in pages.header("mirai-e-b-80")
    assert "50,000 (9.992 epochs of 5,004)" in pages.header("mirai-i-block1")
    assert "only in the picture" in pages.header("mirai-i-block1")
    assert "none: the paper has no such run" in pages.header("mirai-e-below")


def test_the_documentation_is_the_catalogue() -> None:
    for name, write in pages.DOCUMENTS.items():
        document = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert document == write(document, name), f"{name}: `python -m mirai_ds.paper.pages --write`"
    document = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert document.count("| `mirai-e-b-80` |") == 7  # Tables 1, 2, 5, 9, 10, 13 and Fig. 4
    assert document.index("### Beyond the paper") < document.index("| `mirai-e-below` |")


def test_the_wheel_holds_every_recipe_and_data_file(tmp_path: Path) -> None:
    """By the build script alone: an older list of sources in the tree (egg-info) would hide what it leaves out."""
    (tmp_path / "info").mkdir()
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path / "info")]
    command += ["build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    shipped = tmp_path / "lib" / "mirai_ds" / "config" / "recipes"
    wanted = {file.relative_to(FOLDER): file.read_bytes() for file in FOLDER.rglob("*.yaml")}
    assert {file.relative_to(shipped): file.read_bytes() for file in shipped.rglob("*.yaml")} == wanted
    for data in ("analysis/report.html.j2", "paper/tables.yaml"):
        assert (tmp_path / "lib" / "mirai_ds" / data).is_file()


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


@pytest.mark.parametrize("name", ["mirai-e-b-80", "mirai-e-k9", "mirai-i-b", "mtp-2d-k3"])
def test_the_text_as_written(name: str) -> None:
    """Eq. 10 and 11: the mean over heads with the recipe's own lambda; all else as in the other twin."""
    ours, text, twin = load(name), load(f"{name}@text"), load(name + TWIN)
    assert text.name == f"{name}-text"
    assert (text.foresight.heads_reduction, text.foresight.weights) == ("mean", ours.foresight.weights)
    same = text.model_copy(update={"name": twin.name})
    same.foresight.__dict__["weights"] = twin.foresight.weights
    assert same == twin


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


def test_a_copy_of_an_earlier_version_s_recipe_loads(tmp_path: Path) -> None:
    """It says where the recipe stood in the paper, which is no setting of a run."""
    path = tmp_path / "mine.yaml"
    path.write_text(recipe_text("mirai-e-b-80"))  # a copy, as `recipes show` prints it
    assert load(str(path)) == load("mirai-e-b-80")
    path.write_text(recipe_text("mirai-e-b-80") + "paper:\n  rows:\n  - {table: 10, row: 15 epochs}\n")
    assert load(str(path)) == load("mirai-e-b-80")


def test_recipes_on_the_command_line() -> None:
    run = CliRunner().invoke
    group, listed = run(main, ["recipes", "--table", "10"]), run(main, ["recipes", "list", "--table", "10"])
    assert (group.exit_code, group.output) == (0, listed.output)
    lines = group.output.splitlines()
    assert lines[0] == "Table 10: warm-up of Mirai-E"
    assert [line.split(",")[0] for line in lines[1:7:2]] == ["LlamaGen-B", "no warm-up", "15 epochs"]
    assert lines[5:7] == [
        "15 epochs, 80 epochs (400,320 steps): paper FID 5.22, IS 197.14", "    mirai-ds train mirai-e-b-80"
    ]  # fmt: skip
    assert lines[7] == "lambda of several heads: a sum over heads, three of lambda 2 weigh 6"
    assert "1.81e+11 FLOPs an image (+6.6 %)" in run(main, ["recipes", "--table", "13"]).output
    everything = run(main, ["recipes", "list"])
    assert everything.exit_code == 0
    assert [line.split()[0] for line in everything.output.splitlines()] == recipe_names()
    assert run(main, ["recipes"]).output.startswith("Usage:")
    shown = run(main, ["recipes", "show", "mirai-e-k4"])
    assert shown.output == recipe_text("mirai-e-k4")
    assert "convention: paper" in run(main, ["recipes", "show", "mirai-e-k4@paper"]).output
    assert "(beyond the paper)" in next(line for line in everything.output.splitlines() if "mirai-e-below" in line)
    wrong = run(main, ["recipes", "--table", "14"])
    assert (wrong.exit_code, wrong.output.count("\n")) == (2, 1)
