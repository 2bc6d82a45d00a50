"""Imports point one way and in no circles, heavy packages have one room, files and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.rooms import (
    FLOOR,
    FREE,
    LARGEST,
    ROOT,
    Module,
    circles,
    file_circles,
    floors_in_words,
    imported_files,
    imports,
    modules,
    upward,
)

# Packages that only one room may import, and never at the top of a module.
OWNED = {
    "deepspeed": {"engine"},
    "tensorboard": {"tracking"},
    "torch.utils.tensorboard": {"tracking"},
    "torch.utils.cpp_extension": {"kernels"},
}
MODULES = modules()
each = pytest.mark.parametrize("module", MODULES, ids=[module.name for module in MODULES])


def test_every_room_has_a_floor_and_code() -> None:
    assert {module.room for module in MODULES if module.room} == set(FLOOR)
    linked = {path.name for path in (ROOT / "mirai_ds").iterdir() if path.is_symlink()}
    assert linked == {"kernels", "jobs", "ds_configs"}
    assert {m.name for m in MODULES if not m.room} == {"__init__", "__main__", *FREE}


def test_no_import_points_up() -> None:
    assert upward(MODULES) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert file_circles(MODULES) == []


def test_circles_and_upward_imports_are_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    tree = ast.parse("from mirai_ds.train import loop\nfrom mirai_ds.config import build\nimport mirai_ds.study.arms")
    assert imported_files(tree, {"train.loop", "train", "config", "study.arms"}) == {
        "train.loop",
        "config",
        "study.arms",
    }
    assert upward([Module("config.wrong", "config", Path(), tree)]) == [
        "config.wrong (config) imports study", "config.wrong (config) imports train",
    ]  # fmt: skip


def test_no_room_holds_more_than_a_tenth() -> None:
    total = sum(module.lines for module in MODULES)
    for room in FLOOR:
        assert sum(module.lines for module in MODULES if module.room == room) <= LARGEST * total, room


def test_contributing_states_the_floors() -> None:
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split())
    assert floors_in_words() in text


@each
def test_heavy_packages_have_one_room(module: Module) -> None:
    for name, at_top in imports(module.tree):
        for package, owners in OWNED.items():
            if name == package or name.startswith(package + "."):
                assert module.room in owners, f"{module.name} imports {name}, which belongs to {owners}"
                assert not at_top, f"{module.name} imports {name} at the top"


@each
def test_sizes_names_and_docstrings(module: Module) -> None:
    assert module.lines <= 400, f"{module.name} is longer than 400 lines"
    assert module.path.stem not in {"utils", "util", "helpers", "common", "misc"}
    assert ast.get_docstring(module.tree), f"{module.name} has no docstring"
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 60, f"{module.name}: {node.name} has {lines} lines"
    for node in module.tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module.name}: {node.name} has no docstring"


def test_the_loop_fits_on_a_page() -> None:
    assert len((ROOT / "mirai_ds/train/loop.py").read_text(encoding="utf-8").splitlines()) <= 150


def modules_after(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has imported after running `code`."""
    code += "\nprint(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("module", [
    "mirai_ds", "mirai_ds.cli.main", "mirai_ds.config", "mirai_ds.config.deepspeed_file", "mirai_ds.checkpoint.store",
    "mirai_ds.runs.records", "mirai_ds.runs.lock",
    "mirai_ds.train.__main__",  # signals are caught and the launcher is watched before anything that takes seconds
])  # fmt: skip
def test_light_imports(module: str) -> None:
    assert not modules_after(f"import {module}") & {"deepspeed", "torch", "timm", "numpy", "sklearn"}


def test_sampling_needs_no_deepspeed() -> None:
    assert "deepspeed" not in modules_after("import mirai_ds.sampling.grid, mirai_ds.checkpoint.export")


def test_help_imports_almost_nothing() -> None:
    code = "import mirai_ds.cli.main as c\ntry: c.main(['--help'])\nexcept SystemExit: pass"
    assert not modules_after(code) & {"deepspeed", "torch", "pydantic", "numpy", "yaml", "rich", "sklearn"}
