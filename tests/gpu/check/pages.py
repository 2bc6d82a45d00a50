"""Tables of the documentation, made from docs/results/gpu.csv, between `<!-- gpu:NAME -->` and `<!-- /gpu -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

Row = dict[str, str]
Pair = tuple[str, str]
MARKED = re.compile(r"(<!-- gpu:([a-z-]+) -->\n).*?(<!-- /gpu -->)", re.DOTALL)
ORDER = ("GPT-B", "GPT-L", "GPT-XL")
NOTHING = "No rows yet: `make gpu-check` measures it."


def origins(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by where, when and at what commit they were measured: times are compared within one of them only."""
    found: dict[str, list[Row]] = {}
    for r in rows:
        driver = f" (driver {r['driver']})" if r["driver"] else ""
        told = (
            f"{r['card']}{driver}, torch {r['torch']}, DeepSpeed {r['deepspeed']}, {r['date']}, commit {r['commit']}:"
        )
        found.setdefault(told, []).append(r)
    return found


def each_origin(rows: list[Row], make: Callable[[list[Row]], list[str]]) -> list[str]:
    """A table for each origin, with a line that names it."""
    lines: list[str] = []
    for told, own in origins(rows).items():
        lines += [*([""] if lines else []), told, "", *make(own)]
    return lines or [NOTHING]


def of(rows: Iterable[Row], *subjects: str) -> list[Row]:
    """Rows of some subjects."""
    return [r for r in rows if r["subject"] in subjects]


def number(text: str) -> str:
    """Three digits or more, thousands apart; whole numbers whole."""
    value = float(text)
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:,.1f}" if 100 <= abs(value) < 1e6 else f"{value:.4g}" if abs(value) < 100 else f"{value:.3g}"


def markdown(head: tuple[str, ...], lines: Iterable[tuple[str, ...]], left: int) -> list[str]:
    """A table whose first `left` columns are text."""
    rule = "|" + "---|" * left + "---:|" * (len(head) - left)
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(cells)} |" for cells in lines)]


def size_key(r: Row) -> tuple[int, int]:
    """Small models first, then small batches."""
    return (ORDER.index(r["model"]) if r["model"] in ORDER else len(ORDER), int(r["batch"] or 0))


def by_batch(rows: list[Row], metric: str) -> tuple[list[Pair], dict[Pair, dict[Pair, str]]]:
    """The (model, batch) there are, smallest first, and values by (method, variant) and those."""
    columns = list(dict.fromkeys((r["model"], r["batch"]) for r in sorted(rows, key=size_key) if r["metric"] == metric))
    found: dict[Pair, dict[Pair, str]] = {}
    for r in rows:
        if r["metric"] == metric:
            told = f"{float(r['value']):.2f}" if metric == "mfu" else number(r["value"])
            found.setdefault((r["method"], r["variant"]), {})[r["model"], r["batch"]] = told
    return columns, found


def steps(rows: list[Row]) -> list[str]:
    """Milliseconds a step by arm and batch; MFU; device time and launches of the smallest."""

    def make(own: list[Row]) -> list[str]:
        columns, times = by_batch(own, "step")
        extra = {name: by_batch(own, name)[1] for name in ("mfu", "device time", "launches and copies")}
        sizes = [f"{model.removeprefix('GPT-')} {batch}" for model, batch in columns]
        head = ("method", "arm", *(f"{size}, ms" for size in sizes), "MFU of each", f"device ms of {sizes[0]}",
                "launches and copies")  # fmt: skip
        lines = []
        for arm, found in times.items():
            values = {name: table.get(arm, {}) for name, table in extra.items()}
            mfu = " / ".join(values["mfu"].get(c, "-") for c in columns) if values["mfu"] else ""
            rest = [next(iter(values[name].values()), "") for name in ("device time", "launches and copies")]
            lines.append((*arm, *(found.get(c, "") for c in columns), mfu, *rest))
        return markdown(head, lines, 2)

    return each_origin(of(rows, "train step"), make)


def parts(rows: list[Row]) -> list[str]:
    """Device time of a step by kind of kernel, a line a step."""

    def make(own: list[Row]) -> list[str]:
        kinds = list(dict.fromkeys(r["metric"] for r in own))
        found: dict[str, dict[str, str]] = {}
        for r in own:
            what = f"{r['model']}, {r['method']}, {r['batch']}, {r['variant']}"
            found.setdefault(what, {})[r["metric"]] = number(r["value"])
        return markdown(("ms a step", *kinds), [(what, *(v.get(k, "") for k in kinds)) for what, v in found.items()], 1)

    return each_origin(of(rows, "device time of a step"), make)


def listed(rows: list[Row], *subjects: str) -> list[str]:
    """A line a row: for what is few and of many kinds."""

    def make(own: list[Row]) -> list[str]:
        lines = []
        for r in own:
            what = ", ".join(
                part for part in (r["model"], r["method"], r["batch"], r["precision"], r["variant"]) if part
            )
            lines.append((r["subject"], what, r["metric"], f"{number(r['value'])} {r['unit']}".strip()))
        return markdown(("what", "of", "measured", "value"), lines, 3)

    return each_origin(of(rows, *subjects), make)


def sampling(rows: list[Row]) -> list[str]:
    """Milliseconds a batch by variant, model and batch."""

    def make(own: list[Row]) -> list[str]:
        columns, times = by_batch(own, "batch")
        head = ("variant", *(f"{model.removeprefix('GPT-')} {batch}, ms a batch" for model, batch in columns))
        return markdown(head, [(arm[1], *(f.get(c, "") for c in columns)) for arm, f in times.items()], 1)

    return each_origin(of(rows, "sampling"), make)


def alignment(rows: list[Row]) -> list[str]:
    """The alignment kernel, its traffic, and how many times as long the others take."""

    def make(own: list[Row]) -> list[str]:
        tasks: dict[tuple[str, ...], dict[tuple[str, str], str]] = {}
        for r in own:
            task = (r["model"], f"Mirai-{r['method']}", r["batch"], r["precision"])
            tasks.setdefault(task, {})[r["variant"], r["metric"]] = r["value"]
        head = ("model, method, batch", "dtype", "fused, ms", "TB/s", "copy, TB/s", "torch.compile", "eager",
                "extra memory / gradient")  # fmt: skip
        lines = []
        for task, v in tasks.items():
            rates = [f"{float(v[name, 'traffic']) / 1e3:.1f}" for name in ("fused", "copy")]
            ratios = [f"{float(v[name, 'ratio']):.1f}x" for name in ("compiled", "eager")]
            share = float(v["fused", "extra memory"]) / float(v["fused", "gradient"])
            lines.append(
                (", ".join(task[:3]), task[3], f"{float(v['fused', 'time']):.3g}", *rates, *ratios, f"{share:.2f}")
            )
        return markdown(head, lines, 2)

    return each_origin(of(rows, "foresight_cosine"), make)


def data(rows: list[Row]) -> list[str]:
    """Loading and extraction."""

    def make(own: list[Row]) -> list[str]:
        ratio = {(r["subject"], r["variant"]): r["value"] for r in own if r["metric"] == "ratio"}
        lines = []
        for r in own:
            if r["metric"] == "speed":
                what = r["subject"], r["variant"]
                lines.append((*what, f"{number(r['value'])} {r['unit']}", f"{float(ratio[what]):.2f}x"))
        return markdown(("task", "variant", "speed", "ratio"), lines, 2)

    return each_origin(of(rows, "loader", "views", "extract"), make)


def memory(rows: list[Row]) -> list[str]:
    """The allocator's peak beside the plan's."""

    def make(own: list[Row]) -> list[str]:
        cases: dict[tuple[str, ...], dict[str, str]] = {}
        for r in own:
            case = (r["model"], r["method"], r["batch"], r["precision"], r["variant"])
            cases.setdefault(case, {})[r["metric"]] = number(r["value"])
        head = ("model, method, micro batch", "precision", "layout", "measured MB", "planned MB", "error, %")
        lines = [
            (", ".join(c[:3]), *c[3:], *(v[m] for m in ("measured", "planned", "error"))) for c, v in cases.items()
        ]
        return markdown(head, lines, 3)

    return each_origin(of(rows, "memory"), make)


TABLES: dict[str, Callable[[list[Row]], list[str]]] = {
    "step": steps, "parts": parts, "sampling": sampling, "alignment": alignment, "data": data, "memory": memory,
    "training": lambda rows: listed(rows, "training"), "losses": lambda rows: listed(rows, "losses"),
    "checks": lambda rows: listed(rows, "registers", "tests", "sanitizer", "demo"),
    "saves": lambda rows: listed(rows, "step guards", "save"),
}  # fmt: skip


def written(page: str, rows: list[Row]) -> str:
    """The page with every table made anew.  Raises KeyError for a name that is none."""
    return MARKED.sub(lambda found: found[1] + "\n".join(TABLES[found[2]](rows)) + "\n" + found[3], page)


def marked(root: Path) -> list[Path]:
    """Pages with such tables."""
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return [path for path in pages if path.is_file() and "<!-- gpu:" in path.read_text(encoding="utf-8")]


def write(root: Path, rows: list[Row]) -> list[str]:
    """Make all tables anew; the names of pages that changed."""
    changed = []
    for path in marked(root):
        before = path.read_text(encoding="utf-8")
        after = written(before, rows)
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(path.name)
    return changed
