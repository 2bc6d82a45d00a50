"""Our tables of the keys of DeepSpeed against the installed DeepSpeed: an upgrade that changes keys fails here."""

from __future__ import annotations

import importlib
import json
import types
import typing
from pathlib import Path
from typing import Any

import pytest

from mirai_ds.config import build
from mirai_ds.config.deepspeed_file import packaged_names, resolve
from mirai_ds.config.deepspeed_schema import (
    COUNT,
    ELSEWHERE,
    EXCLUDED,
    FLAG,
    INTEGER,
    NAMES,
    NUMBER,
    OFFLOAD,
    SECTION,
    SECTIONS,
    SIZE,
    TEXT,
    Keys,
)

# Sections that DeepSpeed declares as pydantic models.
MODELS = {
    "zero_optimization": ("deepspeed.runtime.zero.config", "DeepSpeedZeroConfig"),
    "offload_param": ("deepspeed.runtime.zero.offload_config", "DeepSpeedZeroOffloadParamConfig"),
    "offload_optimizer": ("deepspeed.runtime.zero.offload_config", "DeepSpeedZeroOffloadOptimizerConfig"),
    "bf16": ("deepspeed.runtime.precision_config", "DeepSpeedBF16Config"),
    "comms_logger": ("deepspeed.comm.config", "CommsLoggerConfig"),
    "compile": ("deepspeed.compile.config", "CompileConfig"),
}
# Sections that DeepSpeed reads key by key.
NESTED = {"timers": {"throughput": {"enabled", "synchronized"}}}  # sections of sections
READ = ("activation_checkpointing", "flops_profiler", "torch_autocast", "data_types")
# DeepSpeed refuses these; we refuse them with the reason.
REMOVED = {
    "zero_optimization": {"mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"},
}
# Ours alone: not DeepSpeed's, but users look for them in its file.
NOT_DEEPSPEEDS = {"seed"}


class Recorder(dict[str, Any]):
    """A mapping that notes every key somebody asks for."""

    def __init__(self, asked: set[str], **values: Any) -> None:
        super().__init__(**values)
        self.asked = asked

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> Recorder:
        return self


def keys_of(section: str) -> Keys:
    """The keys we allow in a section."""
    keys = OFFLOAD.get(section) or SECTIONS[section]
    assert not isinstance(keys, str)
    return keys


def declared(section: str) -> dict[str, Any]:
    """DeepSpeed's own names (aliases) and fields of a section."""
    module, name = MODELS[section]
    model = getattr(importlib.import_module(module), name)
    return {field.alias or name: field for name, field in model.model_fields.items()}


@pytest.fixture(scope="module")
def asked() -> dict[str, set[str]]:
    """What DeepSpeed asks for at the top ('') and in the sections it reads key by key."""
    from deepspeed.runtime.config import DeepSpeedConfig

    found: dict[str, set[str]] = {name: set() for name in ("", *READ)}
    values = {
        "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "activation_checkpointing": {},
        "flops_profiler": {},
        "data_types": {},
    }
    sections = {name: Recorder(found[name], **value) for name, value in values.items()}
    batch = {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    DeepSpeedConfig(Recorder(found[""], **sections, **batch))
    return found


@pytest.mark.parametrize("section", MODELS)
def test_every_declared_key_is_allowed_or_left_out_on_purpose(section: str) -> None:
    theirs, allowed, excluded = set(declared(section)), set(keys_of(section)), set(EXCLUDED.get(section, {}))
    assert allowed - theirs == set(), "allowed, but DeepSpeed has no such key"
    assert theirs - allowed - excluded == set(), "new in DeepSpeed: allow it, or exclude it with the reason"
    assert excluded - theirs == REMOVED.get(section, set()), "excluded, but gone from DeepSpeed"
    assert allowed & excluded == set()


@pytest.mark.parametrize("section", READ)
def test_every_key_that_is_read_is_allowed_or_left_out_on_purpose(section: str, asked: dict[str, set[str]]) -> None:
    assert asked[section] == set(keys_of(section)) | set(EXCLUDED.get(section, {}))
    assert not set(keys_of(section)) & set(EXCLUDED.get(section, {}))


def test_every_top_level_key_is_known(asked: dict[str, set[str]]) -> None:
    assert asked[""] == set(SECTIONS) | set(ELSEWHERE) - NOT_DEEPSPEEDS
    assert not set(SECTIONS) & set(ELSEWHERE)


def test_what_deepspeed_has_removed_is_refused_by_us_first() -> None:
    from deepspeed.runtime import config

    assert set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(ELSEWHERE)
    assert set(config._REMOVED_ZERO_CONFIG_KEYS) == REMOVED["zero_optimization"]


def test_sections_of_sections_are_as_deepspeed_declares_them() -> None:
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    assert set(DeepSpeedThroughputTimerConfig.model_fields) == NESTED["timers"]["throughput"]
    assert keys_of("timers") == {"throughput": SECTION}


def test_every_section_is_covered() -> None:
    sections = {name for name, keys in SECTIONS.items() if not isinstance(keys, str)}
    assert sections | set(OFFLOAD) == set(MODELS) | set(READ) | set(NESTED)
    assert {key for key, kind in keys_of("zero_optimization").items() if kind == SECTION} == set(OFFLOAD)
    assert set(EXCLUDED) <= sections | set(OFFLOAD)


def kind_of(field: Any) -> set[str]:
    """The kinds of ours that fit DeepSpeed's type and bounds of a field."""
    annotation = field.annotation
    options = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    kind = next((option for option in options if option is not type(None)), annotation)
    if kind is int:
        positive = any(getattr(bound, "gt", None) == 0 for bound in field.metadata)
        return {SIZE} if positive else {SIZE, COUNT, INTEGER}
    if kind is float:
        return {NUMBER}
    if kind in (bool, list):
        return {FLAG if kind is bool else NAMES}
    if kind is Path or (isinstance(kind, type) and issubclass(kind, str)):
        return {TEXT}
    return {"0, 1, 2 or 3"} if getattr(kind, "__name__", "") == "ZeroStageEnum" else {SECTION}


@pytest.mark.parametrize("section", MODELS)
def test_kinds_agree_with_deepspeeds_types(section: str) -> None:
    fields = declared(section)
    wrong = {
        key: (kind, kind_of(fields[key])) for key, kind in keys_of(section).items() if kind not in kind_of(fields[key])
    }
    assert wrong == {}


# Stage 0 in bf16 is refused: it steps before training.
RUNS = [(n, p) for n in packaged_names() for p in ("fp32", "bf16", "bf16-autocast") if (n, p) != ("zero0", "bf16")]


@pytest.mark.parametrize(("name", "precision"), RUNS)
def test_deepspeed_reads_what_we_resolve(name: str, precision: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    run = build({"deepspeed": name, "train": {"global_batch_size": 6, "precision": precision, "grad_accum_steps": 3}})
    data = resolve(run, 1)
    theirs = DeepSpeedConfig(json.loads(json.dumps(data)))
    batch = (theirs.train_batch_size, theirs.train_micro_batch_size_per_gpu, theirs.gradient_accumulation_steps)
    assert batch == (6, 2, 3)
    assert theirs.gradient_clipping == 1.0
    assert theirs.zero_config.stage == data["zero_optimization"]["stage"]
    assert theirs.bfloat16_config.enabled is (precision == "bf16")
    assert theirs.torch_autocast_enabled is (precision == "bf16-autocast")
    assert theirs.grad_accum_dtype == ("fp32" if precision == "bf16" else None)
    assert str(theirs.communication_data_type) == ("torch.float32" if precision == "bf16" else "None")
    offload = {"zero2-offload": ("cpu", None), "zero3-offload": ("cpu", "cpu")}.get(name, (None, None))
    assert getattr(theirs.zero_config.offload_optimizer, "device", None) == offload[0]
    assert getattr(theirs.zero_config.offload_param, "device", None) == offload[1]


def test_deepspeed_defaults_we_guard_against() -> None:
    """Why the loader writes clipping always and refuses misspelt keys: DeepSpeed clips at 1.0 and says nothing."""
    from deepspeed.runtime.config import DeepSpeedConfig

    misspelt = DeepSpeedConfig(
        {"train_batch_size": 1, "gradient_cliping": 0.5, "data_types": {"grad_acum_dtype": "fp32"}}
    )
    assert (misspelt.gradient_clipping, misspelt.grad_accum_dtype) == (1.0, None)
