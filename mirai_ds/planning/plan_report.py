"""A plan for people: tables and sentences; what `mirai-ds plan` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirai_ds.planning.devices import GIB, MARGIN
from mirai_ds.planning.outlook import assumptions, scaling_table, sent_table
from mirai_ds.planning.plan import DAY, MFU_SPREAD, POLICIES, TrainingPlan, day_jobs, device_hours

if TYPE_CHECKING:
    from rich.console import RenderableType


def render(plan: TrainingPlan) -> list[RenderableType]:
    """What to print, one after the other."""
    from rich.text import Text

    r, w = plan.request, plan.work
    title = (
        f"{plan.config.name}: {w.model.size}, {w.parameters:,} parameters ({w.head_parameters:,} in heads), "
        f"{plan.config.foresight.method}, {w.precision}, {r.world} ranks ({r.nodes} x {r.gpus} {plan.device.name}), "
        f"ZeRO-{plan.states.stage}, micro batch {w.micro} x {plan.states.accumulation}, recompute "
        f"{plan.config.train.recompute.policy}"
    )
    lines = [f"note: {note}" for note in _notes(plan)]
    return [
        Text(title, style="bold"), Text(), _memory_table(plan), Text(), Text(_verdict(plan), style="bold"), Text(),
        _choice_table(plan), Text(), *(Text(line) for line in _time_lines(plan)), Text(),
        *_communication(plan), *(Text(line) for line in lines),
    ]  # fmt: skip


def _memory_table(plan: TrainingPlan) -> RenderableType:
    from rich.table import Table

    peak = plan.memory.peak
    table = Table("GiB a rank", "between steps", f"at the peak ({peak.name})", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    names = dict.fromkeys([*plan.memory.resting, *peak.parts])
    for name in names:
        resting, there = plan.memory.resting.get(name, 0.0), peak.parts.get(name, 0.0)
        if resting or there:
            table.add_row(name, f"{resting / GIB:.3f}", f"{there / GIB:.3f}")
    table.add_row("sum", f"{sum(plan.memory.resting.values()) / GIB:.3f}", f"{peak.total / GIB:.3f}")
    table.add_row("with allowances", "", f"{plan.needed / GIB:.3f}")
    return table


def _verdict(plan: TrainingPlan) -> str:
    device = f"{plan.device.name} ({plan.device.memory:g} GiB, {MARGIN:.0%} kept free)"
    now = f"{'fits' if plan.fits else 'does NOT fit'} {device}"
    best = plan.suggestion
    if best is None:
        return f"{now}; nothing does: a larger device, more ranks, or offloading (ds_configs/zero3-offload.json)"
    return (
        f"{now}; suggested: micro batch {best.micro}, ZeRO-{best.stage}, recompute {best.policy} "
        f"({best.needed / GIB:.1f} GiB)"
    )


def _choice_table(plan: TrainingPlan) -> RenderableType:
    from rich.table import Table

    table = Table(
        "largest micro batch that fits", *[f"recompute {name}" for name, _ in POLICIES], box=None
    )  # fmt: skip
    for stage in sorted({choice.stage for choice in plan.choices}):
        cells = [
            f"{c.micro} ({c.needed / GIB:.1f} GiB)" if c.micro else "none" for c in plan.choices if c.stage == stage
        ]
        table.add_row(f"ZeRO-{stage}", *cells)
    return table


def _time_lines(plan: TrainingPlan) -> list[str]:
    seconds, lines = plan.run_seconds(), []
    if plan.time is None or seconds is None:
        lines.append(f"time: not predicted, the speed of {plan.device.name} is not known")
    else:
        fast, slow, likely = plan.time
        lines.append(
            f"step: {likely.expected:.3f} s, {fast.overlapped:.3f} to {slow.exposed:.3f} s "
            f"({plan.config.train.global_batch_size} images); {plan.config.train.epochs:g} epochs = {plan.steps:,} "
            f"steps: {seconds[0] / DAY:.2f} to {seconds[1] / DAY:.2f} days"
        )
        hours, jobs = device_hours(plan), day_jobs(plan)
        what = "GPU-hours" if plan.device.gpu else "device-hours"
        count = f"{jobs[0]}" if jobs[0] == jobs[1] else f"{jobs[0]} to {jobs[1]}"
        each = "job" if jobs[1] == 1 else "jobs"
        lines.append(
            f"{what}: {hours[0]:,.1f} to {hours[1]:,.1f} on {plan.request.world} ranks; {count} {each} of 24 h"
        )
    whole = plan.checkpoint * plan.kept
    lines.append(f"disk: {plan.checkpoint / 1e9:.2f} GB a checkpoint, {plan.kept} at once: {whole / 1e9:.2f} GB")
    return lines


def _communication(plan: TrainingPlan) -> list[RenderableType]:
    from rich.text import Text

    if plan.request.world == 1:
        parts: list[RenderableType] = [Text("one rank: nothing is sent"), Text()]
    else:
        parts = [sent_table(plan.sent), Text()]
    if plan.scaling:
        parts += [scaling_table(plan.scaling, "each rank keeps its images, the global batch grows"), Text()]
        title = "the global batch stays, each rank's share shrinks"
        parts += [scaling_table(plan.same_batch, title), Text()]
        parts += [Text(f"assumed: {line}") for line in assumptions(plan.cluster, plan.utilisation.mfu)]
    return parts


def _notes(plan: TrainingPlan) -> list[str]:
    d, u, a = plan.device, plan.utilisation, plan.allowance
    notes = [
        f"with allowances = sum + {a.share:.0%} (rounding, fragmentation) + {a.fixed:g} GiB "
        + ("(CUDA context, cuBLAS, NCCL)" if d.gpu else "(Python and libraries)")
        + ": assumed, not measured"
    ]
    if plan.time is not None:
        notes += [
            f"MFU {u.mfu:.3g}: {u.source}",
            f"the range is {1 + MFU_SPREAD:g} and {1 - MFU_SPREAD:g} times that MFU; peak "
            f"{d.peak(plan.work.precision) / 1e12:g} TFLOP/s; the fast end hides all communication, the slow end none; "
            "evaluation, samples and checkpoints come on top",
        ]
    if plan.config.foresight.teacher == "encoder":
        notes.append("Mirai-I: the encoder's forward pass is in the time; reading images is not")
    if any(plan.states.offloaded(what) for what in ("offload_param", "offload_optimizer")):
        notes.append("offloading: what lies in host memory is left out, and its copies' time too; not measured")
    return notes
