"""The DeepSpeed file's keys, all of them, and what a value of each must be.

DeepSpeed ignores misspelt top-level keys and misspelt keys of several sections, so a `gradient_cliping: 0.5` would
train with 1.0.  We know every key we support and refuse the rest.  `tests/engine/test_deepspeed_schema.py` keeps these
tables equal to what the installed DeepSpeed itself declares.
"""

from __future__ import annotations

from collections.abc import Mapping

Keys = Mapping[str, str]

# What a value must be, in the words of the error message.
FLAG = "true or false"
COUNT = "a whole number, 0 or more"
SIZE = "a positive whole number"
INTEGER = "a whole number"
NUMBER = "a number"
TEXT = "text"
NAMES = "a list of names"
DTYPE = '"fp32" or "bf16"'
SECTION = "a section { ... }"

# Top-level keys: what a plain value must be, or the keys of a section.
SECTIONS: dict[str, str | Keys] = {
    "train_batch_size": SIZE,
    "train_micro_batch_size_per_gpu": SIZE,
    "gradient_accumulation_steps": SIZE,
    "gradient_clipping": NUMBER,
    "communication_data_type": DTYPE,
    "prescale_gradients": FLAG,
    "gradient_predivide_factor": NUMBER,
    "zero_allow_untested_optimizer": FLAG,
    "zero_force_ds_cpu_optimizer": FLAG,
    "steps_per_print": SIZE,
    "wall_clock_breakdown": FLAG,
    "memory_breakdown": FLAG,
    "dump_state": FLAG,
    "bf16": {"enabled": FLAG, "check_grad_overflow": FLAG, "immediate_grad_update": FLAG},
    "torch_autocast": {"enabled": FLAG, "dtype": TEXT, "lower_precision_safe_modules": NAMES},
    "data_types": {"grad_accum_dtype": DTYPE},
    "zero_optimization": {
        "stage": "0, 1, 2 or 3",
        "contiguous_gradients": FLAG,
        "reduce_scatter": FLAG,
        "reduce_bucket_size": SIZE,
        "use_multi_rank_bucket_allreduce": FLAG,
        "allgather_partitions": FLAG,
        "allgather_bucket_size": SIZE,
        "overlap_comm": FLAG,
        "load_from_fp32_weights": FLAG,
        "elastic_checkpoint": FLAG,
        "offload_param": SECTION,
        "offload_optimizer": SECTION,
        "sub_group_size": SIZE,
        "round_robin_gradients": FLAG,
        "stage3_prefetch_bucket_size": COUNT,
        "stage3_param_persistence_threshold": COUNT,
        "stage3_model_persistence_threshold": COUNT,
        "stage3_max_live_parameters": COUNT,
        "stage3_max_reuse_distance": COUNT,
        "stage3_gather_16bit_weights_on_model_save": FLAG,
        "stage3_module_granularity_threshold": COUNT,
        "stage3_use_all_reduce_for_fetch_params": FLAG,
        "stage3_allgather_sequential": FLAG,
        "ignore_unused_parameters": FLAG,
        "zero_hpz_partition_size": SIZE,
        "zero_quantized_weights": FLAG,
        "zero_quantized_nontrainable_weights": FLAG,
        "zero_quantized_gradients": FLAG,
        "memory_efficient_linear": FLAG,
        "save_muon_momentum_buffer_in_memory": FLAG,
    },
    "activation_checkpointing": {
        "partition_activations": FLAG,
        "cpu_checkpointing": FLAG,
        "contiguous_memory_optimization": FLAG,
        "number_checkpoints": SIZE,
        "synchronize_checkpoint_boundary": FLAG,
        "profile": FLAG,
    },
    "comms_logger": {"enabled": FLAG, "verbose": FLAG, "prof_all": FLAG, "prof_ops": NAMES, "debug": FLAG},
    "flops_profiler": {
        "enabled": FLAG,
        "recompute_fwd_factor": NUMBER,
        "profile_step": COUNT,
        "module_depth": INTEGER,
        "top_modules": COUNT,
        "detailed": FLAG,
        "output_file": TEXT,
    },
    "compile": {"deepcompile": FLAG},
    "timers": {"throughput": SECTION},
}

OFFLOAD: dict[str, Keys] = {
    "offload_optimizer": {
        "device": TEXT,
        "nvme_path": TEXT,
        "buffer_count": COUNT,
        "pin_memory": FLAG,
        "pipeline_read": FLAG,
        "pipeline_write": FLAG,
        "fast_init": FLAG,
        "ratio": NUMBER,
    },
    "offload_param": {
        "device": TEXT,
        "nvme_path": TEXT,
        "buffer_count": COUNT,
        "buffer_size": COUNT,
        "max_in_cpu": COUNT,
        "pin_memory": FLAG,
    },
}

# Real DeepSpeed keys that belong to the run config here, and where.
ELSEWHERE = {
    "optimizer": "the run's optimizer section (optimizer.lr, optimizer.betas, ...) builds it",
    "scheduler": "the run's optimizer.schedule sets the learning rate",
    "tensorboard": "mirai_ds writes TensorBoard itself; see tracking",
    "csv_monitor": "mirai_ds writes metrics.jsonl itself, and a CSV file; see tracking",
    "wandb": "mirai_ds logs to Weights & Biases itself; see tracking",
    "comet": "a tracker of your own may log there; see tracking",
    "checkpoint": "mirai_ds writes its own checkpoints; see checkpoint.*",
    "datastates_ckpt": "mirai_ds writes its own checkpoints; see checkpoint.*",
    "nebula": "mirai_ds writes its own checkpoints; see checkpoint.*",
    "fp16": "loss scaling is not supported; use train.precision: bf16 or bf16-autocast",
    "amp": "apex is not supported; use train.precision: bf16-autocast",
    "bfloat16": "DeepSpeed's old name; write bf16",
    "elasticity": "DeepSpeed 0.19.8 removed it; resume on any number of ranks instead",
    "seed": "the run's seed decides",
    "dataloader_drop_last": "mirai_ds has its own loaders; the incomplete last batch is always dropped",
    "data_efficiency": "mirai_ds has its own data order",
    "curriculum_learning": "mirai_ds has its own data order",
    "log_level": "set the environment variable MIRAI_DS_DEEPSPEED_LOG",
    "gradient_allreduce_op": "gradients are always averaged; set the global batch by train.global_batch_size",
    "managed_gradient_accumulation": "mirai_ds counts the micro-steps; see train.grad_accum_steps",
} | dict.fromkeys(
    (
        "aio", "autotuning", "compression_training", "disable_allgather", "disable_python_gc", "eigenvalue",
        "expert_parallel", "graph_harvesting", "hybrid_engine", "pipeline", "progressive_layer_drop",
        "quantize_training", "seq_parallel_communication_data_type", "sparse_attention", "sparse_gradients",
        "tensor_parallel", "use_data_before_expert_parallelism", "vocabulary_size", "weight_quantization",
    ),
    "mirai_ds does not support it",
)  # fmt: skip

_OLD_NAME = "DeepSpeed's old name; use"
_DEBUGGING = "a switch for debugging DeepSpeed itself, never tested with mirai_ds"

# Real DeepSpeed keys inside sections that we leave out on purpose, and why.
EXCLUDED: dict[str, dict[str, str]] = {
    "zero_optimization": {
        "compute_grad_norm": "mirai_ds logs the gradient norm and skips steps by it",
        "zenflow": "ZenFlow hides the fp32 masters from the EMA",
        "cpu_offload": f'{_OLD_NAME} offload_optimizer: {{ "device": "cpu" }}',
        "cpu_offload_param": f'{_OLD_NAME} offload_param: {{ "device": "cpu" }}',
        "cpu_offload_use_pin_memory": f"{_OLD_NAME} pin_memory in offload_optimizer and offload_param",
        "stage3_gather_fp16_weights_on_model_save": f"{_OLD_NAME} stage3_gather_16bit_weights_on_model_save",
        "legacy_stage1": "the stage 1 of old releases; its gradients were wrong under accumulation",
        "parameter_alignment": "it pads the flat buffers that EMA and checkpoints are laid out by",
        "pipeline_loading_checkpoint": "mirai_ds loads its own checkpoints",
        "override_module_apply": _DEBUGGING,
        "log_trace_cache_warnings": _DEBUGGING,
        "enable_sanity_checks": _DEBUGGING,
        "leaf_module": "the models have no mixture of experts",
        "mics_shard_size": "DeepSpeed 0.19.8 removed MiCS; use zero_hpz_partition_size",
        "mics_hierarchical_params_gather": "DeepSpeed 0.19.8 removed MiCS; use zero_hpz_partition_size",
        "zeropp_loco_param": "DeepSpeed 0.19.8 removed LoCo",
    },
    "bf16": {
        "bf16_master_weights_and_grads": "masters are fp32: in bf16 an update of 1e-4 is rounded away",
        "bf16_optimizer_states": "optimizer states are fp32: in bf16 an update of 1e-4 is rounded away",
    },
    "data_types": {
        "param_dtype": "train.precision decides",
        "buffer_dtype": "rotary tables stay fp32",
        "keep_in_fp32_modules": "rotary tables stay fp32",
    },
    "offload_optimizer": {
        "super_offload": "never tested with mirai_ds",
        "cpuadam_cores_perc": "only for super_offload, which was never tested with mirai_ds",
    },
    "compile": dict.fromkeys(
        (
            "autoep_non_moe", "free_activation", "free_activation_threshold", "offload_activation",
            "offload_activation_pin_memory", "offload_opt_states", "double_buffer", "symmetric_memory", "debug_log",
            "offload_parameters", "sync_before_reduce", "sync_after_reduce", "sync_before_allgather",
            "sync_after_allgather", "keep_int_input_tensors", "keep_all_input_tensors", "passes",
        ),
        "DeepCompile beyond on and off was never tested with mirai_ds",
    ),
}  # fmt: skip


def is_a(kind: str, value: object) -> bool:
    """Whether `value`, as read from JSON, is of a kind above."""
    if kind == FLAG:
        return isinstance(value, bool)
    if kind in (TEXT, DTYPE):
        return isinstance(value, str) and (kind == TEXT or value in ("fp32", "bf16"))
    if kind == NAMES:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == SECTION:
        return isinstance(value, dict)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if kind == NUMBER:
        return abs(value) < float("inf")
    whole = isinstance(value, int) or value.is_integer()
    if kind == "0, 1, 2 or 3":
        return value in (0, 1, 2, 3) and isinstance(value, int)
    return whole and value >= {SIZE: 1, COUNT: 0}.get(kind, value)
