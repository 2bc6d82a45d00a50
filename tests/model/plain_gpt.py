"""LlamaGen's GPT once more, from the facts alone and in other words: what the package's own network is compared with.

Shares no code with `mirai_ds`: weights are a dict, attention is written out, positions are complex numbers.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

TINY = {"dim": 64, "n_layer": 3, "n_head": 4, "vocab_size": 48, "block_size": 16, "num_classes": 5}


def shapes(config: dict[str, Any], ffn: int) -> dict[str, tuple[int, ...]]:
    """State-dict keys in order, with shapes; `ffn` is the feed-forward width."""
    d, v = config["dim"], config["vocab_size"]
    out: dict[str, tuple[int, ...]] = {
        "cls_embedding.embedding_table.weight": (config["num_classes"] + 1, d),
        "tok_embeddings.weight": (v, d),
    }
    for i in range(config["n_layer"]):
        out |= {
            f"layers.{i}.attention.wqkv.weight": (3 * d, d),
            f"layers.{i}.attention.wo.weight": (d, d),
            f"layers.{i}.feed_forward.w1.weight": (ffn, d),
            f"layers.{i}.feed_forward.w3.weight": (ffn, d),
            f"layers.{i}.feed_forward.w2.weight": (d, ffn),
            f"layers.{i}.attention_norm.weight": (d,),
            f"layers.{i}.ffn_norm.weight": (d,),
        }
    return out | {"norm.weight": (d,), "output.weight": (v, d)}


def head_shapes(k: int, dim: int, hidden: int, target: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of head k."""
    sizes = {0: (hidden, dim), 2: (hidden, hidden), 4: (target, hidden)}
    out: dict[str, tuple[int, ...]] = {}
    for i, (rows, columns) in sizes.items():
        out[f"projectors.{k}.{i}.weight"], out[f"projectors.{k}.{i}.bias"] = (rows, columns), (rows,)
    return out


def ruled(wanted: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Weights by the rule of the reference vectors."""
    out = {}
    for key, shape in wanted.items():
        z = np.random.default_rng(zlib.crc32(f"{seed}:{key}".encode())).standard_normal(shape).astype(np.float32)
        if len(shape) > 1:
            z = z / float(np.sqrt(np.prod(shape[1:])))
        else:
            z = 1 + 0.1 * z if key.endswith("weight") else 0.1 * z
        out[key] = torch.from_numpy(z.astype(np.float32))
    return out


def turns(grid: int, head_dim: int) -> Tensor:
    """(1 + grid^2, head_dim/2) complex64: rows turn the first half of the pairs, columns the second, class is zero."""
    quarter = head_dim // 4
    inverse = torch.tensor([1.0 / 10000.0 ** (2 * j / (head_dim // 2)) for j in range(quarter)], dtype=torch.float32)
    cells = [torch.cat([r * inverse, c * inverse]) for r in range(grid) for c in range(grid)]
    angles = torch.stack(cells)
    table = torch.complex(angles.cos(), angles.sin())
    return torch.cat([torch.zeros(1, head_dim // 2, dtype=table.dtype), table])


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """x over its root mean square, times weight."""
    return weight * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5))


def attention(x: Tensor, wqkv: Tensor, wo: Tensor, heads: int, table: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of x (B, S, D), one head at a time; `mask` (S, S) is added to the scores, default causal."""
    batch, slots, dim = x.shape
    width = dim // heads
    if mask is None:
        mask = torch.full((slots, slots), -math.inf, dtype=x.dtype).triu(1)
    q, k, v = (x @ wqkv[i * dim : (i + 1) * dim].T for i in range(3))
    parts = []
    for h in range(heads):
        own = slice(h * width, (h + 1) * width)
        turned = [
            torch.view_as_real(torch.view_as_complex(t[..., own].reshape(batch, slots, -1, 2)) * table).flatten(-2)
            for t in (q, k)
        ]
        scores = turned[0] @ turned[1].transpose(1, 2) / math.sqrt(width) + mask
        parts.append(torch.softmax(scores, dim=-1) @ v[..., own])
    return torch.cat(parts, dim=-1) @ wo.T


def forward(
    state: dict[str, Tensor], config: dict[str, Any], tokens: Tensor, labels: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """logits (B, 1 + T, V) and the residual stream after every block, in the dtype of `state`."""
    grid = math.isqrt(config["block_size"])
    first = state["cls_embedding.embedding_table.weight"][labels][:, None]
    x = torch.cat([first, state["tok_embeddings.weight"][tokens]], 1)
    return blocks(state, config, x, turns(grid, config["dim"] // config["n_head"])[: x.shape[1]])


def blocks(
    state: dict[str, Tensor], config: dict[str, Any], x: Tensor, table: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """`forward` from the embedded slots x (B, S, D) on, `table` (S, head_dim/2) being their rotations."""
    table = table.to(torch.complex128 if x.dtype == torch.float64 else torch.complex64)
    hidden = []
    for i in range(config["n_layer"]):
        w = {key.removeprefix(f"layers.{i}."): value for key, value in state.items() if key.startswith(f"layers.{i}.")}
        y = norm(x, w["attention_norm.weight"])
        x = x + attention(y, w["attention.wqkv.weight"], w["attention.wo.weight"], config["n_head"], table, mask)
        y = norm(x, w["ffn_norm.weight"])
        gate = y @ w["feed_forward.w1.weight"].T
        x = x + (gate * torch.sigmoid(gate) * (y @ w["feed_forward.w3.weight"].T)) @ w["feed_forward.w2.weight"].T
        hidden.append(x)
    return norm(x, state["norm.weight"]) @ state["output.weight"].T, hidden


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean over images and positions of -log p(token)."""
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    return (torch.logsumexp(logits, -1) - chosen).mean()


def error(ours: Tensor, theirs: Any) -> float:
    """max |a - b| / max |b| in fp64; shapes must be equal."""
    a, b = ours.detach().double().numpy(), np.asarray(theirs, dtype=np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max() / np.abs(b).max())
