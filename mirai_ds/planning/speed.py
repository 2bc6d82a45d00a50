"""Shares of a device's peak that training steps of this project reached, where they were measured; `mirai-ds plan`.

The rows are steps of Mirai-E (K = 3, 256 tokens, bf16-autocast, dropout on) on one device, of docs/results/gpu.csv; a
test holds them equal.  An MFU is made from milliseconds by the FLOPs that are done (`planning/flops.py`) and the
printed peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from mirai_ds.config import RunConfig, load
from mirai_ds.planning.devices import DEVICES, Device
from mirai_ds.planning.flops import training_flops

ASSUMED_MFU = 0.45  # trainers report 0.43 to 0.60 for decoders of these sizes on A100
# How many times as large or as small as the measured batch another may be.  Where the host is the bottleneck a larger
# batch takes hardly longer, so that an MFU says little about batches far from it.
REACH = 2.0
SAME_PEAK = {"h100": "h200"}  # a family that was not measured: one with the same chip, whose memory is faster


@dataclass(frozen=True)
class MeasuredSpeed:
    """family: a device's name before its memory.  way: `none`, compiled `blocks`, those in a `captured` step.  stage:
    of ZeRO.  note: what was odd."""

    family: str
    size: str
    batch: int
    way: str
    stage: int
    milliseconds: float
    source: str
    note: str = ""


@dataclass(frozen=True)
class Utilisation:
    """An MFU and where it is from, for people; kind: given, measured, estimated (from another one), assumed."""

    mfu: float
    source: str
    kind: str


_H200 = "measured on NVIDIA H200, torch 2.11, 2026-11-27"
_MENDED = "compiled blocks with a fault mended by hand"
_PROTOTYPE = "a prototype of the captured step"
MEASURED = (
    MeasuredSpeed("h200", "GPT-B", 32, "none", 2, 101.6, _H200),
    MeasuredSpeed("h200", "GPT-B", 128, "none", 2, 171.9, _H200),
    MeasuredSpeed("h200", "GPT-L", 32, "none", 2, 214.5, _H200),
    MeasuredSpeed("h200", "GPT-XL", 16, "none", 2, 284.5, _H200),
    MeasuredSpeed("h200", "GPT-B", 32, "blocks", 0, 56.6, _H200, _MENDED),
    MeasuredSpeed("h200", "GPT-B", 128, "blocks", 0, 85.1, _H200, _MENDED),
    MeasuredSpeed("h200", "GPT-L", 32, "blocks", 0, 130.8, _H200, _MENDED),
    MeasuredSpeed("h200", "GPT-XL", 16, "blocks", 0, 116.8, _H200, _MENDED),
    MeasuredSpeed("h200", "GPT-B", 32, "captured", 0, 23.2, _H200, _PROTOTYPE),
    MeasuredSpeed("h200", "GPT-B", 128, "captured", 0, 77.8, _H200, _PROTOTYPE),
    MeasuredSpeed("h200", "GPT-L", 32, "captured", 0, 59.3, _H200, _PROTOTYPE),
    MeasuredSpeed("h200", "GPT-XL", 16, "captured", 2, 76.0, _H200, _PROTOTYPE),
)  # fmt: skip


_WAYS = {"none": "compile none", "blocks": "compile blocks", "captured": "compiled and captured"}


@cache
def mfu_of(row: MeasuredSpeed) -> float:
    """Model FLOPs a second over the dense bf16 peak."""
    config = load(f"mirai-e-{row.size.removeprefix('GPT-').lower()}", [])
    flops = row.batch * training_flops(config.model, config.foresight, config.model.width, aligned=True)
    peak = next(device.bf16 for name, device in DEVICES.items() if name.partition("-")[0] == row.family)
    return flops / (1e-3 * row.milliseconds * peak)


def utilisation(
    device: Device, config: RunConfig, micro: int, asked: float | None = None, captured: bool = False
) -> Utilisation:
    """The MFU that was asked for; else the measured one of this card's family, size and a batch like this; else what
    such measurements make likely for another batch or size; else the assumption.  Each says what it is.  captured:
    whether steps can be CUDA graphs."""
    if asked is not None:
        return Utilisation(asked, "given (--mfu)", "given")
    family, size = device.name.partition("-")[0], config.model.size
    way = ("captured" if captured else "blocks") if config.train.compiles_on(device.kind) else "none"
    rows = [row for row in MEASURED if row.way == way and row.family in (family, SAME_PEAK.get(family))]
    if not rows or config.train.precision == "fp32":
        return Utilisation(ASSUMED_MFU, f"an assumption: no step like this was measured on {device.name}", "assumed")
    near = min((row for row in rows if row.size == size), key=lambda row: _apart(row, micro), default=None)
    if near is not None and _apart(near, micro) <= REACH:
        there = near.family == family
        return Utilisation(mfu_of(near), _told(near), "measured" if there else "estimated")
    if near is not None and micro < near.batch and way == "captured":
        why = "a batch that small fills the device less, by how much was not measured; "
        return Utilisation(mfu_of(near), why + _told(near), "estimated")
    if near is not None and micro < near.batch:
        why = "where the host is the bottleneck a smaller batch takes as long; "
        return Utilisation(mfu_of(near) * micro / near.batch, why + _told(near), "estimated")
    best = max(rows, key=mfu_of)
    return Utilisation(mfu_of(best), "no batch like this was measured; the best that was: " + _told(best), "estimated")


def _apart(row: MeasuredSpeed, micro: int) -> float:
    """The ratio of two batch sizes, at least 1."""
    return max(row.batch / micro, micro / row.batch)


def _told(row: MeasuredSpeed) -> str:
    note = f" ({row.note})" if row.note else ""
    return (
        f"{row.source}: {row.size}, Mirai-E, batch {row.batch}, bf16-autocast, ZeRO-{row.stage}, {_WAYS[row.way]}"
        + note
    )
