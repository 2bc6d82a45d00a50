"""Imports point one way, heavy packages are imported in one room only, files and functions stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Rooms from the bottom up; a room may import those of earlier rows and itself.
LAYERS = [
    {"config", "runtime", "observe", "kernels", "tokenizer", "ds_configs", "jobs"},
    {"data", "model"},
    {"foresight", "extract"},
    {"engine"},
    {"checkpoint"},
    {"train"},
    {"eval"},
    {"hooks"},
    {"tools", "submit"},
    {"study"},
    {"commands"},
]
LEVEL = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}
# Packages that only one room may import, and never at the top of a module.
OWNED = {
    "deepspeed": {"engine"},
    "tensorboard": {"observe"},
    "torch.utils.tensorboard": {"observe"},
    "timm": {"foresight"},
    "torch.utils.cpp_extension": {"kernels"},
}
ENTRY_POINTS = {
    "cli.py", "__main__.py", "train/__main__.py", "extract/__main__.py", "tools/sampling/__main__.py",
    "tools/bench/startup.py",  # starts the command itself, with stamps
}  # fmt: skip


def sources() -> list[tuple[str, str, ast.Module]]:
    """(room, path below the package, syntax tree) of every module."""
    found = []
    for base, prefix in ((ROOT / "mirai_ds", ""), (ROOT / "kernels", "kernels/")):
        for path in sorted(base.rglob("*.py")):
            name = prefix + path.relative_to(base).as_posix()
            room = name.split("/")[0] if "/" in name else ""
            found.append((room, name, ast.parse(path.read_text(encoding="utf-8"))))
    return found


def imports(tree: ast.AST) -> list[tuple[str, bool]]:
    """(module, whether at the top level of the file) of every import."""
    top = set(ast.iter_child_nodes(tree))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, node in top))
    return found


SOURCES = sources()


def test_there_is_something_to_check() -> None:
    rooms = {room for room, _, _ in SOURCES}
    assert set().union(*LAYERS) - {"ds_configs", "jobs"} <= rooms


@pytest.mark.parametrize(("room", "name", "tree"), SOURCES, ids=[name for _, name, _ in SOURCES])
def test_imports_point_one_way(room: str, name: str, tree: ast.Module) -> None:
    if name in ENTRY_POINTS or not room:
        return
    for module, _ in imports(tree):
        parts = module.split(".")
        if parts[0] != "mirai_ds" or len(parts) < 2 or parts[1] == "version":
            continue
        assert parts[1] in LEVEL, f"{name} imports {module}: unknown room"
        assert LEVEL[parts[1]] <= LEVEL[room], f"{name} ({room}) imports {module}: that points up"
        assert parts[1] == room or LEVEL[parts[1]] < LEVEL[room] or LEVEL[room] == 0 or parts[1] in ("config",), (
            f"{name} ({room}) imports its neighbour {module}"
        )


@pytest.mark.parametrize(("room", "name", "tree"), SOURCES, ids=[name for _, name, _ in SOURCES])
def test_heavy_packages_have_one_room(room: str, name: str, tree: ast.Module) -> None:
    for module, at_top in imports(tree):
        for package, owners in OWNED.items():
            if module == package or module.startswith(package + "."):
                assert room in owners, f"{name} imports {module}, which belongs to {owners}"
                assert not at_top, f"{name} imports {module} at the top"


@pytest.mark.parametrize(("room", "name", "tree"), SOURCES, ids=[name for _, name, _ in SOURCES])
def test_sizes_names_and_docstrings(room: str, name: str, tree: ast.Module) -> None:
    base = ROOT if name.startswith("kernels/") else ROOT / "mirai_ds"
    assert (base / name).read_text(encoding="utf-8").count("\n") <= 400, f"{name} is longer than 400 lines"
    assert Path(name).stem not in {"utils", "util", "helpers", "common", "misc"}
    assert ast.get_docstring(tree), f"{name} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 60, f"{name}: {node.name} has {lines} lines"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{name}: {node.name} has no docstring"


def test_the_loop_fits_on_a_page() -> None:
    assert len((ROOT / "mirai_ds/train/loop.py").read_text(encoding="utf-8").splitlines()) <= 150


def test_rooms_are_small() -> None:
    for folder in {(ROOT / "mirai_ds" / name).parent for _, name, _ in SOURCES if not name.startswith("kernels/")}:
        files = [p for p in folder.glob("*.py") if p.name not in ("__init__.py", "__main__.py")]
        assert len(files) <= 10, f"{folder} has {len(files)} files"


@pytest.mark.parametrize(
    "module",
    ["mirai_ds", "mirai_ds.cli", "mirai_ds.config", "mirai_ds.config.deepspeed_file", "mirai_ds.checkpoint.store"],
)
def test_light_imports(module: str) -> None:
    """`import mirai_ds` and `mirai-ds --help` need neither deepspeed nor torch."""
    heavy = ("deepspeed", "torch", "timm", "numpy", "sklearn")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_sampling_needs_no_deepspeed() -> None:
    code = "import sys, mirai_ds.tools.sample, mirai_ds.tools.export; print('deepspeed' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_help_imports_almost_nothing() -> None:
    code = (
        "import sys, mirai_ds.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'deepspeed', 'torch', 'pydantic', 'numpy', 'yaml', 'rich', 'sklearn'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "[]"
    assert "train" in out.stdout
