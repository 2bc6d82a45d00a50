"""Read a DeepSpeed file, refuse what contradicts the run, fill every "auto".

DeepSpeed itself crashes on "auto" and trusts the rest, so what reaches `deepspeed.initialize` is made here.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from mirai_ds.config.deepspeed_schema import ELSEWHERE, OFFLOAD, SECTIONS
from mirai_ds.config.errors import ConfigError, UserError, nearest, shown
from mirai_ds.config.run_config import RunConfig


def packaged_names() -> list[str]:
    """Names of the DeepSpeed files that ship in `ds_configs/`."""
    folder = resources.files("mirai_ds.ds_configs")
    return sorted(item.name.removesuffix(".json") for item in folder.iterdir() if item.name.endswith(".json"))


def read(source: str | dict[str, Any]) -> dict[str, Any]:
    """The raw file: a mapping, a path, or the name of a packaged file (`zero2`, `ds_configs/zero2.json`)."""
    import hjson  # comments are allowed, as in DeepSpeed itself

    if isinstance(source, dict):
        return dict(source)
    path, name = Path(source), Path(source).name.removesuffix(".json")
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    elif name in packaged_names() and path.parent.name in ("", "ds_configs"):
        text = (resources.files("mirai_ds.ds_configs") / f"{name}.json").read_text(encoding="utf-8")
    else:
        raise UserError(f"deepspeed = {source!r}: no such file; give a .json file or one of: {', '.join(packaged_names())}")
    try:
        data = hjson.loads(text, object_pairs_hook=_no_duplicates)
    except (hjson.HjsonDecodeError, ValueError) as error:
        raise UserError(f"deepspeed file {source}: not valid JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise UserError(f"deepspeed file {source}: must be a JSON object")
    return data


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"key {key!r} is given twice")
        out[key] = value
    return out


def check_keys(data: dict[str, Any]) -> None:
    """Refuse unknown and foreign keys, at the top and in every section, with the nearest name."""
    for key, value in data.items():
        if key in ELSEWHERE:
            raise ConfigError(f"deepspeed.{key}", value, f"remove it: {ELSEWHERE[key]}")
        if key not in SECTIONS:
            raise UserError(f"deepspeed.{key}: unknown key; {nearest(key, SECTIONS)}")
        allowed = SECTIONS[key]
        if allowed is None:
            if isinstance(value, dict):
                raise ConfigError(f"deepspeed.{key}", value, "must be a plain value, not a section")
            continue
        if not isinstance(value, dict):
            raise ConfigError(f"deepspeed.{key}", value, "must be a section { ... }")
        _check_section(f"deepspeed.{key}", value, allowed)
    zero = data.get("zero_optimization", {})
    for key, allowed in OFFLOAD.items():
        if isinstance(zero.get(key), dict):
            _check_section(f"deepspeed.zero_optimization.{key}", zero[key], allowed)


def _check_section(where: str, section: dict[str, Any], allowed: frozenset[str]) -> None:
    for key in section:
        if key not in allowed:
            raise UserError(f"{where}.{key}: unknown key; {nearest(key, allowed)}")


def batch_arithmetic(config: RunConfig, world_size: int) -> tuple[int, int]:
    """(micro batch, accumulation steps) with micro * accumulation * world == global batch."""
    train = config.train
    micro, steps = train.micro_batch_size, train.grad_accum_steps
    per_rank, rest = divmod(train.global_batch_size, world_size)
    if rest:
        raise ConfigError(
            "train.global_batch_size", train.global_batch_size, f"is not divisible by the {world_size} ranks"
        )
    if micro is None:
        micro, rest = divmod(per_rank, steps or 1)
        if rest:
            raise ConfigError(
                "train.grad_accum_steps", steps, f"does not divide the {per_rank} samples a rank gets per step"
            )
    if steps is None:
        steps, rest = divmod(per_rank, micro)
        if rest or steps == 0:
            raise ConfigError("train.micro_batch_size", micro, f"does not divide the {per_rank} samples a rank gets per step")
    if micro * steps * world_size != train.global_batch_size:
        raise ConfigError(
            "train.global_batch_size",
            train.global_batch_size,
            f"must be micro_batch_size * grad_accum_steps * ranks = {micro} * {steps} * {world_size} = "
            f"{micro * steps * world_size}; leave micro_batch_size or grad_accum_steps out",
        )
    return micro, steps


class _Filler:
    """Puts values where the file says "auto" or nothing; a different value in the file is an error naming both."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    def put(self, path: str, value: Any, run_field: str) -> None:
        *sections, last = path.split(".")
        here = self.data
        for name in sections:
            here = here.setdefault(name, {})
        given = here.get(last, "auto")
        if given == "auto":
            here[last] = value
        elif given != value or isinstance(given, bool) != isinstance(value, bool):
            raise ConfigError(
                f"deepspeed.{path}", given, f"contradicts {run_field} = {shown(value)}; change one, or write \"auto\""
            )


def resolve(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The complete DeepSpeed configuration of `config` on `world_size` ranks; raises `UserError` on contradictions."""
    data = {key: dict(value) if isinstance(value, dict) else value for key, value in read(config.deepspeed).items()}
    check_keys(data)
    fill = _Filler(data)
    micro, steps = batch_arithmetic(config, world_size)
    fill.put("train_batch_size", config.train.global_batch_size, "train.global_batch_size")
    fill.put("train_micro_batch_size_per_gpu", micro, "train.micro_batch_size")
    fill.put("gradient_accumulation_steps", steps, "train.grad_accum_steps")
    fill.put("gradient_clipping", float(config.optimizer.grad_clip), "optimizer.grad_clip")
    stage = _check_stage(config, data)
    _fill_precision(config, data, fill, stage, steps)
    recompute = config.train.recompute
    for name in ("partition_activations", "cpu_checkpointing"):
        fill.put(f"activation_checkpointing.{name}", getattr(recompute, name), f"train.recompute.{name}")
    data.setdefault("steps_per_print", 10**9)  # the run logs itself
    data.setdefault("zero_allow_untested_optimizer", True)  # torch's AdamW: no C++ build at the first run
    data.setdefault("zero_force_ds_cpu_optimizer", False)
    _refuse_auto(data, "deepspeed")
    return data


def _check_stage(config: RunConfig, data: dict[str, Any]) -> int:
    zero = data.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 2)
    field = "deepspeed.zero_optimization.stage"
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(field, stage, "must be 0, 1, 2 or 3")
    if stage == 0 and config.train.precision == "bf16":
        raise ConfigError(
            field, 0, "with train.precision: bf16 DeepSpeed steps the optimizer once before training; "
            "use stage 1 (also on one rank), or precision bf16-autocast or fp32"
        )
    for key in OFFLOAD:
        offload = zero.get(key)
        if offload is not None and not isinstance(offload, dict):
            raise ConfigError(f"deepspeed.zero_optimization.{key}", offload, "must be a section { \"device\": ... }")
        device = (offload or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise ConfigError(f"deepspeed.zero_optimization.{key}.device", device, "only cpu and none are supported")
        if device == "cpu" and stage < (3 if key == "offload_param" else 1):
            raise ConfigError(f"deepspeed.zero_optimization.{key}.device", device, f"needs a higher stage than {stage}")
    for key, value in zero.items():
        if key.endswith("_size") and key != "zero_hpz_partition_size" and (not isinstance(value, int) or value <= 0):
            if value == "auto":
                continue
            raise ConfigError(f"deepspeed.zero_optimization.{key}", value, "must be a positive number of elements")
    return stage


def _fill_precision(config: RunConfig, data: dict[str, Any], fill: _Filler, stage: int, steps: int) -> None:
    precision = config.train.precision
    fill.put("bf16.enabled", precision == "bf16", f"(train.precision: {precision}) bf16.enabled")
    autocast = precision == "bf16-autocast"
    fill.put("torch_autocast.enabled", autocast, f"(train.precision: {precision}) torch_autocast.enabled")
    if autocast:
        fill.put("torch_autocast.dtype", "bfloat16", "train.precision: bf16-autocast, dtype")
        # An empty list: no module's gradients are reduced in bf16.
        fill.put("torch_autocast.lower_precision_safe_modules", [], "fp32 reduction, lower_precision_safe_modules")
    else:
        data["torch_autocast"] = {"enabled": False}
    if precision == "bf16":
        # Sums over ranks and micro-steps in fp32: relative error of a gradient 2e-6 instead of 3e-3.
        fill.put("communication_data_type", "fp32", "fp32 gradient reduction, communication_data_type")
        fill.put("data_types.grad_accum_dtype", "fp32", "fp32 gradient accumulation, grad_accum_dtype")
        if data["bf16"].get("check_grad_overflow") is False:
            raise ConfigError("deepspeed.bf16.check_grad_overflow", False, "would apply non-finite gradients; remove it")


def _refuse_auto(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_auto(item, f"{where}.{key}")
    elif value == "auto":
        raise ConfigError(where, "auto", "nothing in the run decides this; write a value")
