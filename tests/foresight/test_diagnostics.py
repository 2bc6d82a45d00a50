"""Measured gradients are autograd's, measuring changes no bit, and centred cosines are those of their definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mirai_ds.config import ForesightConfig, ModelConfig
from mirai_ds.foresight import MiraiObjective
from mirai_ds.foresight.diagnostics import centred_cosines
from mirai_ds.model import initialise, next_token_loss

MODEL = {
    "size": "custom", "dim": 32, "n_layer": 3, "n_head": 2, "vocab_size": 20, "num_classes": 5, "block_size": 16,
    "ffn_multiple_of": 32,
}  # fmt: skip


def objective(method: str = "mirai-e") -> MiraiObjective:
    model = ModelConfig(**MODEL)  # type: ignore[arg-type]
    config = ForesightConfig(method=method, projector_dim=16, num_heads=3, warmup_epochs=0)
    config.fill_from_model(model)
    made = MiraiObjective(model, config, None if method != "mirai-i" else 24)
    initialise(made, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        made.gpt.output.weight.normal_(0, 0.05, generator=generator)
        for p in made.projectors.parameters():
            p.normal_(0, 0.3, generator=generator)
    return made


def batch(method: str = "mirai-e") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens, labels, keys, target."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(20, (4, 16), generator=generator)
    target = torch.randn(4, 16, 32 if method == "mirai-e" else 24, generator=generator)
    return tokens, torch.tensor([0, 1, 2, 3]), torch.arange(4), tokens if method == "mtp" else target


@pytest.mark.parametrize("method", ["mirai-e", "mirai-i", "mtp"])
def test_measuring_changes_no_bit(method: str) -> None:
    plain, measured = objective(method), objective(method)
    measured.measure()
    results = []
    for made in (plain, measured):
        loss, metrics = made(*batch(method), 0.7)
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in made.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert gradient is not None
        assert torch.equal(gradient, results[1][1][name]), name
    assert ("centred_cosine" in metrics) == (method != "mtp")


def test_gradients_at_the_tap_are_autograd_s() -> None:
    made = objective()
    tokens, labels, keys, target = batch()
    layer = made.foresight.layer
    assert layer is not None
    logits, hidden = made.gpt(tokens[:, :-1], labels, keys, (layer,))
    states = hidden[layer]
    (ntp,) = torch.autograd.grad(next_token_loss(logits, tokens), states, retain_graph=True)
    (aligned,) = torch.autograd.grad(0.7 * made.align(states, target, 0.7)[0], states)
    wanted = torch.stack([ntp.square().sum(), aligned.square().sum(), (ntp * aligned).sum()])
    gradients = made.measure()
    for _ in range(2):  # two micro-batches add up
        made(tokens, labels, keys, target, 0.7)[0].backward()
    assert gradients.sums is not None
    assert torch.allclose(gradients.sums, 2 * wanted, rtol=1e-4)
    gradients.clear()
    assert gradients.sums.tolist() == [0.0, 0.0, 0.0]


def test_heads_alone_leave_the_network_in_peace() -> None:
    """Detached states: the network's gradient is that of the next-token loss, the heads' that of the alignment."""
    tokens, labels, keys, target = batch()
    alone, asleep, aligned = objective(), objective(), objective()
    gradients = alone.measure()
    alone(tokens, labels, keys, target, 0.7, None, True)[0].backward()
    asleep(tokens, labels, keys)[0].backward()
    aligned(tokens, labels, keys, target, 0.7)[0].backward()
    for name, p in alone.named_parameters():
        other = dict((aligned if name.startswith("projectors") else asleep).named_parameters())[name].grad
        assert p.grad is not None
        assert other is not None
        assert torch.equal(p.grad, other), name
    assert gradients.sums is not None
    assert gradients.sums[0] > 0
    assert gradients.sums[1:].tolist() == [0.0, 0.0]


def by_hand(projected: Tensor, target: Tensor, index: list[int]) -> float:
    """Unit vectors of all pairs, the mean of each side taken away, mean cosine, in float64."""
    pairs = [(b, s, row) for b in range(len(projected)) for s, row in enumerate(index) if row >= 0]
    ours = torch.stack([F.normalize(projected[b, s].double(), dim=0) for b, s, _ in pairs])
    theirs = torch.stack([F.normalize(target[b, row].double(), dim=0) for b, _, row in pairs])
    return float(F.cosine_similarity(ours - ours.mean(0), theirs - theirs.mean(0), dim=-1).mean())


def test_centred_cosines() -> None:
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(24, generator=generator) * 4
    target = torch.randn(3, 7, 24, generator=generator) + shared
    index = torch.tensor([[0, 1], [1, 2], [2, -1], [3, 4], [-1, 6]], dtype=torch.int32)
    noise = torch.randn(3, 5, 24, generator=generator) + shared
    learned = 3.0 * (target[:, index[:, 0].clamp(min=0)] + 0.2 * torch.randn(3, 5, 24, generator=generator))
    found = centred_cosines([learned, noise], target, index)
    wanted = [by_hand(learned, target, index[:, 0].tolist()), by_hand(noise, target, index[:, 1].tolist())]
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)
    raw = F.cosine_similarity(noise[:, [0, 1, 3, 4]], target[:, [1, 2, 4, 6]], dim=-1).mean()
    assert raw > 0.85  # a head that knows the shared direction alone seems to be right
    assert abs(found[1]) < 0.3
    assert found[0] > 0.9
