"""The DeepSpeed file's keys, all of them.

DeepSpeed ignores misspelt top-level keys and misspelt keys of several sections, so a `gradient_cliping: 0.5` would train
with 1.0.  We know every key we support and refuse the rest.  `tests/engine/test_deepspeed_schema.py` keeps this table
equal to what the installed DeepSpeed itself declares.
"""

from __future__ import annotations

# Top-level sections and the keys each may hold; None = a plain value.
SECTIONS: dict[str, frozenset[str] | None] = {
    "train_batch_size": None,
    "train_micro_batch_size_per_gpu": None,
    "gradient_accumulation_steps": None,
    "gradient_clipping": None,
    "communication_data_type": None,
    "prescale_gradients": None,
    "gradient_predivide_factor": None,
    "zero_allow_untested_optimizer": None,
    "zero_force_ds_cpu_optimizer": None,
    "steps_per_print": None,
    "wall_clock_breakdown": None,
    "memory_breakdown": None,
    "dump_state": None,
    "graph_harvesting": None,
    "bf16": frozenset({"enabled", "check_grad_overflow", "immediate_grad_update"}),
    "torch_autocast": frozenset({"enabled", "dtype", "lower_precision_safe_modules"}),
    "data_types": frozenset({"grad_accum_dtype"}),
    "zero_optimization": frozenset(
        {
            "stage", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "use_multi_rank_bucket_allreduce",
            "allgather_partitions", "allgather_bucket_size", "overlap_comm", "load_from_fp32_weights",
            "elastic_checkpoint", "offload_param", "offload_optimizer", "sub_group_size", "round_robin_gradients",
            "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_model_persistence_threshold",
            "stage3_max_live_parameters", "stage3_max_reuse_distance",
            "stage3_gather_16bit_weights_on_model_save", "stage3_module_granularity_threshold",
            "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential", "ignore_unused_parameters",
            "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
            "zero_quantized_gradients", "memory_efficient_linear", "save_muon_momentum_buffer_in_memory",
        }
    ),
    "activation_checkpointing": frozenset(
        {
            "partition_activations", "cpu_checkpointing", "contiguous_memory_optimization", "number_checkpoints",
            "synchronize_checkpoint_boundary", "profile",
        }
    ),
    "comms_logger": frozenset({"enabled", "verbose", "prof_all", "prof_ops", "debug"}),
    "flops_profiler": frozenset(
        {"enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"}
    ),
    "compile": frozenset({"deepcompile"}),
}

OFFLOAD = {
    "offload_optimizer": frozenset(
        {"device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init", "ratio"}
    ),
    "offload_param": frozenset({"device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"}),
}

# Real DeepSpeed keys that belong to the run config here, and where.
ELSEWHERE = {
    "optimizer": "the run's optimizer section (optimizer.lr, optimizer.betas, ...) builds it",
    "scheduler": "the run's optimizer.schedule sets the learning rate",
    "tensorboard": "mirai_ds writes TensorBoard itself; see logging.tensorboard",
    "csv_monitor": "mirai_ds writes metrics.jsonl itself",
    "wandb": "mirai_ds writes TensorBoard and metrics.jsonl; convert from those",
    "checkpoint": "mirai_ds writes its own checkpoints; see checkpoint.*",
    "fp16": "loss scaling is not supported; use train.precision: bf16 or bf16-autocast",
    "amp": "apex is not supported; use train.precision: bf16-autocast",
    "elasticity": "DeepSpeed 0.19.8 removed it; resume on any number of ranks instead",
    "seed": "the run's seed decides",
}
