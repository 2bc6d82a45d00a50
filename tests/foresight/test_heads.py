"""Heads: exact sizes, the transformer head written out, and what its attention may see (Mirai, Table 9)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mirai_ds.config import ForesightConfig, ModelConfig
from mirai_ds.config.sizes import heads_parameters
from mirai_ds.foresight.heads import TransformerHead, heads
from mirai_ds.planning.flops import head_flops

torch.set_num_threads(1)


def config(**fields: object) -> ForesightConfig:
    return ForesightConfig(**{"method": "mirai-e", **fields})


@pytest.mark.parametrize(("kind", "count"), [("mlp", 7_344_896), ("transformer", 7_678_464)])
def test_the_papers_sizes(kind: str, count: int) -> None:
    """7.34 M and 7.68 M at width 768; the formula, and the module."""
    one = config(head=kind, num_heads=1)
    with torch.device("meta"):
        module = heads(one, 768, 768)
    assert sum(p.numel() for p in module.parameters()) == heads_parameters(one, 768, 768) == count
    with torch.device("meta"):
        uneven = heads(config(head=kind), 16, 24)
    assert sum(p.numel() for p in uneven.parameters()) == heads_parameters(config(head=kind), 16, 24)


def test_operations_are_those_of_the_matrices() -> None:
    """A multiply-add of every weight a slot; attention's scores and values; mtp's logits of each of its heads."""
    model, slots = ModelConfig(), 256
    matrices = {}
    for kind in ("mlp", "transformer"):
        with torch.device("meta"):
            module = heads(config(head=kind, num_heads=1), 768, 768)
        matrices[kind] = sum(2 * p.numel() * slots for p in module.parameters() if p.dim() == 2)
    attention, logits = 4 * slots**2 * 768, 2 * 16384 * 768 * slots
    assert head_flops(model, config(), 768, slots) == 3 * matrices["mlp"]
    assert head_flops(model, config(head="transformer"), 768, slots) == 3 * (matrices["transformer"] + attention)
    mtp = ForesightConfig(method="mtp")
    assert head_flops(model, mtp, 768, slots) == 2 * (matrices["transformer"] + attention + logits)


def random_head(causal: bool = True) -> TransformerHead:
    torch.manual_seed(0)
    head = TransformerHead(8, 6, causal)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.5)
    return head


def written_out(head: TransformerHead, x: Tensor) -> Tensor:
    """One image, one attention head and one slot at a time."""
    out = []
    for image in x:
        normed = F.layer_norm(image, (8,), head.norm1.weight, head.norm1.bias)
        q, k, v = (normed @ head.qkv.weight.T + head.qkv.bias).split(8, dim=-1)
        seen = torch.zeros_like(image)
        for a in range(4):
            part = slice(2 * a, 2 * a + 2)
            for slot in range(len(image)):
                last = slot + 1 if head.causal else len(image)
                scores = (k[:last, part] @ q[slot, part]) / 2**0.5
                seen[slot, part] = scores.softmax(0) @ v[:last, part]
        h = image + seen @ head.out.weight.T + head.out.bias
        normed = F.layer_norm(h, (8,), head.norm2.weight, head.norm2.bias)
        inner = F.gelu(normed @ head.mlp[0].weight.T + head.mlp[0].bias)  # type: ignore[arg-type]
        h = h + inner @ head.mlp[2].weight.T + head.mlp[2].bias  # type: ignore[arg-type]
        out.append(h @ head.linear.weight.T + head.linear.bias)
    return torch.stack(out)


@pytest.mark.parametrize("causal", [True, False])
def test_the_transformer_head_written_out(causal: bool) -> None:
    head, x = random_head(causal), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(head(x), written_out(head, x), rtol=1e-5, atol=1e-5)


def test_only_a_full_head_sees_later_slots() -> None:
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))
    later = x.clone()
    later[:, 3:] = -later[:, 3:] + torch.arange(8.0)  # a constant would vanish in the LayerNorm
    with torch.no_grad():
        causal, full = ((random_head(c)(x) != random_head(c)(later)).any(-1)[0].tolist() for c in (True, False))
    assert causal == [False, False, False, True, True]
    assert full == [True] * 5


def test_defaults() -> None:
    assert (config().head, config().head_attention) == ("mlp", None)
    assert (config(head="transformer").head, config(head="transformer").head_attention) == ("transformer", "causal")
    assert ForesightConfig().head is None
    assert ForesightConfig(method="mtp").head == "transformer"
    assert [type(h).__name__ for h in heads(config(head="transformer", head_attention="full"), 8, 6)] == [
        "TransformerHead"
    ] * 3
    assert not any(h.causal for h in heads(config(head="transformer", head_attention="full"), 8, 6))
