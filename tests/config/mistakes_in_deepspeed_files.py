"""Typical mistakes in DeepSpeed files: (name, file, what the message must hold); the run on 2 ranks has batch 256."""

from __future__ import annotations

from typing import Any, NamedTuple

OFFLOAD = {"device": "cpu"}


class Mistake(NamedTuple):
    """A file as text or mapping, parts of the one-line message, and the run's precision and ranks."""

    file: str | dict[str, Any]
    parts: tuple[str, ...]
    precision: str = "bf16-autocast"
    world: int = 2


def _file(file: str | dict[str, Any], *parts: str) -> Mistake:
    return Mistake(file, parts)


def _zero(section: dict[str, Any], *parts: str) -> Mistake:
    """`parts[0]` is a key of `zero_optimization` with the value."""
    return Mistake({"zero_optimization": section}, (f"deepspeed.zero_optimization.{parts[0]}", *parts[1:]))


UNKNOWN = {
    "top": _file({"gradient_cliping": 0.5}, "deepspeed.gradient_cliping: unknown key", "'gradient_clipping'?"),
    "top-nothing-near": _file({"zzz": 1}, "deepspeed.zzz: unknown key", "use one of: activation_checkpointing, bf16,"),
    "section": _file({"zero_optimisation": {}}, "deepspeed.zero_optimisation: unknown", "'zero_optimization'?"),
    "in-zero": _zero({"overlap_com": True}, "overlap_com: unknown key", "did you mean 'overlap_comm'?"),
    "in-zero-without-prefix": _zero({"prefetch_bucket_size": 1}, "prefetch_bucket_size: unknown", "'stage3_prefetch_"),
    "in-offload": _zero(
        {"stage": 3, "offload_param": {"device": "cpu", "pin_mem": True}},
        "offload_param.pin_mem: unknown",
        "'pin_memory'?",
    ),
    "in-bf16": _file({"bf16": {"enable": True}}, "deepspeed.bf16.enable: unknown key", "did you mean 'enabled'?"),
    "in-data-types": _file(
        {"data_types": {"grad_acum_dtype": "fp32"}}, "grad_acum_dtype: unknown", "'grad_accum_dtype'?"
    ),
    "in-recompute": _file(
        {"activation_checkpointing": {"partitioned_activations": True}},
        "partitioned_activations: unknown",
        "'partition_activations'?",
    ),
}

ELSEWHERE = {
    "optimizer": _file({"optimizer": {"type": "Adam"}}, "deepspeed.optimizer = {'type': 'Adam'}", "optimizer.lr"),
    "scheduler": _file({"scheduler": {"type": "X"}}, "deepspeed.scheduler = {'type': 'X'}", "optimizer.schedule"),
    "fp16": _file({"fp16": {"enabled": True}}, "deepspeed.fp16 = {'enabled': True}", "use train.precision: bf16"),
    "elasticity": _file({"elasticity": {}}, "deepspeed.elasticity = {}", "0.19.8 removed it", "any number of ranks"),
    "amp": _file({"amp": {"enabled": True}}, "deepspeed.amp = ", "use train.precision: bf16-autocast"),
    "tensorboard": _file({"tensorboard": {"enabled": True}}, "deepspeed.tensorboard", "see tracking"),
    "bfloat16": _file({"bfloat16": {"enabled": True}}, "deepspeed.bfloat16", "DeepSpeed's old name; write bf16"),
    "cpu-offload": _zero({"cpu_offload": True}, "cpu_offload = true", "use offload_optimizer"),
    "mics": _zero({"mics_shard_size": 8}, "mics_shard_size = 8", "removed MiCS; use zero_hpz_partition_size"),
    "bf16-masters": _file({"bf16": {"bf16_optimizer_states": True}}, "bf16_optimizer_states = true", "states are fp32"),
}

CONTRADICTIONS = {
    "batch": _file({"train_batch_size": 64}, "deepspeed.train_batch_size = 64", "train.global_batch_size = 256"),
    "micro": _file(
        {"train_micro_batch_size_per_gpu": 64}, "train_micro_batch_size_per_gpu = 64", "train.micro_batch_size = 128"
    ),
    "accumulation": _file(
        {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps = 2", "train.grad_accum_steps = 1", '"auto"'
    ),
    "clipping": _file({"gradient_clipping": 0.5}, "gradient_clipping = 0.5", "optimizer.grad_clip = 1.0", "change one"),
    "bf16-on": _file({"bf16": {"enabled": True}}, "deepspeed.bf16.enabled = true", "train.precision = 'bf16-autocast'"),
    "bf16-off": Mistake({"bf16": {"enabled": False}}, ("bf16.enabled = false", "train.precision = 'bf16'"), "bf16"),
    "autocast-on": Mistake(
        {"torch_autocast": {"enabled": True}}, ("torch_autocast.enabled = true", "train.precision = 'fp32'"), "fp32"
    ),
    "autocast-dtype": _file({"torch_autocast": {"dtype": "float16"}}, "torch_autocast.dtype = 'float16'", "change one"),
    "communication": Mistake(
        {"communication_data_type": "bf16"}, ("communication_data_type = 'bf16'", "contradicts fp32"), "bf16"
    ),
    "sums": Mistake(
        {"data_types": {"grad_accum_dtype": "bf16"}}, ("grad_accum_dtype = 'bf16'", "contradicts fp32"), "bf16"
    ),
    "overflow": Mistake(
        {"bf16": {"check_grad_overflow": False}}, ("check_grad_overflow = false", "non-finite", "remove it"), "bf16"
    ),
    "recompute": _file(
        {"activation_checkpointing": {"cpu_checkpointing": True}},
        "deepspeed.activation_checkpointing.cpu_checkpointing = true",
        "train.recompute.cpu_checkpointing = false",
    ),
    "stage-0-in-bf16": Mistake(
        {"zero_optimization": {"stage": 0}},
        ("deepspeed.zero_optimization.stage = 0", "train.precision: bf16", "use stage 1"),
        "bf16",
    ),
    "packaged-stage-0-in-bf16": Mistake("zero0", ("zero_optimization.stage = 0", "use stage 1"), "bf16"),
    "ranks": Mistake("zero2", ("train.global_batch_size = 256", "by the 3 ranks; use 255 or 258"), world=3),
    "more-ranks-than-samples": Mistake("zero2", ("train.global_batch_size = 256", "512 ranks; use 512"), world=512),
    "hpz": Mistake(
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}},
        ("zero_hpz_partition_size = 3", "must divide the number of ranks, 4"),
        world=4,
    ),
    "hpz-on-stage-2": Mistake(
        {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}},
        ("zero_hpz_partition_size = 2", "needs deepspeed.zero_optimization.stage 3 or more, not 2"),
        world=4,
    ),
    "qwz-on-stage-1": Mistake(
        {"zero_optimization": {"stage": 1, "zero_quantized_weights": True}},
        ("zero_quantized_weights = true", "stage 3 or more, not 1"),
    ),
}

VALUES = {
    "stage-text": _zero({"stage": "2"}, "stage = '2'", "must be 0, 1, 2 or 3, without quotes"),
    "stage-true": _zero({"stage": True}, "stage = true", "must be 0, 1, 2 or 3"),
    "stage-4": _zero({"stage": 4}, "stage = 4", "must be 0, 1, 2 or 3"),
    "stage-fraction": _zero({"stage": 1.5}, "stage = 1.5", "must be 0, 1, 2 or 3"),
    "stage-auto": _zero({"stage": "auto"}, "stage = 'auto'", "nothing in the run decides this; write 0, 1, 2 or 3"),
    "auto-bucket": _zero({"sub_group_size": "auto"}, "sub_group_size = 'auto'", "write a value"),
    "auto-flag": _zero({"overlap_comm": "auto"}, "overlap_comm = 'auto'", "nothing in the run decides this"),
    "auto-in-offload": _zero(
        {"stage": 2, "offload_optimizer": {"pin_memory": "auto"}},
        "offload_optimizer.pin_memory = 'auto'",
        "write a value",
    ),
    "auto-section": _file({"zero_optimization": "auto"}, "deepspeed.zero_optimization = 'auto'", "must be a section"),
    "bucket-text": _zero({"reduce_bucket_size": "5e8"}, "reduce_bucket_size = '5e8'", "whole number, without quotes"),
    "bucket-negative": _zero({"reduce_bucket_size": -1}, "reduce_bucket_size = -1", "must be a positive whole number"),
    "bucket-fraction": _zero({"allgather_bucket_size": 0.5}, "allgather_bucket_size = 0.5", "a positive whole number"),
    "threshold-negative": _zero({"stage3_max_live_parameters": -1}, "stage3_max_live_parameters = -1", "0 or more"),
    "flag-text": _zero({"overlap_comm": "true"}, "overlap_comm = 'true'", "must be true or false, without quotes"),
    "flag-number": _zero({"contiguous_gradients": 1}, "contiguous_gradients = 1", "must be true or false"),
    "flag-null": _zero({"overlap_comm": None}, "overlap_comm = null", "remove the key"),
    "zero-true": _file({"zero_optimization": True}, "deepspeed.zero_optimization = true", "must be a section { ... }"),
    "bf16-true": _file({"bf16": True}, "deepspeed.bf16 = true", "must be a section { ... }"),
    "plain-as-section": _file(
        {"train_batch_size": {"a": 1}}, "deepspeed.train_batch_size = {'a': 1}", "must be a positive"
    ),
    "batch-list": _file({"train_batch_size": [256]}, "deepspeed.train_batch_size = [256]", "must be a positive whole"),
    "clipping-text": _file(
        {"gradient_clipping": "1.0"}, "gradient_clipping = '1.0'", "must be a number, without quotes"
    ),
    "dtype": _file({"communication_data_type": "float32"}, "communication_data_type = 'float32'", '"fp32" or "bf16"'),
    "offload-low-stage": _zero(
        {"stage": 2, "offload_param": OFFLOAD}, "offload_param.device = 'cpu'", "stage 3 or more, not 2"
    ),
    "offload-stage-0": _zero(
        {"stage": 0, "offload_optimizer": OFFLOAD}, "offload_optimizer.device = 'cpu'", "stage 1 or more, not 0"
    ),
    "offload-nvme": _zero(
        {"stage": 3, "offload_param": {"device": "nvme"}},
        "offload_param.device = 'nvme'",
        "only cpu and none",
        "use cpu",
    ),
    "offload-text": _zero({"offload_optimizer": "cpu"}, "offload_optimizer = 'cpu'", "must be a section { ... }"),
}

TEXT = {
    "list": _file("[1, 2]", "file.json: must be a JSON object { ... }"),
    "empty": _file("  \n", "file.json: must be a JSON object { ... }"),
    "number": _file("3", "file.json: must be a JSON object { ... }"),
    "open-brace": _file('{"bf16": {"enabled": true}', "file.json: not valid JSON", "line 1 column"),
    "missing-comma": _file('{"train_batch_size": 1\n "bf16": {}\n "a', "file.json: not valid JSON", "line "),
    "xml": _file("<zero stage='1'/>", "file.json: must be a JSON object"),
    "duplicate-top": _file('{"bf16": {}, "bf16": {}}', "file.json: bf16: given twice; keep one"),
    "duplicate-nested": _file('{"zero_optimization": {"stage": 1, "stage": 2}}', "file.json: stage: given twice"),
    "latin-1": _file("\udce4", "file.json: not valid JSON"),
}

PLACES = {
    "unknown-name": (
        "zero4",
        (
            "deepspeed = 'zero4'",
            "no such file",
            "cpu, gpu1-24g, gpu1-80g",
            "nodes-zeropp, zero0, zero1, zero2, zero2-offload",
        ),
    ),
    "no-file": (
        "conf/x.json",
        ("deepspeed = 'conf/x.json'", "no such file", "give a .json file or one of: a100x8, cpu"),
    ),
    "not-packaged": ("other/ds_configs/zero2.json", ("deepspeed = 'other/ds_configs/zero2.json'", "no such file")),
    "folder": ("folder.json", ("deepspeed = 'folder.json'", "no such file")),
}

ALL = {**UNKNOWN, **ELSEWHERE, **CONTRADICTIONS, **VALUES, **TEXT}
