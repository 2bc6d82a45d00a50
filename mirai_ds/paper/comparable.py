"""What of a configuration decides the numbers of a table, so that runs are matched with recipes by what they are."""

from __future__ import annotations

from typing import Any

from mirai_ds.config import ForesightConfig, RunConfig
from mirai_ds.foresight import offsets

# What never reaches the weights, or only names a place: the rest of a section counts.
_SECTIONS = ("model", "optimizer", "ema")
_LEFT_OUT = {
    "model": {"grid_size", "size"},
    "optimizer": {"schedule", "warmup_steps", "final_lr"},  # compared in words
}
# Compared as offsets, or in words, or presets of other fields, or where and how something is computed.
_FORESIGHT_LEFT_OUT = {
    "convention", "num_heads", "layout", "head_order", "offsets", "border", "flat_stride", "schedule", "warmup_epochs",
    "kernel", "teacher_weights", "projector_dim", "encoder",
}  # fmt: skip
_ENCODER_LEFT_OUT = {"weights", "pretrained", "compile"}


def comparable_config(config: RunConfig, epochs: float) -> dict[str, Any]:
    """Named values that must agree for two runs to be the same run up to `epochs`."""
    values: dict[str, Any] = {"data.source": config.data.source}
    for section in _SECTIONS:
        for name, value in getattr(config, section).model_dump().items():
            if name not in _LEFT_OUT.get(section, ()):
                values[f"{section}.{name}"] = value
    for name in ("global_batch_size", "precision", "init_from"):
        values[f"train.{name}"] = getattr(config.train, name)
    values["optimizer.schedule"] = _rate(config)
    values["foresight.method"] = config.foresight.method
    if config.foresight.active:
        values |= _foresight(config.foresight)
        values["foresight.warmup_epochs"] = min(config.foresight.warmup_epochs or 0.0, epochs)
        values["foresight.schedule"] = _multiplier(config, epochs)
    return values


def _rate(config: RunConfig) -> str:
    """The learning rate's course in words; the length of the run counts where the rate depends on it."""
    o = config.optimizer
    start = f"after {o.warmup_steps} steps of warm-up " if o.warmup_steps else ""
    if o.schedule == "constant":
        return f"{start}constant"
    return f"{start}cosine to {o.final_lr:g} over {config.train.epochs:g} epochs"


def _multiplier(config: RunConfig, epochs: float) -> str:
    """Lambda's course up to `epochs` in words."""
    schedule = config.foresight.schedule
    if schedule.kind == "cosine":
        return f"cosine to {schedule.final:g}, epochs {schedule.start_epoch:g} to {config.train.epochs:g}"
    steps = [at for at in schedule.at_epochs or [] if at < epochs]
    values = (schedule.multipliers or [1.0])[: len(steps) + 1]
    later = "".join(f", {value:g} from epoch {at:g}" for value, at in zip(values[1:], steps, strict=True))
    return f"{values[0]:g}{later}"


def _foresight(config: ForesightConfig) -> dict[str, Any]:
    values = {f"foresight.{k}": v for k, v in config.model_dump().items() if k not in _FORESIGHT_LEFT_OUT}
    values["foresight.offsets"] = [list(offset) for offset in offsets(config)]
    flat = config.layout == "1d" or config.border == "wrap"  # a line of tokens, without edges
    values["foresight.border"] = f"flat shifts{_stride(config)}" if flat else config.border
    values["foresight.teacher_weights"] = "given" if config.teacher_weights else None
    if config.head == "mlp":
        values["foresight.projector_dim"] = config.projector_dim
    if config.encoder is not None:
        encoder = config.encoder.model_dump() | {"name": config.encoder.timm_name}
        values |= {f"foresight.encoder.{k}": v for k, v in encoder.items() if k not in _ENCODER_LEFT_OUT}
    return values


def _stride(config: ForesightConfig) -> str:
    down = any(row for row, _ in offsets(config))
    return f", a row is {config.flat_stride}" if down and config.flat_stride else ""


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """`field: value, the recipe has value`, field by field."""
    missing = "nothing"
    return [
        f"{name}: {ours.get(name, missing)!r}, the recipe has {theirs.get(name, missing)!r}"
        for name in sorted({*ours, *theirs})
        if ours.get(name, missing) != theirs.get(name, missing)
    ]
