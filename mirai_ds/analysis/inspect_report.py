"""A run folder's description for people (rich) and for programs (JSON)."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mirai_ds.analysis.checkpoints import Checkpoint
from mirai_ds.analysis.compare_report import text_table
from mirai_ds.analysis.inspect_run import RunReport, last_values, lowest_values
from mirai_ds.config.sizes import parameter_count
from mirai_ds.runs.records import CLOCK, Json, code_text, count_text, plain, size_text, time_text
from mirai_ds.runs.starts import holder_text

if TYPE_CHECKING:
    from rich.console import RenderableType

_MOST = 5  # of a list that can be long, the newest


def render(report: RunReport) -> list[RenderableType]:
    """What to print, one after the other."""
    from rich.text import Text

    lines = [*_settings(report), *_history(report), *_numbers(report), *_files(report)]
    parts: list[RenderableType] = [Text(f"{label:12} {text}") for label, text in lines]
    if report.checkpoints:
        parts += [Text(), _checkpoints(report), Text()]
    parts += [Text(f"{label:12} {text}") for label, text in _outlook(report)]
    return parts


Line = tuple[str, str]


def _settings(report: RunReport) -> list[Line]:
    get = report.value
    size = f"{size_text(report.used)}, {size_text(report.free)} free"
    lines = [("run", f"{report.path}: {report.name}, {size}")]
    if not report.raw:
        return lines
    count = f", {parameter_count(report.config.model) / 1e6:.1f} M parameters" if report.config else ""
    grid = f"{get('model.grid_size')}x{get('model.grid_size')}"
    grid += f", PAR: {get('model.par_tokens')} at once" if get("model.par_tokens") else ""
    lines.append((
        "model",
        f"{get('model.size')}: {get('model.n_layer')} blocks of width {get('model.dim')}, {get('model.n_head')} heads"
        f"{count}; {get('model.vocab_size')} codes, {get('model.block_size')} tokens ({grid}), "
        f"{get('model.num_classes')} classes",
    ))  # fmt: skip
    method = str(get("foresight.method"))
    if method != "none":
        encoder, heads = get("foresight.encoder.name"), count_text(get("foresight.num_heads") or 0, "head")
        method += (
            f", {get('foresight.convention')} convention, {heads} of block {get('foresight.layer')}, "
            f"lambda {get('foresight.weights')}, from epoch {get('foresight.warmup_epochs')}"
            + (f", encoder {encoder}" if encoder else "")
        )
    lines.append(("method", method))
    length = f"{get('train.max_steps')} steps at most, " if get("train.max_steps") else ""
    deepspeed = get("deepspeed")
    lines.append((
        "training",
        f"{_number(get('train.epochs'))} epochs, {length}batch {get('train.global_batch_size')}, "
        f"lr {get('optimizer.lr')} {get('optimizer.schedule')}, {get('train.precision')}, EMA {get('ema.decay')}, "
        f"seed {get('seed')}, deepspeed "
        + (deepspeed if isinstance(deepspeed, str) else "section of its own"),
    ))  # fmt: skip
    lines.append(("data", " ".join(str(p) for p in (get("data.source"), get("data.path")) if p)))
    return lines


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _history(report: RunReport) -> list[Line]:
    lines = []
    starts, total = report.starts[-_MOST:], len(report.starts)
    if total > _MOST:
        lines.append(("starts", f"{total}; the newest {_MOST}:"))
    for number, start in enumerate(starts, start=total - len(starts) + 1):
        lines.append(("starts" if not lines else "", f"{number}: {start.text}"))
    if report.attempts:
        lines.append(("held by", holder_text(report.attempts[-1])))
    if report.outcome is not None:
        lines.append(("outcome", " ".join(report.outcome).strip()))
    if report.earlier_configs:
        lines.append(("settings", f"were changed at a resume; before: {', '.join(report.earlier_configs[-_MOST:])}"))
    return lines


def _numbers(report: RunReport) -> list[Line]:
    steps = report.curve.steps
    if not steps:
        return [("progress", "no metrics were written")]
    last = last_values(report.curve)
    epochs = f" of {_number(report.value('train.epochs'))}" if report.value("train.epochs") else ""
    lines = [("progress", f"step {steps[-1]}, epoch {report.curve.epochs[steps[-1]]:g}{epochs}")]
    apart = ("held_out/", "score/")
    training = {name: pair for name, pair in last.items() if not name.startswith((*apart, *CLOCK))}
    for label, chosen in (
        ("metrics", training),
        ("speed", {name: pair for name, pair in last.items() if name.startswith(CLOCK)}),
        ("held out", {name: pair for name, pair in last.items() if name.startswith("held_out/")}),
        ("score", {name: pair for name, pair in last.items() if name.startswith("score/")}),
    ):
        if chosen:
            lines.append((label, _values(chosen)))
    lowest = {name: pair for name, pair in lowest_values(report.curve).items() if pair != last[name]}
    if lowest:
        lines.append(("lowest", _values(lowest)))
    return lines


def _values(pairs: dict[str, tuple[int, float]]) -> str:
    """'step 352: loss/ntp 1.185, ...'; metrics of other steps after those of the newest."""
    parts = []
    for step in sorted({step for step, _ in pairs.values()}, reverse=True):
        values = ", ".join(f"{name} {value:.5g}" for name, (at, value) in pairs.items() if at == step)
        parts.append(f"step {step}: {values}")
    return "; ".join(parts)


def _files(report: RunReport) -> list[Line]:
    lines = []
    for label, names in (
        ("samples", report.samples), ("exports", report.exports), ("not finite", report.nonfinite),
        ("hangs", report.hang),
    ):  # fmt: skip
        if names:
            more = f"{len(names)}, the newest: " if len(names) > _MOST else ""
            lines.append((label, more + ", ".join(names[-_MOST:])))
    return lines


def _checkpoints(report: RunReport) -> RenderableType:
    rows = (
        (str(one.step), size_text(one.size), time_text(one.written), one.layout, str(one.info.get("precision", "?")),
         code_text(one.info.get("code")), _state(report, one))
        for one in report.checkpoints
    )  # fmt: skip
    return text_table(("checkpoint", "size", "written", "ranks x stage", "precision", "code", "state"), rows)


def _state(report: RunReport, one: Checkpoint) -> str:
    if one.damage:
        state = "DAMAGED"
    elif one.abandoned:
        state = "left behind"
    else:
        state = "whole" if report.digests_read else "sizes fit"
    state += ", latest" * (one.path.name == report.latest)
    return state + ", best" * (one.step == best_step(report))


def best_step(report: RunReport) -> int | None:
    """The step of the whole checkpoint with the lowest `checkpoint.best_metric`, where the run keeps the best."""
    rules = report.config.checkpoint if report.config else None
    if rules is None or not rules.keep_best:
        return None
    whole = [one for one in report.checkpoints if not one.damage and not one.abandoned]
    scores = [(rules.score(one.info.get("metrics", {})), one.step) for one in whole]
    return min(((score, step) for score, step in scores if score is not None), default=(0.0, None))[1]


def _outlook(report: RunReport) -> list[Line]:
    lines = [("damaged", damage) for damage in report.damages]
    lines += [("left over", one) for one in report.leftovers]
    resume = report.resume
    if resume.step is None:
        lines.append(("resume", f"--resume auto would refuse: {resume.reason}"))
    else:
        how = "" if report.digests_read else " if its digests fit (--verify reads them)"
        lines.append(("resume", f"--resume auto would continue after step {resume.step}{how}"))
    lines += [("", f"passing over {reason}") for reason in resume.skipped]
    if report.digests_read and report.checkpoints:
        damages = len(report.damages)
        lines.append(("verified", count_text(damages, "damaged checkpoint") if damages else "every digest fits"))
    return [*lines, *(("note", note) for note in report.notes)]


def as_json(report: RunReport) -> Json:
    """Stable keys; numbers that are not finite are the texts nan, inf and -inf."""

    def at(pairs: dict[str, tuple[int, float]]) -> Json:
        return {name: {"step": step, "value": value} for name, (step, value) in pairs.items()}

    steps = report.curve.steps
    everything: Json = plain({
        "kind": "run", "path": report.path, "name": report.name, "configuration": report.raw,
        "configuration_valid": report.config is not None,
        "parameters": parameter_count(report.config.model) if report.config else None,
        "starts": [asdict(start) for start in report.starts],
        "held_by": asdict(report.attempts[-1]) if report.attempts else None,
        "outcome": None if report.outcome is None else dict(zip(("verdict", "reason"), report.outcome, strict=True)),
        "step": steps[-1] if steps else None, "epoch": report.curve.epochs[steps[-1]] if steps else None,
        "last": at(last_values(report.curve)), "lowest": at(lowest_values(report.curve)),
        "samples": report.samples, "exports": report.exports, "nonfinite": report.nonfinite, "hang": report.hang,
        "earlier_configurations": report.earlier_configs,
        "checkpoints": [_checkpoint_json(report, one) for one in report.checkpoints],
        "digests_read": report.digests_read, "latest": report.latest, "leftovers": report.leftovers,
        "resume": asdict(report.resume), "bytes_used": report.used, "bytes_free": report.free,
        "notes": report.notes, "damages": report.damages,
    })  # fmt: skip
    return everything


def _checkpoint_json(report: RunReport, one: Checkpoint) -> Json:
    return {
        "step": one.step, "path": one.path, "bytes": one.size, "written": one.written, "info": one.info,
        "whole": not one.damage, "damage": one.damage, "abandoned": one.abandoned,
        "latest": one.path.name == report.latest, "best": one.step == best_step(report),
    }  # fmt: skip
