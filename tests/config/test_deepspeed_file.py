"""The DeepSpeed file: packaged files resolve for every world and precision, "auto" is filled, nothing is mutated."""

from __future__ import annotations

import json
from copy import deepcopy
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from mirai_ds.config import RunConfig, UserError, build
from mirai_ds.config.deepspeed_file import (
    batch_arithmetic,
    check_keys,
    packaged_names,
    ranks_that_fit,
    read,
    reduce_bucket,
    resolve,
)
from mirai_ds.config.deepspeed_schema import COUNT, FLAG, INTEGER, NAMES, NUMBER, SIZE, TEXT, is_a
from mirai_ds.config.load import load
from mirai_ds.config.sizes import parameter_count, projector_parameters

STAGES = {
    "a100x8": 1, "cpu": 1, "gpu1-24g": 2, "gpu1-80g": 2, "gpu1-h200": 2, "nodes-zero1": 1, "nodes-zero2": 2,
    "nodes-zero3": 3, "nodes-zeropp": 3, "zero0": 0, "zero1": 1, "zero2": 2, "zero2-offload": 2, "zero3": 3,
    "zero3-offload": 3,
}  # fmt: skip
# Where each is meant to run: ranks, for the paper's batch of 256.
NODES = (16, 32, 64, 128)
MACHINES = {
    "a100x8": (8,), "cpu": (1, 2), "gpu1-24g": (1,), "gpu1-80g": (1,), "gpu1-h200": (1,), "nodes-zero1": NODES,
    "nodes-zero2": NODES, "nodes-zero3": NODES, "nodes-zeropp": NODES, "zero0": (2, 8), "zero1": (2, 8),
    "zero2": (2, 8, 16), "zero2-offload": (1, 8), "zero3": (2, 8), "zero3-offload": (1, 8),
}  # fmt: skip
PRECISIONS = ("fp32", "bf16", "bf16-autocast")


def run(file: str | dict[str, Any] = "zero2", precision: str = "bf16-autocast", **sections: Any) -> RunConfig:
    """A run with this DeepSpeed file; 48 samples a step."""
    train = {"global_batch_size": 48, "precision": precision, **sections.pop("train", {})}
    return build({"deepspeed": file, "train": train, **sections})


def strings(value: Any) -> list[Any]:
    """All plain values below `value`."""
    if isinstance(value, dict):
        return [item for inner in value.values() for item in strings(inner)]
    return [item for inner in value for item in strings(inner)] if isinstance(value, list) else [value]


def test_the_shipped_files_are_these() -> None:
    assert packaged_names() == sorted(STAGES)
    assert {name: read(name)["zero_optimization"]["stage"] for name in STAGES} == STAGES


@pytest.mark.parametrize("name", STAGES)
def test_shipped_files_are_commented_and_leave_the_run_its_values(name: str) -> None:
    text = (resources.files("mirai_ds.ds_configs") / f"{name}.json").read_text()
    assert "//" in text
    raw = read(name)
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert {key: raw[key] for key in batch} == dict.fromkeys(batch, "auto")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", STAGES)
def test_shipped_files_resolve(name: str, precision: str) -> None:
    for world in (1, 2, 3, 8, 48):
        check_resolved(name, precision, world)


def check_resolved(name: str, precision: str, world: int) -> None:
    config = run(name, precision)
    if name == "zero0" and precision == "bf16":
        with pytest.raises(UserError, match=r"zero_optimization\.stage = 0: .* use stage 1"):
            resolve(config, world)
        return
    data = resolve(config, world)
    assert data["train_batch_size"] == 48
    assert data["train_micro_batch_size_per_gpu"] == 48 // world
    assert data["gradient_accumulation_steps"] == 1
    assert data["gradient_clipping"] == 1.0
    zero, written = data["zero_optimization"], read(name)["zero_optimization"]
    assert zero == {**zero, **{k: v for k, v in written.items() if v != "auto"}, "memory_efficient_linear": False}
    if written.get("reduce_bucket_size", "auto") == "auto":
        assert zero["reduce_bucket_size"] == (14_000_000 if world <= 8 else 19_000_000)
    assert zero["allgather_bucket_size"] == 110_888_448  # GPT-B's parameters, below 2e8
    assert data["bf16"] == {"enabled": precision == "bf16"}
    autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert data["torch_autocast"] == (autocast if precision == "bf16-autocast" else {"enabled": False})
    sums = ("fp32", {"grad_accum_dtype": "fp32"}) if precision == "bf16" else (None, None)
    assert (data.get("communication_data_type"), data.get("data_types")) == sums
    assert data["activation_checkpointing"] == {"partition_activations": False, "cpu_checkpointing": False}
    assert (data["zero_allow_untested_optimizer"], data["zero_force_ds_cpu_optimizer"]) == (True, False)
    assert "auto" not in strings(data)
    check_keys(data)
    json.dumps(data, allow_nan=False)


def test_a_resolved_file_resolves_to_itself() -> None:
    for precision in PRECISIONS:
        once = resolve(run("zero3-offload", precision), 4)
        assert resolve(run(once, precision), 4) == once


def test_values_of_the_run_fill_auto() -> None:
    config = run(
        train={"micro_batch_size": 4, "recompute": {"policy": "full", "implementation": "deepspeed"}},
        optimizer={"grad_clip": 0.25},
    )
    data = resolve(config, 3)
    assert (data["train_micro_batch_size_per_gpu"], data["gradient_accumulation_steps"]) == (4, 4)
    assert data["gradient_clipping"] == 0.25
    partitioned = {"policy": "full", "implementation": "deepspeed", "partition_activations": True}
    data = resolve(run(train={"recompute": partitioned}), 1)
    assert data["activation_checkpointing"] == {"partition_activations": True, "cpu_checkpointing": False}


@pytest.mark.parametrize("clip", [0, 0.5])
def test_clipping_is_always_written(clip: float) -> None:
    data = resolve(run({}, optimizer={"grad_clip": clip}), 1)
    assert data["gradient_clipping"] == clip
    assert type(data["gradient_clipping"]) is float


def test_an_empty_file_is_stage_2() -> None:
    data = resolve(run({}), 2)
    assert data["zero_optimization"] == {
        "stage": 2, "memory_efficient_linear": False, "reduce_bucket_size": 14_000_000,
        "allgather_bucket_size": 110_888_448,
    }  # fmt: skip
    assert (data["train_batch_size"], data["train_micro_batch_size_per_gpu"]) == (48, 24)


def test_auto_in_every_place_that_is_filled() -> None:
    auto = {
        "train_batch_size": "auto",
        "communication_data_type": "auto",
        "bf16": {"enabled": "auto"},
        "torch_autocast": {"enabled": "auto"},
        "data_types": {"grad_accum_dtype": "auto"},
        "activation_checkpointing": {"partition_activations": "auto", "cpu_checkpointing": "auto"},
    }
    data = resolve(run(auto, "bf16"), 1)
    assert data["bf16"] == {"enabled": True}
    assert data["torch_autocast"] == {"enabled": False}
    half = {
        "torch_autocast": {"enabled": "auto", "dtype": "bfloat16", "lower_precision_safe_modules": ["torch.nn.Linear"]}
    }
    assert resolve(run(half, "fp32"), 1)["torch_autocast"] == {"enabled": False}
    assert (data["communication_data_type"], data["data_types"]) == ("fp32", {"grad_accum_dtype": "fp32"})


def test_equal_values_in_file_and_run_are_no_contradiction() -> None:
    equal = {
        "train_batch_size": 48,
        "gradient_clipping": 1,
        "bf16": {"enabled": False},
        "gradient_accumulation_steps": 2,
    }
    data = resolve(run(equal, train={"grad_accum_steps": 2}), 1)
    assert (data["train_batch_size"], data["gradient_accumulation_steps"]) == (48, 2)
    assert type(data["gradient_clipping"]) is float


def test_the_users_own_settings_stay() -> None:
    own = {
        "steps_per_print": 7,
        "wall_clock_breakdown": True,
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 5e8,
            "allgather_bucket_size": 7,
            "memory_efficient_linear": True,
        },
        "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
        "flops_profiler": {"enabled": True, "module_depth": -1, "output_file": "flops.txt"},
    }
    data = resolve(run(own), 1)
    assert {key: data[key] for key in own} == own


def test_a_contradiction_names_both() -> None:
    with pytest.raises(UserError) as caught:
        resolve(run({"train_batch_size": 64}), 1)
    assert str(caught.value) == (
        'deepspeed.train_batch_size = 64: contradicts train.global_batch_size = 48; change one, or write "auto"'
    )


def test_nothing_given_is_mutated() -> None:
    nested = {
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}},
        "torch_autocast": {"lower_precision_safe_modules": []},
    }
    before, config = deepcopy(nested), run(nested)
    assert isinstance(config.deepspeed, dict)
    data = resolve(config, 2)
    assert nested == before
    assert config.deepspeed == before
    data["zero_optimization"]["offload_param"]["device"] = "none"
    data["torch_autocast"]["lower_precision_safe_modules"].append("x")
    assert config.deepspeed == before


COMMENTED = """\ufeff// a comment
{
  # another
  "zero_optimization": {
    "stage": 1,  /* one more */
    "reduce_bucket_size": 5e8,
  }
}
"""


def test_comments_bom_and_trailing_commas_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(COMMENTED, encoding="utf-8")
    assert read(str(path)) == {"zero_optimization": {"stage": 1, "reduce_bucket_size": 500_000_000}}
    assert resolve(run(str(path)), 1)["zero_optimization"]["reduce_bucket_size"] == 500_000_000


def test_packaged_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read("zero1") == read("zero1.json") == read("ds_configs/zero1.json") == read("./ds_configs/zero1.json")
    (tmp_path / "ds_configs").mkdir()
    (tmp_path / "ds_configs" / "zero1.json").write_text('{"steps_per_print": 3}')
    assert read("ds_configs/zero1.json") == {"steps_per_print": 3}  # the user's own copy comes first
    assert read(str(tmp_path / "ds_configs" / "zero1.json")) == {"steps_per_print": 3}
    assert read("zero1")["zero_optimization"]["stage"] == 1


BATCHES = {
    (48, None, None, 1): (48, 1),
    (48, None, None, 4): (12, 1),
    (48, None, 3, 4): (4, 3),
    (48, 6, None, 4): (6, 2),
    (48, 6, 2, 4): (6, 2),
    (48, 1, None, 1): (1, 48),
    (256, 2, 8, 16): (2, 8),
}


@pytest.mark.parametrize(("whole", "micro", "steps", "world"), BATCHES)
def test_batch_arithmetic(whole: int, micro: int | None, steps: int | None, world: int) -> None:
    train = {"global_batch_size": whole, "micro_batch_size": micro, "grad_accum_steps": steps}
    found = batch_arithmetic(build({"train": train}), world)
    assert found == BATCHES[whole, micro, steps, world]
    assert found[0] * found[1] * world == whole


KINDS = {
    FLAG: ((True, False), (1, "true", None)),
    SIZE: ((1, 5e8), (0, -1, 0.5, True, "1", float("inf"))),
    COUNT: ((0, 1.0), (-1, 0.5, False, "0")),
    INTEGER: ((-1, 0), (0.5, "1", True)),
    NUMBER: ((0.5, -1, 0), ("1", True, float("nan"), float("inf"))),
    TEXT: (("", "a"), (1, None, [])),
    NAMES: (([], ["a"]), ("a", [1], ("a",))),
}


@pytest.mark.parametrize(("train", "most", "fits"), [
    ({"global_batch_size": 32}, 8, 8), ({"global_batch_size": 32}, 7, 4), ({"global_batch_size": 32}, 3, 2),
    ({"global_batch_size": 31}, 8, 1), ({"global_batch_size": 32, "micro_batch_size": 8}, 8, 4),
])  # fmt: skip
def test_as_many_ranks_as_share_a_batch(train: dict[str, int], most: int, fits: int) -> None:
    found, why = ranks_that_fit(build({"train": train}), most)
    assert found == fits
    assert (f"the {most} ranks" in why or f"each of {most} ranks" in why) == (fits < most)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_values(kind: str) -> None:
    good, bad = KINDS[kind]
    assert [value for value in good if not is_a(kind, value)] == []
    assert [value for value in bad if is_a(kind, value)] == []


def test_buckets_are_no_larger_than_the_model() -> None:
    """A bucket of 5e7 elements for a model of 1.6 million is touched in full at every step."""
    data = resolve(load("digits-mirai-e"), 2)["zero_optimization"]
    gpt, heads = parameter_count(load("digits-mirai-e").model), 3 * projector_parameters(128, 256, 128)
    assert data["reduce_bucket_size"] == data["allgather_bucket_size"] == gpt + heads


@pytest.mark.parametrize("size", ["GPT-B", "GPT-L", "GPT-XL"])
@pytest.mark.parametrize("name", STAGES)
def test_every_file_resolves_for_every_size_on_its_machine(name: str, size: str) -> None:
    """Buckets and what is fetched ahead follow the model: none is larger than it, none so small that calls cost more
    than bytes (5 million elements: 20 MB, at 240 GB/s longer than a ring's latency)."""
    for world in MACHINES[name]:
        data = resolve(load("mirai-e-b", [f"model.size={size}"], name), world)
        zero = data["zero_optimization"]
        assert data["train_micro_batch_size_per_gpu"] * data["gradient_accumulation_steps"] * world == 256
        model = zero["allgather_bucket_size"] if size == "GPT-B" else 300_000_000
        assert 5_000_000 <= zero["reduce_bucket_size"] <= min(model, 50_000_000)
        if zero["stage"] == 3:
            assert zero["stage3_prefetch_bucket_size"] <= zero["stage3_max_live_parameters"]
        if name.startswith("nodes-"):
            assert world % 8 == 0
            assert zero.get("zero_hpz_partition_size", 8) == 8


def test_buckets_grow_with_the_root_of_the_model_and_on_the_network() -> None:
    """sqrt(P x idle bytes / 2) by hand: 4 x 110.9e6 x 13.4e6 / 2 -> 54.5 MB, 14 million fp32."""
    assert [reduce_bucket(110_888_448, world) for world in (1, 8, 16, 128)] == [14e6, 14e6, 19e6, 19e6]
    assert reduce_bucket(4 * 110_888_448, 8) == 27e6
    assert reduce_bucket(2_000_000_000, 8) == 50e6
    assert reduce_bucket(1_000_000, 8) == 1e6


def test_quantization_is_refused_on_a_cpu() -> None:
    config = run("nodes-zeropp")
    assert resolve(config, 8)["zero_optimization"]["zero_quantized_gradients"] is True
    with pytest.raises(UserError, match=r"zero_quantized_weights = true: .*GPUs only; use zero3 on a CPU"):
        resolve(config, 8, cpu=True)
    for name in STAGES.keys() - {"nodes-zeropp"}:
        resolve(run(name), 8, cpu=True)
