"""Parameter counts by formula, without building the network."""

from __future__ import annotations

from mirai_ds.config.foresight_config import ForesightConfig
from mirai_ds.config.model_config import ModelConfig


def block_parameters(config: ModelConfig) -> int:
    """Parameters of one block: attention 4 D^2, feed-forward 3 D h, two norms 2 D."""
    return 4 * config.width**2 + 3 * config.width * config.ffn_hidden + 2 * config.width


def parameter_count(config: ModelConfig) -> int:
    """All parameters of the GPT; block_size has no part, since positions have none."""
    tables = (2 * config.vocab_size + config.num_classes + 1 + config.learnable_tokens) * config.width
    return tables + config.depth * block_parameters(config) + config.width


def projector_parameters(dim: int, hidden: int, target: int) -> int:
    """Parameters of one MLP head D -> hidden -> hidden -> C with biases (7,344,896 for 768 -> 2048 -> 2048 -> 768)."""
    return dim * hidden + hidden + hidden * hidden + hidden + hidden * target + target


def head_tensors(foresight: ForesightConfig, dim: int, target: int) -> list[int]:
    """Sizes of the tensors of one head D -> C: the MLP of `projector_parameters`; or a transformer block (two
    LayerNorms, attention, MLP of ratio 4, all biased) and a linear layer, together 7,678,464 for D = C = 768."""
    if foresight.head == "transformer":
        layers = [(dim, 3 * dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim), (dim, target)]
        return [dim] * 4 + [size for into, out in layers for size in (into * out, out)]
    hidden = foresight.projector_dim
    return [dim * hidden, hidden, hidden**2, hidden, hidden * target, target]


def heads_parameters(foresight: ForesightConfig, dim: int, target: int) -> int:
    """Parameters of all heads of a run."""
    return foresight.heads * sum(head_tensors(foresight, dim, target))
