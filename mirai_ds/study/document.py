"""docs/study.md's generated parts: tables and facts between markers, curves beside it, all from the committed rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from mirai_ds.config import UserError
from mirai_ds.runtime import markdown
from mirai_ds.study.arms import ARMS, BASELINE, STUDIES
from mirai_ds.study.results import Estimate, Results
from mirai_ds.study.rows import read_rows

DOCUMENT = "study.md"
END = "<!-- end -->"
TITLES = {arm.name: arm.title for arm in ARMS}


def marker(part: str, study: str) -> str:
    """The line before a generated part."""
    return f"<!-- mirai-ds study write: {part} {study} -->"


def write_document(folder: Path, check: bool = False) -> list[str]:
    """Fill the generated parts of `folder`/study.md and draw its curves from the rows beside it; returns what changed
    (of the text).  check: write nothing.  Raises UserError when the document lacks a marker."""
    from mirai_ds.study.figures import draw_curves

    rows, path = read_rows(folder), folder / DOCUMENT
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; it holds the text around the generated parts") from None
    changed = []
    for name in rows.studies():
        results = Results(rows, name)
        for part, make in PARTS.items():
            new = markdown.replaced(text, marker(part, name), make(results), END, path)
            changed += [f"{part} {name}"] if new != text else []
            text = new
        if not check:
            draw_curves(results, folder / f"study-{name}-curves.png")
    if not check:
        path.write_text(text, encoding="utf-8")
    return changed


def facts_part(results: Results) -> str:
    """What a study was made of, as a list."""
    f, name = results.facts, results.name
    study = STUDIES[name]
    epochs, _ = results.curve(BASELINE, results.seeds(BASELINE)[0], "ntp_raw")
    lines = [f"{results.steps(BASELINE)[-1]} steps, {epochs[-1]:g} epochs; seeds by arm: {_seeds(results)}."]
    if "reconstruction_rms" in f:
        lines.append(
            f"Codebook: {f['codes']:.0f} patches of {study.patch}x{study.patch}; reconstruction of the test images "
            f"{f['reconstruction_rms']:.1f} grey levels rms, {f['reconstruction_psnr']:.1f} dB."
        )
    lines.append(
        f"Judge: recognises {f['judge_accuracy']:.3f} of real test images (digest {f['judge_digest'][:12]}). "
        f"Reference: {f['reference_images']:.0f} real images as their tokens show them; two halves of them have "
        f"Frechet distance {f['frechet_real']:.2f}, precision {f['precision_real']:.2f}, "
        f"recall {f['recall_real']:.2f}. {study.samples} samples a run."
    )
    if "encoder" in f:
        lines.append(
            f"Mirai-I's encoder: {f['encoder']} (digest {f['encoder_digest'][:12]}); of held-out images it names "
            f"{f['encoder_masked_accuracy']:.2f} of masked codes and {f['encoder_class_accuracy']:.2f} of classes."
        )
    versions = ", ".join(f"{name} {f['versions'][name]}" for name in ("torch", "deepspeed", "timm"))
    lines.append(f"Run on {f['device']}, {f['date']}; {versions}.")
    return "\n".join(f"- {line}" for line in lines)


def _seeds(results: Results) -> str:
    return ", ".join(f"`{arm}` {len(results.seeds(arm))}" for arm in results.arms)


def values_part(results: Results) -> str:
    """A table with a row per arm: means over its seeds."""
    columns = {
        "held-out loss, raw": ("ntp_raw", 4), "held-out loss, EMA": ("ntp_ema", 4), "Frechet distance": ("frechet", 2),
        "precision": ("precision", 3), "recall": ("recall", 3), "recognised": ("accuracy", 3),
        "smoothness": ("smoothness", 3),
    }  # fmt: skip
    lines = (
        " | ".join([TITLES[arm], *(shown(results.mean(arm, what), digits) for what, digits in columns.values())])
        for arm in results.arms
    )
    return markdown.table(" | ".join(["arm", *columns]), lines)


def differences_part(results: Results) -> str:
    """A row an arm: paired differences to the baseline, at equal epochs and equal compute, and speed-ups."""
    header = (
        "arm less baseline | loss, EMA | loss, EMA, equal compute | loss, raw | Frechet distance | recognised "
        "| smoothness | speed-up, half-way | speed-up, end | baseline's epochs to the arm's loss | step cost, CPU "
        "| step cost, FLOPs"
    )
    lines = []
    for arm in results.arms:
        if arm == BASELINE:
            continue
        cost = results.costs.get(arm)
        lines.append(" | ".join((
            TITLES[arm],
            signed(results.difference(arm, "ntp_ema"), 4), signed(results.equal_compute(arm, "ntp_ema"), 4),
            signed(results.difference(arm, "ntp_raw"), 4), signed(results.difference(arm, "frechet"), 2),
            signed(results.difference(arm, "accuracy"), 3), signed(results.difference(arm, "smoothness"), 3),
            shown(results.speed_up_halfway(arm, "ntp_ema"), 2), shown(results.speed_up(arm, "ntp_ema"), 2),
            _epochs(results.baseline_epochs(arm, "ntp_ema"), results),
            "-" if cost is None else f"{cost['ratio']:.2f}", "-" if cost is None else f"{cost['flops_ratio']:.2f}",
        )))  # fmt: skip
    return markdown.table(header, lines)


# Questions about single fields: (what, arm, against).
PAIRS = (
    ("paper against official convention", "e-paper", "e-official"),
    ("the same with equal weights", "e-paper-sum", "e-official"),
    ("no warm-up against warm-up", "e-cold", "e-official"),
    ("desynchronised against one teacher, warm-up", "e-desync", "e-official"),
    ("desynchronised against one teacher, no warm-up", "e-cold-desync", "e-cold"),
    ("no warm-up against warm-up, desynchronised", "e-cold-desync", "e-desync"),
    ("1D against 2D offsets", "e-1d", "e-official"),
    ("K = 1 against K = 3", "e-k1", "e-official"),
    ("K = 9 against K = 3", "e-k9", "e-official"),
    ("output-level against representation-level", "mtp", "e-official"),
)


def pairs_part(results: Results) -> str:
    """A table with a row per question: one arm less another, paired by seed."""
    lines = []
    for question, arm, against in PAIRS:
        if arm not in results.arms or against not in results.arms:
            continue
        estimates = [results.difference(arm, what, against) for what in ("ntp_ema", "ntp_raw", "frechet", "smoothness")]
        cells = [signed(one, digits) for one, digits in zip(estimates, (4, 4, 2, 3), strict=True)]
        lines.append(" | ".join([question, *cells, str(estimates[0].pairs)]))
    return markdown.table("question | loss, EMA | loss, raw | Frechet distance | smoothness | pairs", lines)


def shown(one: Estimate, digits: int) -> str:
    """`1.2345 ± 0.0012`, without the interval of a single value."""
    if not math.isfinite(one.mean):
        return "-"
    return f"{one.mean:.{digits}f}" + ("" if math.isnan(one.half) else f" ± {one.half:.{digits}f}")


def signed(one: Estimate, digits: int) -> str:
    """The value with its sign, in bold where its interval leaves out zero."""
    if not math.isfinite(one.mean):
        return "-"
    text = f"{one.mean:+.{digits}f}" + ("" if math.isnan(one.half) else f" ± {one.half:.{digits}f}")
    return f"**{text}**" if one.differs else text


def _epochs(epochs: list[float], results: Results) -> str:
    """Mean over seeds that reached it; `> 6` where the baseline did not."""
    last = float(results.curve(BASELINE, results.seeds(BASELINE)[0], "ntp_raw")[0][-1])
    reached = [one for one in epochs if math.isfinite(one)]
    late = f"> {last:g} ({len(epochs) - len(reached)} of {len(epochs)})" if len(reached) < len(epochs) else ""
    mean = f"{sum(reached) / len(reached):.2f}" if reached else ""
    return ", ".join(one for one in (mean, late) if one)


PARTS: dict[str, Callable[[Results], str]] = {
    "facts": facts_part, "values": values_part, "differences": differences_part, "pairs": pairs_part,
}  # fmt: skip
