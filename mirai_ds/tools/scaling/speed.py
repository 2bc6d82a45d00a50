"""Shares of a device's peak that training steps of this project reached, where they were measured; `mirai-ds plan`.

The rows are steps of Mirai-E (K = 3, 256 tokens, bf16-autocast, dropout on) on one device, of docs/results/gpu.csv; a
test holds them equal.  An MFU is made from milliseconds by the FLOPs that are done (`observe/flops.py`) and the printed
peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from mirai_ds.config import RunConfig, load
from mirai_ds.observe.flops import training_flops
from mirai_ds.tools.looking.devices import DEVICES, Device

ASSUMED_MFU = 0.45  # trainers report 0.43 to 0.60 for decoders of these sizes on A100
# How many times as large or as small as the measured batch another may be.  Where the host is the bottleneck a larger
# batch takes hardly longer, so that an MFU says little about batches far from it.
REACH = 2.0


@dataclass(frozen=True)
class Measured:
    """family: a device's name before its memory.  compiled: `train.compile`.  stage: of ZeRO.  note: what was odd."""

    family: str
    size: str
    batch: int
    compiled: str
    stage: int
    milliseconds: float
    source: str
    note: str = ""


@dataclass(frozen=True)
class Utilisation:
    """An MFU and where it is from, for people."""

    mfu: float
    source: str
    measured: bool = False


_H200 = "measured on NVIDIA H200, torch 2.11, 2026-11-27"
_MENDED = "compiled blocks with a fault mended by hand"
MEASURED = (
    Measured("h200", "GPT-B", 32, "none", 2, 101.6, _H200), Measured("h200", "GPT-B", 128, "none", 2, 171.9, _H200),
    Measured("h200", "GPT-L", 32, "none", 2, 214.5, _H200), Measured("h200", "GPT-XL", 16, "none", 2, 284.5, _H200),
    Measured("h200", "GPT-B", 32, "blocks", 0, 56.6, _H200, _MENDED),
    Measured("h200", "GPT-B", 128, "blocks", 0, 85.1, _H200, _MENDED),
    Measured("h200", "GPT-L", 32, "blocks", 0, 130.8, _H200, _MENDED),
    Measured("h200", "GPT-XL", 16, "blocks", 0, 116.8, _H200, _MENDED),
)  # fmt: skip


def mfu_of(row: Measured) -> float:
    """Model FLOPs a second over the dense bf16 peak."""
    config = load(f"mirai-e-{row.size.removeprefix('GPT-').lower()}", [])
    flops = row.batch * training_flops(config.model, config.foresight, config.model.width, aligned=True)
    peak = next(device.bf16 for name, device in DEVICES.items() if name.partition("-")[0] == row.family)
    return flops / (1e-3 * row.milliseconds * peak)


def utilisation(device: Device, config: RunConfig, micro: int, asked: float | None = None) -> Utilisation:
    """The MFU that was asked for, else the measured one of the nearest batch, else the assumption, which says so."""
    if asked is not None:
        return Utilisation(asked, "given (--mfu)")
    family, compiled = device.name.partition("-")[0], config.train.compile
    rows = [
        row for row in MEASURED
        if (row.family, row.size, row.compiled) == (family, config.model.size, compiled)
        and max(row.batch / micro, micro / row.batch) <= REACH
    ]  # fmt: skip
    if not rows or config.train.precision == "fp32":
        return Utilisation(ASSUMED_MFU, f"an assumption: no step like this was measured on {device.name}")
    near = min(rows, key=lambda row: max(row.batch / micro, micro / row.batch))
    told = f"{near.source}: {near.size}, Mirai-E, batch {near.batch}, bf16-autocast, ZeRO-{near.stage}, "
    told += f"compile {compiled}" + (f" ({near.note})" if near.note else "")
    return Utilisation(mfu_of(near), told, measured=True)
