"""Read a DeepSpeed file, refuse what contradicts the run, fill every "auto".

DeepSpeed itself crashes on "auto" and trusts the rest, so what reaches `deepspeed.initialize` is made here.
"""

from __future__ import annotations

import math
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any

from mirai_ds.config.deepspeed_schema import ELSEWHERE, EXCLUDED, OFFLOAD, SECTION, SECTIONS, Keys, is_a
from mirai_ds.config.errors import ConfigError, UserError, nearest, shown
from mirai_ds.config.run_config import RunConfig
from mirai_ds.config.sizes import block_parameters, heads_parameters, parameter_count
from mirai_ds.config.yaml_text import number_in


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
    try:
        if path.is_file():
            text = path.read_text(encoding="utf-8")
        elif name in packaged_names() and path.parent in (Path("."), Path("ds_configs")):
            text = (resources.files("mirai_ds.ds_configs") / f"{name}.json").read_text(encoding="utf-8")
        else:
            known = ", ".join(packaged_names())
            raise ConfigError("deepspeed", source, f"no such file; give a .json file or one of: {known}")
        data = hjson.loads(text, object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise UserError(f"deepspeed file {source}: cannot be read: {error.strerror}") from None
    except UserError as error:
        raise error if isinstance(error, ConfigError) else UserError(f"deepspeed file {source}: {error}") from None
    except (hjson.HjsonDecodeError, ValueError) as error:
        raise UserError(f"deepspeed file {source}: not valid JSON: {str(error).splitlines()[0]}") from None
    if not text.strip() or not isinstance(data, dict):
        raise UserError(f"deepspeed file {source}: must be a JSON object {{ ... }}")
    return data


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise UserError(f"{key}: given twice; keep one")
        out[key] = value
    return out


def check_keys(data: dict[str, Any]) -> None:
    """Refuse unknown and foreign keys and values of a wrong kind, at the top and in every section."""
    top = {key: kind if isinstance(kind, str) else SECTION for key, kind in SECTIONS.items()}
    _check_section("deepspeed", data, top)
    for key, kind in SECTIONS.items():
        if key in data and not isinstance(kind, str):
            _check_section(f"deepspeed.{key}", data[key], kind)
    zero = data.get("zero_optimization", {})
    for key, allowed in OFFLOAD.items():
        if key in zero:
            _check_section(f"deepspeed.zero_optimization.{key}", zero[key], allowed)


def _check_section(where: str, section: dict[str, Any], allowed: Keys) -> None:
    name = where.rpartition(".")[2]
    left_out = ELSEWHERE if where == "deepspeed" else EXCLUDED.get(name, {})
    for key, value in section.items():
        field = f"{where}.{key}"
        if key in left_out:
            raise ConfigError(field, value, f"remove it: {left_out[key]}")
        if key not in allowed:
            raise UserError(f"{field}: unknown key; {nearest(str(key), allowed)}")
        if value is None:
            raise ConfigError(field, value, "remove the key for DeepSpeed's default")
        if not is_a(allowed[key], value) and (value != "auto" or allowed[key] == SECTION):
            quoted = isinstance(value, str) and is_a(allowed[key], _unquoted(value))
            raise ConfigError(field, value, f"must be {allowed[key]}{', without quotes' if quoted else ''}")


def _unquoted(text: str) -> object:
    flags: dict[str, bool] = {"true": True, "false": False}
    return flags.get(text.lower(), number_in(text))


def batch_arithmetic(config: RunConfig, world_size: int) -> tuple[int, int]:
    """(micro batch, accumulation steps) with micro * accumulation * world == global batch."""
    train = config.train
    micro, steps, whole = train.micro_batch_size, train.grad_accum_steps, train.global_batch_size
    per_rank, rest = divmod(whole, world_size)
    if rest:
        below = per_rank * world_size
        fix = f"use {f'{below} or ' if below else ''}{below + world_size}"
        raise ConfigError("train.global_batch_size", whole, f"is not divisible by the {world_size} ranks; {fix}")
    for name, value in (("micro_batch_size", micro), ("grad_accum_steps", steps)):
        if value is not None and per_rank % value:
            good = max(d for d in range(1, min(value, per_rank) + 1) if per_rank % d == 0)
            problem = f"does not divide the {per_rank} samples that each of {world_size} ranks gets per step"
            raise ConfigError(f"train.{name}", value, f"{problem}; use e.g. {good}")
    micro = micro or per_rank // (steps or 1)
    steps = steps or per_rank // micro
    if micro * steps != per_rank:
        raise ConfigError(
            "train.global_batch_size",
            whole,
            f"must be micro_batch_size * grad_accum_steps * ranks = {micro} * {steps} * {world_size} = "
            f"{micro * steps * world_size}; leave micro_batch_size or grad_accum_steps out",
        )
    return micro, steps


def ranks_that_fit(config: RunConfig, most: int) -> tuple[int, str]:
    """The largest number of ranks up to `most` that share a global batch evenly, and why not `most`, if it is fewer;
    `most` where none does."""
    why = ""
    for ranks in range(most, 0, -1):
        try:
            batch_arithmetic(config, ranks)
        except ConfigError as error:
            why = why or str(error)
        else:
            return ranks, why
    return most, ""


class _Filler:
    """Puts values where the file says "auto" or nothing; a different value in the file is an error naming both."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    def put(self, path: str, value: Any, reason: str) -> None:
        """`reason`: what in the run decides it, e.g. `train.global_batch_size = 256`."""
        *sections, last = path.split(".")
        here = self.data
        for name in sections:
            here = here.setdefault(name, {})
        given = here.get(last, "auto")
        if given not in ("auto", value):
            raise ConfigError(f"deepspeed.{path}", given, f'contradicts {reason}; change one, or write "auto"')
        here[last] = value


# What exists on some stages only, and the lowest.
NEEDS_STAGE = {
    "offload_optimizer": 1,
    "offload_param": 3,
    "zero_hpz_partition_size": 3,
    "zero_quantized_weights": 3,
    "zero_quantized_gradients": 3,
}


def resolve(config: RunConfig, world_size: int, cpu: bool = False) -> dict[str, Any]:
    """The complete DeepSpeed configuration of `config` on `world_size` ranks; raises `UserError` on contradictions.

    cpu: the ranks have no GPU: what DeepSpeed does on GPUs alone is refused.
    """
    data = deepcopy(config.deepspeed_file if config.deepspeed_file is not None else read(config.deepspeed))
    check_keys(data)
    if cpu:
        _refuse_on_cpu(data)
    fill = _Filler(data)
    micro, steps = batch_arithmetic(config, world_size)
    train, clip = config.train, float(config.optimizer.grad_clip)
    fill.put("train_batch_size", train.global_batch_size, f"train.global_batch_size = {train.global_batch_size}")
    fill.put("train_micro_batch_size_per_gpu", micro, f"train.micro_batch_size = {micro}")
    fill.put("gradient_accumulation_steps", steps, f"train.grad_accum_steps = {steps}")
    fill.put("gradient_clipping", clip, f"optimizer.grad_clip = {clip}")
    _check_stage(config, data, world_size)
    _fill_precision(config, data, fill)
    for name in ("partition_activations", "cpu_checkpointing"):
        value = getattr(train.recompute, name)
        fill.put(f"activation_checkpointing.{name}", value, f"train.recompute.{name} = {shown(value)}")
    _fill_buckets(config, data["zero_optimization"], world_size)
    # True (DeepSpeed's default on stage 3) replaces torch.nn.functional.linear in the whole process, for good: other
    # engines, evaluation and torch.compile get another kernel with other rounding.
    data["zero_optimization"].setdefault("memory_efficient_linear", False)
    # DeepSpeed's own timer, on by default, makes the host wait for the device twice a micro-batch.
    fill.put("timers.throughput.enabled", False, "the run measuring its own throughput without waits for the device")
    data.setdefault("steps_per_print", 10**9)  # the run logs itself
    data.setdefault("zero_allow_untested_optimizer", True)  # torch's AdamW: no C++ build at the first run
    data.setdefault("zero_force_ds_cpu_optimizer", False)
    _refuse_auto(data, "deepspeed")
    return data


# Bytes that a link moves while one all-reduce is under way without moving any: latency x bandwidth.  One node of eight
# A100: 14 hops of a ring at 3.4 us and 8.4 us to start, at 240 GB/s.  16 nodes: a tree, 2 x (7 x 3.4 + 4 x 14) us and
# 8.4, at the node's 160 GB/s.
_IDLE_BYTES = {1: 13.4e6, 2: 27e6}
_GPUS_A_NODE = 8
_SMALLEST_BUCKET, _LARGEST_BUCKET = 5_000_000, 50_000_000  # elements


def reduce_bucket(parameters: int, world_size: int) -> int:
    """Elements of a gradient bucket that leave least communication uncovered, never more than there are parameters.

    Behind the backward pass everything hides but the last bucket of b bytes, 2 b / bandwidth, while each of the P / b
    buckets pays the latency once: the sum is least at b = sqrt(P x idle bytes / 2).  With Mirai-E's heads GPT-B
    gets 15 million elements on a node and 21 on several, GPT-XL 37 and 50.
    """
    idle = _IDLE_BYTES[1 if world_size <= _GPUS_A_NODE else 2]
    best = int(round(math.sqrt(4.0 * parameters * idle / 2) / 4, -6))  # to a million
    return min(parameters, max(_SMALLEST_BUCKET, min(_LARGEST_BUCKET, best)))


def _fill_buckets(config: RunConfig, zero: dict[str, Any], world_size: int) -> None:
    """Sizes (elements) that are "auto" or left out: no larger than the model, which is all they can hold.

    DeepSpeed's default of 5e8 is a buffer of 1 to 2 GB; even 5e7 for a small model on a CPU cost a fifth of a step in
    page faults.
    """
    width = config.model.width
    model = parameter_count(config.model) + heads_parameters(config.foresight, width, width)
    for key, value in (
        ("reduce_bucket_size", reduce_bucket(model, world_size)), ("allgather_bucket_size", min(200_000_000, model))
    ):  # fmt: skip
        if zero.get(key, "auto") == "auto":
            zero[key] = value
    # Stage 3: two blocks ahead, so that one is there when the one before is done; on the way back what was used less
    # than two blocks ago is still there.
    ahead = min(model, 2 * block_parameters(config.model))
    tables = 2 * config.model.vocab_size * width
    for key, value in (
        ("stage3_prefetch_bucket_size", ahead), ("stage3_max_reuse_distance", 2 * ahead),
        ("stage3_max_live_parameters", min(model, 2 * ahead + tables)),
    ):  # fmt: skip
        if zero.get(key) == "auto":
            zero[key] = value


def _refuse_on_cpu(data: dict[str, Any]) -> None:
    for key in ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights"):
        if data.get("zero_optimization", {}).get(key) is True:
            where = f"deepspeed.zero_optimization.{key}"
            raise ConfigError(where, True, "ZeRO++'s quantization runs on GPUs only; use zero3 on a CPU")


def _check_stage(config: RunConfig, data: dict[str, Any], world_size: int) -> None:
    zero = data.setdefault("zero_optimization", {})
    where = "deepspeed.zero_optimization"
    stage = zero.setdefault("stage", 2)
    if stage == "auto":
        raise ConfigError(f"{where}.stage", stage, "nothing in the run decides this; write 0, 1, 2 or 3")
    if stage == 0 and config.train.precision == "bf16":
        raise ConfigError(
            f"{where}.stage", 0, "with train.precision: bf16 DeepSpeed steps the optimizer once before training; "
            "use stage 1 (also on one rank), or train.precision: bf16-autocast or fp32"
        )  # fmt: skip
    for key, lowest in NEEDS_STAGE.items():
        value, field = zero.get(key), f"{where}.{key}"
        if key.startswith("offload"):
            value, field = zero.get(key, {}).get("device", "none"), f"{field}.device"
            if value not in ("none", "cpu"):
                raise ConfigError(field, value, "only cpu and none are supported; use cpu")
        off = value in ("none", None) or value is False or (key == "zero_hpz_partition_size" and value == 1)
        if stage < lowest and not off:
            raise ConfigError(field, value, f"needs {where}.stage {lowest} or more, not {stage}")
    group = zero.get("zero_hpz_partition_size", 1)
    if group != "auto" and world_size % min(group, world_size):
        raise ConfigError(f"{where}.zero_hpz_partition_size", group, f"must divide the number of ranks, {world_size}")


def _fill_precision(config: RunConfig, data: dict[str, Any], fill: _Filler) -> None:
    precision = config.train.precision
    reason = f"train.precision = {precision!r}"
    fill.put("bf16.enabled", precision == "bf16", reason)
    autocast = precision == "bf16-autocast"
    fill.put("torch_autocast.enabled", autocast, reason)
    if autocast:
        fill.put("torch_autocast.dtype", "bfloat16", reason)
        # An empty list: no module's gradients are reduced in bf16.
        fill.put("torch_autocast.lower_precision_safe_modules", [], "gradients being reduced in fp32")
    else:
        data["torch_autocast"] = {"enabled": False}
    if precision == "bf16":
        # Sums over ranks and micro-steps in fp32: relative error of a gradient 2e-6 instead of 3e-3.
        fill.put("communication_data_type", "fp32", f"fp32, in which {reason} reduces gradients")
        fill.put("data_types.grad_accum_dtype", "fp32", f"fp32, in which {reason} sums gradients")
        if data["bf16"].get("check_grad_overflow") is False:
            raise ConfigError("deepspeed.bf16.check_grad_overflow", False, "applies non-finite gradients; remove it")
    else:  # gradients are fp32 as they come
        for section, key in ((data, "communication_data_type"), (data.get("data_types", {}), "grad_accum_dtype")):
            if section.get(key) == "auto":
                del section[key]


def _refuse_auto(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_auto(item, f"{where}.{key}")
    elif value == "auto":
        raise ConfigError(where, "auto", "nothing in the run decides this; write a value")
