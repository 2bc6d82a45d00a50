"""Vectors for the tests of `verify`: the stored ones, and new ones by the plain re-implementation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirai_ds.selfcheck.check import FileResult, verify_file
from tests.model import plain_gpt as plain
from tests.model import plain_par

FIXTURES = Path(__file__).parents[1] / "fixtures"
VECTORS = {
    "llamagen_gpt_tiny": 52,
    "mirai_e_official_k3": 10,
    "mirai_e_official_k8_uneven": 10,
    "mirai_i_official_k1": 7,
    "mirai_i_official_k2": 8,
    "par_tiny_n4": 2,
}
Arrays = dict[str, Any]


def arrays_of(name: str) -> Arrays:
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as data:
        return {key: data[key] for key in data.files}


def save(path: Path, arrays: Arrays) -> Path:
    np.savez(path, **arrays)
    return path


def check(tmp_path: Path, arrays: Arrays, tolerance: float = 1e-5) -> FileResult:
    return verify_file(save(tmp_path / "vector.npz", arrays), tolerance)


def failed(result: FileResult) -> set[str]:
    assert result.ok == all(record.ok for record in result.records)
    return {record.name for record in result.records if not record.ok}


def reference_gpt(config: Arrays, seed: int, keep: list[int] | None, batch: int = 1) -> Arrays:
    """A `llamagen_gpt` vector by the plain re-implementation, weights by rule."""
    ffn = -(-(8 * config["dim"] // 3) // 256) * 256
    state = plain.ruled(plain.shapes(config, ffn), seed)
    for value in state.values():
        value.requires_grad_()
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(0, config["vocab_size"], (batch, config["block_size"])))
    labels = torch.from_numpy(rng.integers(0, config["num_classes"], batch))
    logits, hidden = plain.forward(state, config, tokens[:, :-1], labels)
    without, _ = plain.forward(state, config, tokens[:, :-1], torch.full_like(labels, config["num_classes"]))
    loss = plain.cross_entropy(logits, tokens)
    loss.backward()
    grads = {key: value.grad for key, value in state.items() if value.grad is not None}
    at = slice(None) if keep is None else keep
    out = {
        "kind": "llamagen_gpt", "config": json.dumps(config), "seed": seed, "tokens": tokens, "labels": labels,
        "logits": logits[:, at], "logits_uncond": without[:, at], "hidden_last": hidden[-1][:, at], "loss": loss,
        "grad_norm": math.sqrt(sum(float(g.double().pow(2).sum()) for g in grads.values())),
        "grad/layers.0.attention.wqkv.weight": grads["layers.0.attention.wqkv.weight"],
    }  # fmt: skip
    out |= {} if keep is None else {"keep": np.array(keep)}
    return {key: np.asarray(value.detach() if isinstance(value, Tensor) else value) for key, value in out.items()}


def reference_par(grid: int, n: int, seed: int = 6) -> Arrays:
    """A `par_gpt` vector by the plain re-implementation: tokens in sequence order, logits by slot, every gradient."""
    config = {"dim": 32, "n_layer": 2, "n_head": 2, "vocab_size": 30, "block_size": grid * grid, "num_classes": 3}
    state = plain.ruled(plain_par.shapes(config, 256, n), seed)
    for value in state.values():
        value.requires_grad_()
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, 30, (2, grid * grid)))
    labels = torch.tensor([2, 0])
    logits, hidden = plain_par.forward(state, config, n, tokens[:, :-1], labels)
    without, _ = plain_par.forward(state, config, n, tokens[:, :-1], torch.full_like(labels, 3))
    loss = plain.cross_entropy(logits[:, : grid * grid], tokens)
    loss.backward()
    out: Arrays = {
        "kind": "par_gpt", "config": json.dumps({**config, "ar_token_num": n, "spe_token_num": n - 1}), "seed": seed,
        "tokens": tokens, "labels": labels, "logits": logits[:, : grid * grid], "loss": loss,
        "logits_uncond": without[:, : grid * grid], "hidden": torch.stack(hidden),
        **{f"grad/{key}": value.grad for key, value in state.items()},
    }  # fmt: skip
    return {key: np.asarray(value.detach() if isinstance(value, Tensor) else value) for key, value in out.items()}


MIRAI = {
    "dim": 16, "n_layer": 2, "n_head": 2, "vocab_size": 20, "num_classes": 4, "encoder_depth": 1, "projector_dim": 8,
    "num_heads": 4,
}  # fmt: skip


def reference_mirai(grid: int, stride: int, variant: str) -> Arrays:
    """A `mirai_objective` vector by plain slicing: head k's flat shift is (down * stride + right)."""
    cells, seed = grid * grid, 7
    config: Arrays = {**MIRAI, "block_size": cells, "z_dims": [16 if variant == "E" else 6]}
    width = config["z_dims"][0]
    wanted = plain.shapes(config, 256)
    for k in range(4):
        wanted |= plain.head_shapes(k, 16, 8, width)
    state = plain.ruled(wanted, seed)
    rng = np.random.default_rng(grid)
    tokens, labels = torch.from_numpy(rng.integers(0, 20, (2, cells))), torch.tensor([3, 0])
    logits, hidden = plain.forward(state, config, tokens[:, :-1], labels)
    if variant == "E":
        teacher = plain.ruled(plain.shapes(config, 256), seed=8)
        target = plain.forward(teacher, config, tokens[:, :-1], labels)[1][0]
    else:
        target = torch.from_numpy(rng.standard_normal((2, cells, width)).astype(np.float32))
    losses = []
    for k, shift in enumerate([0, 1, stride, stride + 1]):
        w = {i: (state[f"projectors.{k}.{i}.weight"], state[f"projectors.{k}.{i}.bias"]) for i in (0, 2, 4)}
        x = hidden[0]
        for i in (0, 2):
            x = x @ w[i][0].T + w[i][1]
            x = x * torch.sigmoid(x)
        x = x @ w[4][0].T + w[4][1]
        if variant == "E":
            student, goal = [0, *range(1, cells - shift)], [0, *range(1 + shift, cells)]
        else:
            length = min(cells - 1, cells - shift)
            student, goal = list(range(1, length + 1)), list(range(shift, length + shift))
        a, b = x[:, student], target[:, goal]
        losses.append(-((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())
    coefficients = torch.tensor([2.0, 1.0, 0.5, 3.0])
    ntp = plain.cross_entropy(logits, tokens)
    out: Arrays = {
        "kind": "mirai_objective", "variant": variant, "config": json.dumps(config), "seed": seed, "teacher_seed": 8,
        "tokens": tokens, "labels": labels, "coefficients": coefficients, "teacher_features": target,
        "head_losses": torch.stack(losses), "ntp_loss": ntp,
        "total_loss": ntp + (coefficients * torch.stack(losses)).sum(),
    }  # fmt: skip
    return {key: np.asarray(value) for key, value in out.items()}
