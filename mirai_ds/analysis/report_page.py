"""One self-contained HTML page about runs; `mirai-ds report`.  Every text that is not ours is escaped."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mirai_ds.analysis import figures
from mirai_ds.analysis.inspect_run import RunReport, inspect_run, last_values
from mirai_ds.config import UserError, load, recipe_names
from mirai_ds.config.errors import shown
from mirai_ds.config.load import TWIN, paper_entry
from mirai_ds.paper.catalogue import numbers_of
from mirai_ds.paper.comparable import comparable_config, differences
from mirai_ds.paper.evaluations import Evaluation, read_evaluations
from mirai_ds.runs.records import Json, count_text, flatten, read_json, time_text
from mirai_ds.runtime.disk import write_whole
from mirai_ds.version import __version__

METRICS = {
    "fid": "FID", "sfid": "sFID", "inception_score": "IS", "precision": "precision", "recall": "recall",
    "frechet_distance": "Frechet distance",
}  # fmt: skip
# Title, unit, the metrics drawn (a name that ends in / stands for all that begin so), logarithmic.
CHARTS: tuple[tuple[str, str, tuple[str, ...], bool], ...] = (
    ("next-token loss, training batch", "nats a token", ("loss/ntp",), False),
    ("next-token loss, held out", "nats a token", ("held_out/",), False),
    ("alignment loss", "weighted, before lambda", ("loss/alignment",), False),
    ("cosine with the teacher", "cosine", ("cosine/",), False),
    ("cross-entropy of later tokens", "nats a token", ("entropy/",), False),
    ("learning rate", "", ("optimizer/lr",), False),
    ("lambda", "", ("foresight/lambda",), False),
    ("gradient norm before clipping", "", ("optimizer/grad_norm",), True),
    ("speed", "images/s", ("speed/images_per_s",), False),
    ("distance from real images", "", ("quality/fid", "quality/sfid", "quality/frechet_distance"), True),
    ("Inception Score", "", ("quality/inception_score",), False),
    ("precision, recall, recognised", "", ("quality/precision", "quality/recall", "score/"), False),
)
# Of how samples were drawn, what a reader asks first.
_SHORT = ("checkpoint_step", "weights", "cfg_scale", "cfg_interval", "temperature", "top_k", "top_p", "policy", "seed")
MOST_SAMPLES = 8
MOST_DEPARTURES = 5
_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#1c1c1c;background:#fff;max-width:1240px;margin:1.5rem auto;
padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2rem;border-bottom:1px solid #ccc}
h3{font-size:1rem;margin-bottom:.3rem}
table{border-collapse:collapse;margin:.5rem 0}th,td{border:1px solid #ccc;padding:.25rem .55rem;text-align:left;
vertical-align:top;overflow-wrap:break-word;max-width:34rem}th{background:#f3f3f3}td.n{text-align:right;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:.6rem}.charts img{width:100%}
.row{display:flex;flex-wrap:wrap;gap:.8rem}figure{margin:0;max-width:100%}figcaption{font-size:.8rem;color:#555}
.row img{max-width:280px;height:auto;image-rendering:auto}.maps img{max-width:100%}.note{color:#555;font-size:.9rem}
@media print{body{max-width:none;margin:0}h2{break-after:avoid}figure,tr{break-inside:avoid}}
"""
# Nothing may be loaded and nothing may run, whatever a run's files say.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(runs: Sequence[Path], out: Path) -> str:
    """Write the page; a line that says so.  Raises UserError for what is no run, and when it cannot be written."""
    reports = [inspect_run(run) for run in runs]
    text = page(reports)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, text)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error})") from None
    return f"{out}: {count_text(len(runs), 'run')}, {len(text) / 1e6:.1f} MB"


def page(reports: Sequence[RunReport]) -> str:
    """The whole document."""
    names = labels(reports)
    title = "mirai_ds report: " + ", ".join(names)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="note">mirai_ds {escape(__version__)}, {escape(time_text(time.time()))}</p>',
        *_section("How they ended", _ends(reports, names)),
        *_section("Scores", _scores(reports, names)),
        *_section("Settings that differ" if len(reports) > 1 else "Settings", _settings(reports, names)),
        *_section("Curves", _curves(reports, names)),
        *_section("Samples over time", _samples(reports, names)),
        *_section("Token maps", _maps(reports, names)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def labels(reports: Sequence[RunReport]) -> list[str]:
    """The runs' names; with the path where two are alike."""
    counts = Counter(report.name for report in reports)
    return [r.name if counts[r.name] == 1 else f"{r.name} ({r.path})" for r in reports]


def _section(title: str, parts: Iterable[str]) -> Iterator[str]:
    found = list(parts)
    if found:
        yield f"<section><h2>{escape(title)}</h2>"
        yield from found
        yield "</section>"


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Numbers to the right; everything escaped."""
    lines = ["<table><thead><tr>", *(f"<th>{escape(cell)}</th>" for cell in header), "</tr></thead><tbody>"]
    for row in rows:
        lines += ["<tr>", *map(_cell, row), "</tr>"]
    return "".join(lines) + "</tbody></table>"


class Html(str):
    """A cell that is markup already; its author has escaped what is in it."""


def _cell(value: Any) -> str:
    if isinstance(value, Html):
        return f"<td>{value}</td>"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'<td class="n">{_number(value)}</td>'
    return f"<td>{escape(str(value))}</td>"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else escape(f"{value:.5g}")


def _figure(uri: str, caption: str) -> str:
    return f'<figure><img src="{uri}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'


# --- sections -------------------------------------------------------------------------------------------------------


def _ends(reports: Sequence[RunReport], names: Sequence[str]) -> Iterator[str]:
    rows = []
    for report, name in zip(reports, names, strict=True):
        steps = report.curve.steps
        outcome = ": ".join(part for part in report.outcome if part) if report.outcome else "no outcome written"
        began = report.starts[0].text if report.starts else "unknown"
        rows.append((
            name, str(report.path), steps[-1] if steps else 0, outcome, count_text(len(report.starts), "start"), began,
            count_text(len(report.checkpoints), "checkpoint"),
        ))  # fmt: skip
    yield _table(("run", "folder", "last step", "outcome", "starts", "first start", "checkpoints"), rows)
    for report, name in zip(reports, names, strict=True):
        said = [*report.notes, *report.damages]
        said += [f"non-finite step recorded: {one}" for one in report.nonfinite]
        said += [f"hang recorded: {one}" for one in report.hang]
        for note in said:
            yield f'<p class="note">{escape(f"{name}: {note}")}</p>'


def _scores(reports: Sequence[RunReport], names: Sequence[str]) -> Iterator[str]:
    rows: list[tuple[str, str, dict[str, float], str]] = []
    notes = []
    for report, name in zip(reports, names, strict=True):
        evaluations, problems = read_evaluations(report.path)
        rows += [(name, one.path.stem, one.values, _about(one)) for one in evaluations]
        notes += problems
        recipe = recipe_of(report.name)
        printed = paper_numbers(recipe) if recipe else []
        rows += [(f"{name}: the paper's", f"{epochs} epochs", values, source) for epochs, values, source in printed]
        if recipe and printed:
            notes += [f"{name} is not the paper's run: {one}" for one in _departures(report, recipe)[:MOST_DEPARTURES]]
    told = [metric for metric in METRICS if any(metric in values for _, _, values, _ in rows)]
    if rows:
        cells = [(run, title, *(values.get(m, "") for m in told), about) for run, title, values, about in rows]
        yield _table(("run", "evaluation", *(METRICS[metric] for metric in told), "protocol"), cells)
    for note in notes:
        yield f'<p class="note">{escape(note)}</p>'
    plain = []
    for report, name in zip(reports, names, strict=True):
        last = last_values(report.curve)
        plain += [
            (name, metric, last[metric][1], last[metric][0])
            for metric in sorted(last)
            if metric.startswith(("held_out/", "score/", "quality/"))
        ]
    if plain:
        yield "<h3>Last values in the run</h3>"
        yield _table(("run", "metric", "value", "step"), plain)


def _about(one: Evaluation) -> Html:
    """Under which protocol: in short, and folded away all that the file says."""
    named = one.reference.get("name")
    standard = "" if one.reference.get("standard") else " (not the published one)"
    short = [f"{one.num_samples} images", f"reference {named}{standard}"]
    short += [f"{key} {shown(one.sampling[key])}" for key in _SHORT if one.sampling.get(key) is not None]
    told = {"num_samples": one.num_samples, "reference": one.reference, "protocol": one.protocol}
    everything = ", ".join(f"{key} {shown(value)}" for key, value in flatten(told).items() if value is not None)
    summary = escape(", ".join(short))
    return Html(f"<details><summary>{summary}</summary>{escape(everything)}</details>")


def recipe_of(name: str) -> str | None:
    """The shipped recipe that a run's name is of, a twin's too; None for another name."""
    for recipe in (name, name.removesuffix("-paper")):
        if recipe in recipe_names():
            return recipe
    return None


def paper_numbers(recipe: str) -> list[tuple[int, dict[str, float], str]]:
    """(epochs, numbers, source) that the paper has of a shipped recipe, also where another recipe carries them."""
    entry = paper_entry(recipe)
    found = [(epochs, numbers_of(entry, epochs)) for epochs in sorted(entry.numbers)] if entry else []
    return [(epochs, one.values(), one.source) for epochs, one in found if one is not None]


def _departures(report: RunReport, recipe: str) -> list[str]:
    """In what a run is not the recipe whose numbers stand beside it."""
    if report.config is None:
        return ["its configuration cannot be read whole"]
    theirs = load(recipe + TWIN if report.name != recipe else recipe)
    epochs = report.config.train.epochs
    return differences(comparable_config(report.config, epochs), comparable_config(theirs, epochs))


_MAIN = (
    "model.", "foresight.", "optimizer.", "train.", "ema.", "data.source", "data.path", "sampling.cfg_scale", "seed",
    "deepspeed",
)  # fmt: skip


def _settings(reports: Sequence[RunReport], names: Sequence[str]) -> Iterator[str]:
    flat = [flatten(report.raw) for report in reports]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    if len(reports) > 1:
        keys = [key for key in keys if any(one.get(key, ...) != flat[0].get(key, ...) for one in flat)]
        if not keys:
            yield "<p>None: the runs have the same configuration.</p>"
            return
    else:
        keys = [key for key in keys if key.startswith(_MAIN) and flat[0][key] is not None]
    rows = [(key, *(shown(one[key], 90) if key in one else "not there" for one in flat)) for key in keys]
    if rows:
        yield _table(("setting", *names), rows)


def _curves(reports: Sequence[RunReport], names: Sequence[str]) -> Iterator[str]:
    drawn = []
    for title, unit, wanted, log in CHARTS:
        curves = {}
        for report, name in zip(reports, names, strict=True):
            for metric in sorted(report.curve.values):
                group = next((w for w in wanted if metric == w or (w.endswith("/") and metric.startswith(w))), None)
                if group is not None:
                    part = metric.removeprefix(group) if group.endswith("/") else ""
                    curves[f"{name} {part}".strip()] = report.curve.values[metric]
        uri = figures.chart(title, curves, unit, log and all(v > 0 for c in curves.values() for v in c.values()))
        if uri is not None:
            drawn.append(f'<figure><img src="{uri}" alt="{escape(title)}"></figure>')
    if drawn:
        yield '<div class="charts">' + "\n".join(drawn) + "</div>"


def _samples(reports: Sequence[RunReport], names: Sequence[str]) -> Iterator[str]:
    for report, name in zip(reports, names, strict=True):
        files = sorted((report.path / "samples").glob("step-*.png"))
        found = [(path, figures.picture(path)) for path in figures.spread(files, MOST_SAMPLES)]
        row = [_figure(uri, path.stem) for path, uri in found if uri is not None]
        if row:
            left_out = f", {len(row)} of {len(files)}" if len(row) < len(files) else ""
            yield f'<h3>{escape(name)}{left_out}</h3><div class="row">' + "\n".join(row) + "</div>"


def _maps(reports: Sequence[RunReport], names: Sequence[str]) -> Iterator[str]:
    for report, name in zip(reports, names, strict=True):
        for path in sorted((report.path / "maps").glob("*.png")):
            uri = figures.picture(path)
            if uri is None:
                continue
            yield f'<h3>{escape(f"{name}: {path.stem}")}</h3><div class="maps">{_figure(uri, path.stem)}</div>'
            rows = _map_rows(read_json(path.with_suffix(".json")) or {})
            if rows:
                header = ("run", "layer", "weights", "images", "neighbours", "all pairs", "smoothness", "95 % ±")
                yield _table(header, rows)


def _map_rows(record: Json) -> list[tuple[Any, ...]]:
    keys = (
        "run", "layer", "weights", "images", "neighbour_cosine", "random_pair_cosine", "smoothness", "ci95"
    )  # fmt: skip
    rows = record.get("runs")
    return [
        tuple("" if row.get(key) is None else row[key] for key in keys)
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict)
    ]
