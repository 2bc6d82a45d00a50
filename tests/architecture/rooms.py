"""The rooms of the package, from the ground up, and what its files import: `python -m tests.architecture.rooms` prints
sizes, imports that point up and circles."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# A room may import those of earlier rows, and itself.
FLOORS = (
    ("config",),
    ("runtime", "kernels"),
    ("runs", "tracking", "tokenizer", "model", "submit"),
    ("foresight", "checkpoint", "data"),
    ("engine", "eval", "resumable"),
    ("extract", "planning", "sampling"),
    ("train", "proposal"),
    ("benchmarks", "paper"),
    ("selfcheck", "analysis", "library"),
    ("study",),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FREE = {"version"}  # anybody may import it
LARGEST = 0.10  # of all lines


@dataclass(frozen=True)
class Module:
    """One file: its dotted name below `mirai_ds`, its room ("" at the top level), path and syntax tree."""

    name: str
    room: str
    path: Path
    tree: ast.Module

    @property
    def lines(self) -> int:
        """Number of lines."""
        return self.path.read_text(encoding="utf-8").count("\n")


def modules() -> list[Module]:
    """All modules of the package; `kernels` lies at the top level and is linked into it."""
    found = []
    for base, above in ((ROOT / "mirai_ds", ()), (ROOT / "kernels", ("kernels",))):
        for path in sorted(base.rglob("*.py")):
            parts = (*above, *path.relative_to(base).with_suffix("").parts)
            room = parts[0] if len(parts) > 1 else ""
            found.append(Module(".".join(parts), room, path, ast.parse(path.read_text(encoding="utf-8"))))
    return found


def imports(tree: ast.AST) -> list[tuple[str, bool]]:
    """(module, whether at the top level of the file) of every import; of `from a import b` both a and a.b."""
    top = set(ast.iter_child_nodes(tree))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, node in top))
            found += [(f"{node.module}.{alias.name}", node in top) for alias in node.names]
    return found


def imported_files(tree: ast.AST, names: Container[str]) -> set[str]:
    """Modules among `names` (below mirai_ds) that are imported: of `from a import b` a.b where that is one, else a."""
    wanted = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted |= {alias.name.removeprefix("mirai_ds.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            package = node.module.removeprefix("mirai_ds.")
            parts = {f"{package}.{alias.name}" for alias in node.names}
            wanted |= {part if part in names else package for part in parts}
    return {name for name in wanted if name in names}


def imported_rooms(module: Module) -> set[str]:
    """Other rooms of this package that a module imports, at its top level or inside a function."""
    names = [name.split(".") for name, _ in imports(module.tree)]
    rooms = {parts[1] for parts in names if parts[0] == "mirai_ds" and len(parts) > 1}
    return {room for room in rooms if room in FLOOR} - {module.room}


def upward(all_modules: Iterable[Module]) -> list[str]:
    """Imports of a room on the same floor or above, in words."""
    return [
        f"{module.name} ({module.room}) imports {room}"
        for module in all_modules
        if module.room
        for room in sorted(imported_rooms(module))
        if FLOOR[room] >= FLOOR[module.room]
    ]


def file_circles(all_modules: Iterable[Module]) -> list[list[str]]:
    """Groups of files that import each other in a circle, whether at the top level or inside functions."""
    names = {module.name.removesuffix(".__init__") for module in all_modules}
    graph = {}
    for module in all_modules:
        own = module.name.removesuffix(".__init__")
        graph[own] = imported_files(module.tree, names) - {own}
    return circles(graph)


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node."""
    reached = {node: _reachable(graph, node) for node in graph}
    groups = {frozenset(other for other in reached[node] if node in reached[other]) | {node} for node in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for node in graph.get(waiting.pop(), ()):
            if node not in seen:
                seen.add(node)
                waiting.append(node)
    return seen


def floors_in_words() -> str:
    """The floors as CONTRIBUTING.md states them."""
    return " <- ".join(rooms[0] if len(rooms) == 1 else f"({', '.join(rooms)})" for rooms in FLOORS)


def main() -> None:
    """Print the rooms from the ground up, then what is wrong."""
    everything = modules()
    sizes = Counter[str]()
    for module in everything:
        sizes[module.room] += module.lines
    total = sum(sizes.values())
    for floor, rooms in enumerate(FLOORS, start=1):
        for room in rooms:
            below = sorted({other for m in everything if m.room == room for other in imported_rooms(m)})
            print(f"{floor:2d} {room:12s} {sizes[room]:5d} {sizes[room] / total:5.1%}  imports {', '.join(below)}")
    up, around = upward(everything), file_circles(everything)
    print(f"{total} lines in {len(everything)} files; upward imports: {len(up)}; circles of files: {len(around)}")
    for line in [*up, *(" <-> ".join(circle) for circle in around)]:
        print(f"  {line}")


if __name__ == "__main__":
    main()
