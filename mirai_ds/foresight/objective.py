"""The one join of model and foresight: what DeepSpeed trains, returning the total loss of a micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mirai_ds.config import ForesightConfig, ModelConfig
from mirai_ds.foresight.diagnostics import TapGradients, centred_cosines
from mirai_ds.foresight.heads import heads
from mirai_ds.foresight.methods import Heads, method_of
from mirai_ds.foresight.neighbours import index_table, slot_counts
from mirai_ds.model import GPT, next_token_loss


class MiraiObjective(nn.Module):
    """GPT and heads in one module, so that ZeRO sees every use of every parameter.

    total = ntp + multiplier * reduction_k weights_k * -cos(head_k(h), target)   (Mirai, Eq. 11)

    or, of mtp, cross-entropies of later tokens in place of the cosines (`multi_token`).
    """

    index: Tensor
    head_weights: Tensor
    slot_counts: Tensor

    def __init__(
        self,
        model: ModelConfig,
        foresight: ForesightConfig,
        feature_dim: int | None = None,
        grad_accum_steps: int = 1,
    ) -> None:
        """feature_dim: width of the teacher's features, default the model's.  grad_accum_steps: what the engine divides
        the loss by before backward; a wrong number costs time, not correctness."""
        super().__init__()
        self.foresight, self.method = foresight, method_of(foresight)
        self.grad_accum_steps = grad_accum_steps
        self.gpt = GPT(model)
        self.projectors = heads(foresight, model.width, feature_dim or model.width)
        self.chunked_loss = False  # set by the engine: never all logits at once
        self.recompute_heads = False  # mtp: whether the backward pass computes each head's logits again
        self.diagnostics: TapGradients | None = None  # `measure`: what to measure besides
        if foresight.active:
            table = index_table(foresight, model.grid, model.par_tokens)
            self.register_buffer("index", table.int(), persistent=False)
            self.register_buffer("slot_counts", slot_counts(foresight, table, model.block_size), persistent=False)
            self.register_buffer("head_weights", torch.tensor(foresight.weights), persistent=False)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        keys: Tensor | None,
        target: Tensor | None = None,
        multiplier: Tensor | float = 0.0,
        expected: float | None = None,
        detached: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens (B, N) in raster order, labels (B,), keys (B,) int64 (None: no dropout); target: what the teacher
        gives, (B, M, C) or of mtp (B, N) tokens, or None (no alignment).  multiplier: a number, or () float32 on the
        device; expected: the number that it is thought to be, for which the loss's kernel prepares its gradient;
        detached: whether the heads alone learn from the alignment.

        Returns the scalar total loss and detached metrics: `ntp`, and with a target `alignment` (weighted, before the
        multiplier) and, one value a head, `cosine` or `entropy`.
        """
        layer = self.foresight.layer
        tap = (layer,) if target is not None and layer is not None else ()
        if self.chunked_loss:
            ntp, hidden = self.gpt.loss(tokens, labels, keys, tap)
        else:
            logits, hidden = self.gpt(tokens[:, :-1], labels, keys, tap)
            ntp = next_token_loss(logits, tokens)
            del logits
        metrics = {"ntp": ntp.detach()}
        if target is None:
            return ntp, metrics
        assert layer is not None
        assert self.method is not None
        states = hidden[layer]
        if self.diagnostics is not None:
            states = self.diagnostics.watch(states, detached)
        elif detached:
            states = states.detach()
        expected = float(multiplier) if expected is None else expected
        seen: list[Tensor] | None = None if self.diagnostics is None else []
        alignment, per_head = self.align(states, target, expected, seen)
        metrics |= {"alignment": alignment.detach(), self.method.metric: per_head}
        if seen:
            metrics["centred_cosine"] = centred_cosines(seen, target, self.index)
        return ntp + multiplier * alignment, metrics

    def measure(self) -> TapGradients:
        """From now on every aligned forward pass also gives `centred_cosine`, where the method's loss is of cosines,
        and what is returned measures the gradients at the tap.  Losses and gradients stay the same to the last bit."""
        self.diagnostics = TapGradients()
        return self.diagnostics

    def align(
        self, states: Tensor, target: Tensor, expected: float, seen: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The method's loss of states (B, S, D) against the target: a weighted scalar, before the multiplier, and one
        detached value a head.  expected: what it will be multiplied by; seen: see `Heads`."""
        heads = Heads(
            self.projectors, self.gpt.head, self.index, self.head_weights, self.slot_counts, self.foresight,
            expected / self.grad_accum_steps, self.recompute_heads, seen,
        )  # fmt: skip
        assert self.method is not None
        return self.method.loss(heads, states, target)
