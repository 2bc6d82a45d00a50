"""Imports point one way and in no circles, heavy packages have one room, files and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
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
    "wandb": {"tracking"},
    "torch.utils.cpp_extension": {"kernels"},
}
MODULES = modules()


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


def stray_imports(module: Module) -> Iterator[str]:
    """Imports of packages that belong to another room, or stand at the top."""
    for name, at_top in imports(module.tree):
        for package, owners in OWNED.items():
            if name == package or name.startswith(package + "."):
                if module.room not in owners:
                    yield f"{module.name} imports {name}, which belongs to {owners}"
                if at_top:
                    yield f"{module.name} imports {name} at the top"


def test_heavy_packages_have_one_room() -> None:
    assert [text for module in MODULES for text in stray_imports(module)] == []
    tree = ast.parse("import deepspeed\ndef f():\n    import torch.utils.tensorboard")
    assert [*stray_imports(Module("data.wrong", "data", Path(), tree))] == [
        "data.wrong imports deepspeed, which belongs to {'engine'}", "data.wrong imports deepspeed at the top",
        "data.wrong imports torch.utils.tensorboard, which belongs to {'tracking'}",
    ]  # fmt: skip


def untidy(module: Module) -> Iterator[str]:
    """Sizes, names and docstrings that are not as they should be."""
    if module.lines > 400:
        yield f"{module.name} is longer than 400 lines"
    if module.path.stem in {"utils", "util", "helpers", "common", "misc"}:
        yield f"{module.name} says nothing by its name"
    if not ast.get_docstring(module.tree):
        yield f"{module.name} has no docstring"
    for node in ast.walk(module.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > 60:
                yield f"{module.name}: {node.name} has {lines} lines"
    for node in module.tree.body:
        named = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        if named and not ast.get_docstring(node):  # type: ignore[arg-type]
            yield f"{module.name}: {node.name} has no docstring"  # type: ignore[union-attr]


def test_sizes_names_and_docstrings(tmp_path: Path) -> None:
    assert [text for module in MODULES for text in untidy(module)] == []
    path = tmp_path / "helpers.py"
    path.write_text("def f():\n" + "    x = 1\n" * 60)
    assert [*untidy(Module("data.helpers", "data", path, ast.parse(path.read_text())))] == [
        "data.helpers says nothing by its name", "data.helpers has no docstring", "data.helpers: f has 61 lines",
        "data.helpers: f has no docstring",
    ]  # fmt: skip


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
