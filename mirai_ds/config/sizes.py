"""Parameter counts by formula, without building the network."""

from __future__ import annotations

from mirai_ds.config.foresight_config import ForesightConfig
from mirai_ds.config.model_config import ModelConfig


def block_parameters(config: ModelConfig) -> int:
    """Parameters of one block: attention 4 D^2, feed-forward 3 D h, two norms 2 D."""
    return 4 * config.width**2 + 3 * config.width * config.ffn_hidden + 2 * config.width


def parameter_count(config: ModelConfig) -> int:
    """All parameters of the GPT, PAR's learnable tokens included; block_size has no part, since positions have none."""
    learnable = (config.par_tokens or 1) - 1
    tables = (2 * config.vocab_size + config.num_classes + 1 + learnable) * config.width
    return tables + config.depth * block_parameters(config) + config.width


def projector_parameters(dim: int, hidden: int, target: int) -> int:
    """Parameters of one MLP head D -> hidden -> hidden -> C with biases (7,344,896 for 768 -> 2048 -> 2048 -> 768)."""
    return dim * hidden + hidden + hidden * hidden + hidden + hidden * target + target


def transformer_head_parameters(dim: int, target: int) -> int:
    """Parameters of one transformer head: two LayerNorms 4 D, attention 4 D^2 + 4 D, MLP of ratio 4, a linear D -> C
    (7,678,464 for D = C = 768)."""
    return 4 * dim + 4 * dim**2 + 4 * dim + 8 * dim**2 + 5 * dim + dim * target + target


def heads_parameters(foresight: ForesightConfig, dim: int, target: int) -> int:
    """Parameters of all heads of a run."""
    if foresight.head == "transformer":
        return foresight.heads * transformer_head_parameters(dim, target)
    return foresight.heads * projector_parameters(dim, foresight.projector_dim, target)
