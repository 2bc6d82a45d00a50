"""The foresight methods: what each learns from and by which loss, one entry a method.

A new method is an entry here and in `config/foresight_config.py: TEACHERS`, or a `ForesightMethod` of the user's own
that the configuration names; where it learns from something new, a `Teacher` too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mirai_ds.config import ConfigError, ForesightConfig, RunConfig
from mirai_ds.config.foresight_config import TeacherKind
from mirai_ds.config.own import import_own, is_own
from mirai_ds.foresight.desynchronised import DesynchronisedTeacher
from mirai_ds.foresight.encoders import EncoderTeacher
from mirai_ds.foresight.multi_token import TokenTeacher, multi_token_loss
from mirai_ds.foresight.teachers import EmaTeacher, Teacher
from mirai_ds.kernels.foresight_cosine import foresight_cosine


@dataclass(frozen=True)
class Heads:
    """What a loss is made of, beside states and target.

    modules: K heads; unembed: (B, S, D) -> logits (B, S, V) float32; index (S, K) int32, -1 for no neighbour; weights,
    counts (K,); upstream: what backward multiplies the gradient by; recompute: keep no head's logits; seen: where a
    loss of cosines leaves the heads' outputs for who measures them, None: nobody does.
    """

    modules: nn.ModuleList
    unembed: Callable[[Tensor], Tensor]
    index: Tensor
    weights: Tensor
    counts: Tensor
    config: ForesightConfig
    upstream: float
    recompute: bool
    seen: list[Tensor] | None = None


@dataclass(frozen=True)
class ForesightMethod:
    """One way to look ahead.

    targets: the kind of thing that gives the targets, for checks of a configuration and costs.  teacher: makes it.
    loss(heads, states (B, S, D), target): the weighted scalar, before the multiplier, and one detached value a head.
    metric: what those values are called.  cosine: whether the loss is `mirai::foresight_cosine`, whose kernel all
    ranks choose alike.
    """

    targets: TeacherKind
    teacher: Callable[[RunConfig, torch.device], Teacher]
    loss: Callable[[Heads, Tensor, Tensor], tuple[Tensor, Tensor]]
    metric: str
    cosine: bool


def cosine_loss(heads: Heads, states: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mirai, Eq. 11: each head's projection against its neighbour's features."""
    projected = [head(states) for head in heads.modules]
    if heads.seen is not None:
        heads.seen.extend(projected)
    return foresight_cosine(
        projected, target, heads.index, heads.weights, heads.counts,
        heads.config.heads_reduction or "sum", kernel=heads.config.kernel, upstream=heads.upstream,
    )  # fmt: skip


def entropy_loss(heads: Heads, states: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Multi-token prediction: cross-entropies of later tokens."""
    return multi_token_loss(
        heads.modules, heads.unembed, states, target, heads.index, heads.weights, heads.counts,
        heads.config.heads_reduction or "sum", heads.recompute,
    )  # fmt: skip


def own_average(config: RunConfig, device: torch.device) -> Teacher:
    """Mirai-E: the model's own average, or fixed weights in its place, or the experiment of ranks that disagree."""
    foresight, precision = config.foresight, config.train.precision
    low = foresight.teacher_dtype == "bf16" or (foresight.teacher_dtype == "auto" and precision == "bf16")
    autocast = foresight.teacher_dtype == "auto" and precision == "bf16-autocast"
    dtype = torch.bfloat16 if low else torch.float32
    if foresight.desynchronised_ranks is not None:
        return DesynchronisedTeacher(config, dtype, device, autocast)
    return EmaTeacher(config.model, foresight, dtype, device, autocast)


def frozen_encoder(config: RunConfig, device: torch.device) -> Teacher:
    """Mirai-I: a bidirectional vision encoder."""
    encoder, grid = config.foresight.encoder, config.model.grid
    assert encoder is not None
    if not is_own(encoder.name):
        return EncoderTeacher(encoder, grid, device)
    made = import_own(encoder.name, "foresight.encoder.name")(encoder, grid, device)
    if not isinstance(made, Teacher):
        raise ConfigError("foresight.encoder.name", encoder.name, "must make a mirai_ds.foresight.Teacher")
    return made


def later_tokens(config: RunConfig, device: torch.device) -> Teacher:
    """Multi-token prediction: the image's own tokens."""
    return TokenTeacher(config.model.width)


# By `foresight.method`; "none", next-token prediction only, has no entry.
METHODS = {
    "mirai-e": ForesightMethod("gpt", own_average, cosine_loss, "cosine", cosine=True),
    "mirai-i": ForesightMethod("encoder", frozen_encoder, cosine_loss, "cosine", cosine=True),
    "mtp": ForesightMethod("tokens", later_tokens, entropy_loss, "entropy", cosine=False),
}


def method_of(config: ForesightConfig) -> ForesightMethod | None:
    """The configured method, from `METHODS` or of the user's own; None: next tokens only."""
    if not config.active:
        return None
    own: ForesightMethod | None = None if config.method in METHODS else import_own(config.method, "foresight.method")
    return own or METHODS[config.method]
