"""The data of `mirai-ds report`, one self-contained HTML page about runs; `report.html.j2` is the page's template."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mirai_ds.analysis import figures
from mirai_ds.analysis.inspect_run import RunReport, inspect_run, last_values, lowest_values
from mirai_ds.config import UserError, load, recipe_names
from mirai_ds.config.errors import shown
from mirai_ds.config.load import TWINS
from mirai_ds.paper.catalogue import numbers_at_marks, paper_recipes
from mirai_ds.paper.comparable import comparable_config, differences
from mirai_ds.paper.evaluations import Evaluation, protocol_differences, read_evaluations
from mirai_ds.paper.published import STEPS_PER_EPOCH
from mirai_ds.runs.records import count_text, flatten, read_json, time_text
from mirai_ds.runtime.disk import write_whole
from mirai_ds.version import __version__

Row = tuple[Any, ...]
Named = tuple[str, RunReport]  # a run under the name that the page has for it
METRICS = {
    "fid": "FID", "sfid": "sFID", "inception_score": "IS", "precision": "precision", "recall": "recall",
    "frechet_distance": "Frechet distance",
}  # fmt: skip
# Title, unit, the metrics drawn (a name that ends in / stands for all that begin so), logarithmic.
CHARTS: tuple[tuple[str, str, tuple[str, ...], bool], ...] = (
    ("next-token loss, training batch", "nats a token", ("loss/ntp",), False),
    ("next-token loss, held out", "nats a token", ("held_out/",), False),
    ("alignment loss", "heads weighted by lambda, before its schedule", ("loss/alignment",), False),
    ("cosine with the teacher", "cosine", ("cosine/",), False),
    ("cross-entropy of later tokens", "nats a token", ("entropy/",), False),
    ("learning rate", "", ("optimizer/lr",), False),
    ("lambda of each head", "", ("foresight/lambda/",), False),
    # Earlier versions called the schedule's multiplier lambda.
    ("schedule of lambda", "multiplier", ("foresight/schedule", "foresight/lambda"), False),
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
    """The whole document; `report.html.j2` is its template."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # here: the command line starts without it

    names = labels(reports)
    named = list(zip(names, reports, strict=True))
    loader = PackageLoader("mirai_ds.analysis", "")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    charts = [*_fid_chart(named), *_charts(named)]
    return environment.get_template("report.html.j2").render(
        title="mirai_ds report: " + ", ".join(names), version=__version__, time=time_text(time.time()), names=names,
        **_ends(named), **_scores(named), settings=_settings(reports), charts=charts,
        samples=list(_samples(named)), maps=list(_maps(named)),
    )  # fmt: skip


def labels(reports: Sequence[RunReport]) -> list[str]:
    """The runs' names; with the path where two are alike."""
    counts = Counter(report.name for report in reports)
    return [r.name if counts[r.name] == 1 else f"{r.name} ({r.path})" for r in reports]


def _ends(named: Sequence[Named]) -> dict[str, list[Any]]:
    rows, notes = [], []
    for name, report in named:
        steps = report.curve.steps
        outcome = ": ".join(part for part in report.outcome if part) if report.outcome else "no outcome written"
        began = report.starts[0].text if report.starts else "unknown"
        rows.append((
            name, report.path, steps[-1] if steps else 0, outcome, count_text(len(report.starts), "start"), began,
            count_text(len(report.checkpoints), "checkpoint"),
        ))  # fmt: skip
        said = [*report.notes, *report.damages]
        said += [f"non-finite step recorded: {step}" for step in report.nonfinite]
        said += [f"hang recorded: {hang}" for hang in report.hang]
        notes += [f"{name}: {note}" for note in said]
    return {"ends": rows, "end_notes": notes}


def _scores(named: Sequence[Named]) -> dict[str, list[Any]]:
    """Evaluations with the paper's numbers below them, of the metrics that any has, and the run's own last values."""
    scores: list[tuple[str, str, dict[str, float], Any]] = []
    notes, last = [], []
    for name, report in named:
        evaluations, problems = read_evaluations(report.path)
        scores += [(name, one.path.stem, one.values, _about(one)) for one in evaluations]
        notes += problems
        recipe = recipe_of(report.name)
        printed = numbers_at_marks(recipe) if recipe else []
        scores += [
            (f"{name}: the paper's", f"{steps / STEPS_PER_EPOCH:g} epochs", numbers.values, numbers.source)
            for steps, numbers in printed
        ]
        if recipe and printed:
            notes += [f"{name} is not the paper's run: {one}" for one in _departures(report, recipe)[:MOST_DEPARTURES]]
        lowest = lowest_values(report.curve)
        for metric, (step, value) in sorted(last_values(report.curve).items()):
            if metric.startswith(("held_out/", "score/", "quality/")):
                low_step, low = lowest.get(metric, (None, None))
                last.append((name, metric, value, step, low, low_step))
    told = [metric for metric in METRICS if any(metric in values for _, _, values, _ in scores)]
    rows = [(run, title, *(values.get(m, "") for m in told), about) for run, title, values, about in scores]
    return {"metrics": [METRICS[m] for m in told], "scores": rows, "score_notes": notes, "last_values": last}


def _about(one: Evaluation) -> dict[str, str]:
    """Under which protocol: in short, and folded away all that the file says."""
    named = one.reference.get("name")
    standard = "" if one.reference.get("standard") else " (not the published one)"
    short = [f"{one.num_samples} images", f"reference {named}{standard}"]
    short += [f"{key} {shown(one.sampling[key])}" for key in _SHORT if one.sampling.get(key) is not None]
    told = {"num_samples": one.num_samples, "reference": one.reference, "protocol": one.protocol}
    everything = ", ".join(f"{key} {shown(value)}" for key, value in flatten(told).items() if value is not None)
    return {"short": ", ".join(short), "everything": everything}


def recipe_of(name: str) -> str | None:
    """The shipped recipe that a run's name is of, a twin's too; None for another name."""
    if name in recipe_names():
        return name
    for twin in TWINS:
        recipe = name.removesuffix(f"-{twin[1:]}")
        if recipe != name and recipe in recipe_names() and load(recipe).foresight.active:  # others have no twin
            return recipe
    return None


def _departures(report: RunReport, recipe: str) -> list[str]:
    """Settings in which a run differs from the recipe whose numbers stand beside it."""
    if report.config is None:
        return ["its configuration cannot be read whole"]
    theirs = load(recipe + report.name.removeprefix(recipe).replace("-", "@", 1))
    epochs = report.config.train.epochs
    return differences(comparable_config(report.config, epochs), comparable_config(theirs, epochs))


_MAIN = (
    "model.", "foresight.", "optimizer.", "train.", "ema.", "data.source", "data.path", "data.more_views",
    "sampling.cfg_scale", "seed", "deepspeed",
)  # fmt: skip


def _settings(reports: Sequence[RunReport]) -> list[Row]:
    """Rows of one run's main settings, or of several runs' settings that differ."""
    flat = [flatten(report.raw) for report in reports]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    if len(reports) > 1:
        keys = [key for key in keys if any(settings.get(key, ...) != flat[0].get(key, ...) for settings in flat)]
    else:
        keys = [key for key in keys if key.startswith(_MAIN) and flat[0][key] is not None]
    return [(key, *(shown(settings[key], 90) if key in settings else "not there" for settings in flat)) for key in keys]


def _fid_chart(named: Sequence[Named]) -> Iterator[tuple[str, str]]:
    """The paper's Fig. 7 of these runs: FID of evaluations over epochs, the paper's numbers beside them."""
    measured: dict[str, dict[float, float]] = {}
    printed: dict[str, dict[float, float]] = {}
    for name, report in named:
        recipe, steps_per_epoch = recipe_of(report.name), _steps_per_epoch(report)
        if steps_per_epoch is None:
            continue
        for one in read_evaluations(report.path)[0]:
            if one.step is not None and "fid" in one.values:
                epoch = one.step / steps_per_epoch
                measured.setdefault(name + _other_protocol(one, report), {})[epoch] = one.values["fid"]
        for steps, numbers in numbers_at_marks(recipe) if recipe else []:
            printed.setdefault(name, {})[steps / STEPS_PER_EPOCH] = numbers.values["fid"]
    title = "FID over epochs"
    uri = figures.chart(title, measured, "FID", xlabel="epoch", paper=printed)
    if uri is not None:
        yield title, uri


def _steps_per_epoch(report: RunReport) -> float | None:
    """As the run recorded it; ImageNet's for a shipped recipe that has recorded nothing yet."""
    recorded = [(step, epoch) for step, epoch in report.curve.epochs.items() if epoch > 0]
    if recorded:
        step, epoch = max(recorded)
        return step / epoch
    return STEPS_PER_EPOCH if recipe_of(report.name) in paper_recipes() else None


def _other_protocol(one: Evaluation, report: RunReport) -> str:
    """What sets an evaluation apart that is not by the paper's protocol; nothing for one that is."""
    sampling = report.config.sampling if report.config is not None else None
    return "" if sampling is not None and not protocol_differences(one, sampling) else ", another protocol"


def _charts(named: Sequence[Named]) -> Iterator[tuple[str, str]]:
    for title, unit, wanted, log in CHARTS:
        curves = {}
        for name, report in named:
            for metric in sorted(report.curve.values):
                group = next((w for w in wanted if metric == w or (w.endswith("/") and metric.startswith(w))), None)
                if group is not None:
                    part = metric.removeprefix(group) if group.endswith("/") else ""
                    curves[f"{name} {part}".strip()] = report.curve.values[metric]
        uri = figures.chart(title, curves, unit, log and all(v > 0 for c in curves.values() for v in c.values()))
        if uri is not None:
            yield title, uri


def _samples(named: Sequence[Named]) -> Iterator[tuple[str, dict[str, str]]]:
    for name, report in named:
        files = sorted((report.path / "samples").glob("step-*.png"))
        pictures = {f.stem: uri for f in figures.spread(files, MOST_SAMPLES) if (uri := figures.picture(f)) is not None}
        if pictures:
            yield name + (f", {len(pictures)} of {len(files)}" if len(pictures) < len(files) else ""), pictures


def _maps(named: Sequence[Named]) -> Iterator[tuple[str, str, str, list[Row]]]:
    keys = ("run", "layer", "weights", "images", "neighbour_cosine", "random_pair_cosine", "smoothness", "ci95")
    for name, report in named:
        for path in sorted((report.path / "maps").glob("*.png")):
            if (uri := figures.picture(path)) is not None:
                rows = (read_json(path.with_suffix(".json")) or {}).get("runs")
                told = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
                yield name, path.stem, uri, [tuple(map(row.get, keys)) for row in told]
