"""The plain baseline: the training step as LlamaGen's and the Mirai authors' scripts write it, in plain PyTorch.

  DDP over the whole model with its heads, fp32 weights, fused AdamW, the norm of all gradients clipped
  bf16 autocast of the student, or fp32; all logits in fp32, cross-entropy of all of them at once
  dropout from the process's generator
  the average is a full fp32 copy, updated parameter by parameter in a Python loop
  Mirai-E's teacher is one more full copy, refreshed by load_state_dict after each step; its first l blocks run in
  fp32 outside autocast, eager
  Mirai-I's encoder runs in fp32 outside autocast
  each head's cosine loss by normalising both sides and slicing, and an `.item()` for each head and for the loss, a step

It shares parameters' shapes, names and initial values with the real objective, so that with dropout off both must give
the same losses (tests/benchmarks/test_plain.py): a baseline that computes something else would prove nothing.
Sources: LlamaGen autoregressive/train/train_c2i.py and models/gpt.py; the authors' changes to them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirai_ds.config import RunConfig
from mirai_ds.foresight import MiraiObjective
from mirai_ds.foresight.neighbours import index_table, slot_counts
from mirai_ds.model import initialise
from mirai_ds.model.gpt import GPTTrunk, RMSNorm
from mirai_ds.model.rope2d import apply_rope


class PlainModel(nn.Module):
    """GPT and heads as one module whose forward gives logits and each head's projection, dropout by the generator."""

    def __init__(self, config: RunConfig, feature_dim: int | None) -> None:
        super().__init__()
        built = MiraiObjective(config.model, config.foresight, feature_dim)
        initialise(built, config.seed, config.model.init_std)
        self.gpt, self.projectors = built.gpt, built.projectors
        self.layer = config.foresight.layer or 0

    def forward(self, tokens: Tensor, labels: Tensor, align: bool) -> tuple[Tensor, list[Tensor]]:
        """tokens (B, N), labels (B,) int64 -> logits (B, N, V) float32, projections K x (B, N, C)."""
        x = embed(self.gpt, tokens[:, :-1], labels, self.training)
        projected: list[Tensor] = []
        for number, block in enumerate(self.gpt.layers):
            x = plain_block(block, x, self.gpt.rope[: x.shape[1]], self.training)
            if align and number + 1 == self.layer:
                projected = [head(x) for head in self.projectors]
        return self.gpt.output(rms_norm(self.gpt.norm, x)).float(), projected


def rms_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """RMSNorm as LlamaGen writes it."""
    wide = x.float()
    return (wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + norm.eps)).type_as(x) * norm.weight


def embed(gpt: GPTTrunk, tokens: Tensor, labels: Tensor, training: bool) -> Tensor:
    """Class and tokens (B, T) -> (B, 1 + T, D), labels and embeddings dropped in training."""
    rate = gpt.config.class_dropout
    if training and rate:
        labels = torch.where(torch.rand(len(labels), device=labels.device) < rate, gpt.config.num_classes, labels)
    x = torch.cat([gpt.cls_embedding.embedding_table(labels)[:, None], gpt.tok_embeddings(tokens)], dim=1)
    return F.dropout(x, gpt.config.token_dropout, training)


def plain_block(block: Any, x: Tensor, rope: Tensor, training: bool) -> Tensor:
    """One transformer block, (B, S, D) -> (B, S, D)."""
    attention, mlp = block.attention, block.feed_forward
    q, k, v = attention.wqkv(rms_norm(block.attention_norm, x)).split(x.shape[-1], dim=-1)
    q, k, v = (t.view(*x.shape[:2], attention.n_head, -1) for t in (q, k, v))
    q, k, v = (t.transpose(1, 2) for t in (apply_rope(q, rope), apply_rope(k, rope), v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
    h = x + F.dropout(attention.wo(out), block.resid_rate, training)
    y = rms_norm(block.ffn_norm, h)
    return h + F.dropout(mlp.w2(F.silu(mlp.w1(y)) * mlp.w3(y)), block.ffn_rate, training)


class PlainTrainer:
    """One rank.  A process group must exist; `encoder` is Mirai-I's teacher (an `EncoderTeacher`), in fp32.  compiled:
    the model by torch.compile, inside DDP as in the authors' scripts; the teacher stays eager."""

    def __init__(self, config: RunConfig, device: torch.device, encoder: Any = None, compiled: bool = False) -> None:
        foresight = config.foresight
        self.config, self.device, self.encoder = config, device, encoder
        model = PlainModel(config, encoder.feature_dim if encoder else None).to(device)
        self.optimizer = adamw(model, config)
        self.ema = copy.deepcopy(model.gpt).requires_grad_(False)
        self.teacher = copy.deepcopy(model.gpt).requires_grad_(False).eval() if foresight.teacher == "gpt" else None
        trained: Any = torch.compile(model) if compiled else model
        self.ddp = nn.parallel.DistributedDataParallel(trained, gradient_as_bucket_view=True)
        self.autocast = config.train.precision != "fp32"
        if foresight.active:
            self.table = index_table(foresight, config.model.grid)
            self.counts = slot_counts(foresight, self.table, config.model.block_size).tolist()
            self.places = [torch.nonzero(self.table[:, k] >= 0).squeeze(1) for k in range(foresight.heads)]

    def step(self, tokens: Tensor, labels: Tensor, images: Tensor | None, multiplier: float) -> dict[str, float]:
        """One update of one batch a rank; `loss`, `ntp` and each head's loss, read from the device."""
        align = self.config.foresight.active
        target = self.features(tokens, labels, images) if align else None
        ntp, projected = self.forward(tokens, labels, align)
        loss: Tensor = ntp
        read: dict[str, float] = {}
        if target is not None:
            alignment, read = self.alignment(projected, target)
            loss = ntp + multiplier * alignment
        self.backward(loss)
        self.update()
        self.average()
        self.refresh()
        return {**read, "ntp": ntp.item(), "loss": loss.item()}

    def forward(self, tokens: Tensor, labels: Tensor, align: bool) -> tuple[Tensor, list[Tensor]]:
        """Returns the next-token loss and each head's projection."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            logits, projected = self.ddp(tokens, labels, align)
            return F.cross_entropy(logits.view(-1, logits.shape[-1]), tokens.reshape(-1)), projected

    def backward(self, loss: Tensor) -> None:
        """Runs the backward pass, during which DDP reduces the gradients."""
        loss.backward()

    def update(self) -> None:
        """Clips the gradients, takes AdamW's step and drops the gradients."""
        if self.config.optimizer.grad_clip:
            nn.utils.clip_grad_norm_(self.ddp.parameters(), self.config.optimizer.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def features(self, tokens: Tensor, labels: Tensor, images: Tensor | None) -> Tensor:
        """The teacher's features in fp32."""
        if self.teacher is None:
            features: Tensor = self.encoder.features(tokens, labels, images)
            return features
        x = embed(self.teacher, tokens[:, :-1], labels, False)
        for block in self.teacher.layers[: self.config.foresight.layer]:
            x = plain_block(block, x, self.teacher.rope[: x.shape[1]], False)
        return x

    def alignment(self, projected: list[Tensor], target: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Sum or mean over heads of the weighted mean negative cosine."""
        foresight, weights = self.config.foresight, self.config.foresight.weights or []
        total = torch.zeros((), device=self.device)
        read: dict[str, float] = {}
        for k, states in enumerate(projected):
            z = F.normalize(states[:, self.places[k]].float(), dim=-1)
            t = F.normalize(target[:, self.table[self.places[k], k]].float(), dim=-1)
            loss = -(z * t).sum(-1).sum() / (self.counts[k] * len(states))
            read[f"head{k + 1}"] = loss.item()
            total = total + weights[k] * loss
        return total / (foresight.heads if foresight.heads_reduction == "mean" else 1), read

    @torch.no_grad()
    def average(self) -> None:
        """Updates the moving average, parameter by parameter."""
        decay, raw = self.config.ema.decay, dict(self.ddp.module.gpt.named_parameters())
        for name, value in self.ema.named_parameters():
            value.mul_(decay).add_(raw[name].data, alpha=1 - decay)

    def refresh(self) -> None:
        """Copies the moving average into the teacher."""
        if self.teacher is not None:
            self.teacher.load_state_dict(self.ema.state_dict())


def adamw(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW with LlamaGen's groups: only parameters of two and more dimensions decay."""
    o, parameters = config.optimizer, list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": o.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)
