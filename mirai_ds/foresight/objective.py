"""The one join of model and foresight: what DeepSpeed trains, returning the total loss of a micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mirai_ds.config import ForesightConfig, ModelConfig
from mirai_ds.foresight.heads import projectors
from mirai_ds.foresight.neighbours import index_table, slot_counts
from mirai_ds.kernels.foresight_cosine import foresight_cosine
from mirai_ds.model import GPT, next_token_loss


class MiraiObjective(nn.Module):
    """GPT and heads in one module, so that ZeRO sees every use of every parameter.

    total = ntp + multiplier * reduction_k weights_k * -cos(head_k(h), target)   (Mirai, Eq. 11)
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
        self.foresight = foresight
        self.grad_accum_steps = grad_accum_steps
        self.gpt = GPT(model)
        self.projectors = projectors(foresight.heads, model.width, foresight.projector_dim, feature_dim or model.width)
        if foresight.active:
            table = index_table(foresight, model.grid, model.par_tokens)
            self.register_buffer("index", table.int(), persistent=False)
            self.register_buffer("slot_counts", slot_counts(foresight, table, model.block_size), persistent=False)
            self.register_buffer("head_weights", torch.tensor(foresight.weights), persistent=False)

    def forward(
        self, tokens: Tensor, labels: Tensor, keys: Tensor | None, target: Tensor | None = None, multiplier: float = 0.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """tokens (B, N) in raster order, labels (B,), keys (B,) int64 (None: no dropout); target (B, M, C) or None (no
        alignment).

        Returns the scalar total loss and detached metrics: `ntp`, and with a target `alignment` (weighted, before the
        multiplier) and `cosine` (K,).
        """
        layer = self.foresight.layer
        tap = (layer,) if target is not None and layer is not None else ()
        out = self.gpt(tokens[:, :-1], labels, keys, tap)
        ntp = next_token_loss(out.logits, tokens)
        metrics = {"ntp": ntp.detach()}
        if target is None:
            return ntp, metrics
        assert layer is not None
        states = out.hidden[layer]
        alignment, cosine = foresight_cosine(
            [head(states) for head in self.projectors],
            target,
            self.index,
            self.head_weights,
            self.slot_counts,
            self.foresight.heads_reduction or "sum",
            kernel=self.foresight.kernel,
            upstream=multiplier / self.grad_accum_steps,
        )
        metrics |= {"alignment": alignment.detach(), "cosine": cosine}
        return ntp + multiplier * alignment, metrics
