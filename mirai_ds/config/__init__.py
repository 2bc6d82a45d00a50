"""The whole schema: strict models, YAML recipes with overrides, and the DeepSpeed file."""

from mirai_ds.config.encoder_config import EncoderConfig
from mirai_ds.config.errors import ConfigError, UserError
from mirai_ds.config.eval_config import FidConfig, Weights
from mirai_ds.config.foresight_config import ForesightConfig, LambdaSchedule
from mirai_ds.config.load import build, dump, load, recipe_names, recipe_text
from mirai_ds.config.model_config import SIZES, ModelConfig
from mirai_ds.config.run_config import (
    CheckpointConfig,
    DataConfig,
    GuardConfig,
    OptimizerConfig,
    RecomputeConfig,
    RunConfig,
    SamplingConfig,
    SpikeConfig,
    TrainConfig,
)

__all__ = [
    "SIZES",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "EncoderConfig",
    "FidConfig",
    "ForesightConfig",
    "GuardConfig",
    "LambdaSchedule",
    "ModelConfig",
    "OptimizerConfig",
    "RecomputeConfig",
    "RunConfig",
    "SamplingConfig",
    "SpikeConfig",
    "TrainConfig",
    "UserError",
    "Weights",
    "build",
    "dump",
    "load",
    "recipe_names",
    "recipe_text",
]
