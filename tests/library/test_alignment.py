"""Foresight alignment around networks that are not ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mirai_ds as m
from mirai_ds.config import ModelConfig
from mirai_ds.foresight import EmaTeacher, MiraiObjective, alignment_multiplier
from mirai_ds.model import initialise
from tests.library.alignment_cases import alignment, train
from tests.library.foreign import Transformer, digits, example, llamagen
from tests.rank_pool import RankPool

SIZES: dict[str, Any] = {
    "dim": 32, "n_layer": 3, "n_head": 2, "vocab_size": 17, "num_classes": 10, "ffn_multiple_of": 32,
    "token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0, "class_dropout": 0.0,
}  # fmt: skip
FORESIGHT: dict[str, Any] = {"method": "mirai-e", "warmup_epochs": 1, "projector_dim": 24, "num_heads": 4}


def trained_by_the_objective(convention: str, steps: int, decay: float) -> list[float]:
    """The trainer's objective, teacher and schedule, in plain PyTorch: total losses."""
    model = ModelConfig(size="custom", block_size=64, **SIZES)
    config = m.ForesightConfig(convention=convention, **FORESIGHT)  # type: ignore[arg-type]
    config.fill_from_model(model)
    objective = MiraiObjective(model, config)
    initialise(objective, 0)
    initialise(objective.projectors, 0)
    nn.init.normal_(objective.gpt.output.weight, std=0.05, generator=torch.Generator().manual_seed(1))
    teacher = EmaTeacher(model, config, torch.float32, torch.device("cpu"), autocast=False)
    average = {name: p.detach().clone() for name, p in objective.gpt.named_parameters()}
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    tokens, labels = digits(8 * steps)
    losses = []
    for step, (x, y) in enumerate(zip(tokens.split(8), labels.split(8), strict=True)):
        teacher.load({name: average[name] for name in teacher.names}.items())
        target = teacher.features(x, y, None) if step >= 1 else None
        loss, _ = objective(x, y, None, target, alignment_multiplier(config, step, steps))
        if target is None:  # warm-up: the heads' gradient is zero, not missing
            loss = loss + 0.0 * sum(p.sum() for p in objective.projectors.parameters())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for name, p in objective.gpt.named_parameters():
            average[name].lerp_(p.detach(), 1 - decay)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("convention", ["official", "paper"])
def test_llamagen_trains_as_the_trainer_does(convention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llamagen(monkeypatch)
    page = example("llamagen_mirai.py")
    config = m.ForesightConfig(convention=convention, **FORESIGHT)  # type: ignore[arg-type]
    mirai = page.build("GPT-B", "layers.1", width=32, grid=8, config=config, **SIZES)
    for network in (mirai.model, mirai.teacher):
        initialise(network, 0)
        nn.init.normal_(network.output.weight, std=0.05, generator=torch.Generator().manual_seed(1))
    mirai.decay = 0.9
    optimizer = torch.optim.AdamW(mirai.parameters(), lr=1e-2)
    tokens, labels = digits(32)
    batches = zip(tokens.split(8), labels.split(8), strict=True)
    losses = [float(page.train_step(mirai, optimizer, x, y, epoch)) for epoch, (x, y) in enumerate(batches)]
    assert losses == pytest.approx(trained_by_the_objective(convention, 4, 0.9), abs=1e-6)
    assert losses[3] < losses[0] - 1  # alignment, down to -2 or -8, has been learned


def by_hand(states: Tensor, target: Tensor, heads: nn.ModuleList, offsets: list[tuple[int, int]]) -> float:
    """The paper's loss (Eq. 8-11) as loops over cells, in float64: a cell's state predicts it, its neighbour's target
    is the slot that holds the neighbour; mean over heads, lambda 2."""
    total = 0.0
    for head, (down, right) in zip(heads, offsets, strict=True):
        projected, cosines = head(states).double(), []
        for row in range(8):
            for column in range(8):
                if row + down < 8 and column + right < 8:
                    held = 1 + (row + down) * 8 + column + right
                    cosines.append(F.cosine_similarity(projected[:, row * 8 + column], target[:, held].double(), -1))
        total -= 2.0 * float(torch.stack(cosines).mean().detach()) / len(heads)
    return total


def test_gpt2_has_the_loss_of_the_paper() -> None:
    mirai = alignment()
    assert mirai.teacher is not None
    with torch.no_grad():  # an average that is not the model
        for p in mirai.teacher.parameters():
            p.mul_(1.1)
    tokens, labels = digits(6)
    kept: dict[str, Tensor] = {}
    for name, network in (("model", mirai.model), ("teacher", mirai.teacher)):
        network.get_submodule("blocks.1").register_forward_hook(lambda _, __, out, name=name: kept.update({name: out}))
    mirai.model(tokens[:, :-1], labels)
    mirai.teacher(tokens, labels)
    wanted = by_hand(kept["model"], kept["teacher"], mirai.projectors, [(0, 0), (0, 1), (1, 0)])
    logits, loss, cosine = mirai(mirai.target(tokens, labels), tokens[:, :-1], labels)
    assert loss.item() == pytest.approx(wanted, abs=1e-6)
    assert loss.item() == pytest.approx(-2.0 * float(cosine.mean()), abs=1e-6)
    assert torch.equal(logits, mirai.model(tokens[:, :-1], labels))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in mirai.projectors.parameters())
    assert mirai.model.blocks[1].qkv.weight.grad.abs().sum() > 0  # type: ignore[index, union-attr]
    assert mirai.model.blocks[2].qkv.weight.grad is None  # type: ignore[index, union-attr]


class Prefixed(nn.Module):
    """Behind three slots instead of one; a block returns a tuple, as those of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 12)
        self.prefix = nn.Parameter(torch.randn(3, 12, generator=torch.Generator().manual_seed(2)))
        self.block = nn.GRU(12, 12, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.prefix.expand(len(tokens), -1, -1), self.table(tokens)], 1)
        return self.block(x)[0]  # type: ignore[no-any-return]


def test_a_prefix_of_several_slots_and_a_block_that_returns_a_tuple() -> None:
    tokens, _ = digits(2)
    model = Prefixed()
    config = m.ForesightConfig(method="mirai-e", convention="paper", projector_dim=8, num_heads=1)
    mirai = m.ForesightAlignment(model, "block", grid=8, width=12, config=config, prefix=3)
    states, target = model(tokens[:, :-1])[:, 2:], model(tokens)[:, 2:]
    wanted = by_hand(states, target, mirai.projectors, [(0, 0)])
    assert mirai(mirai.target(tokens), tokens[:, :-1]).loss.item() == pytest.approx(wanted, abs=1e-6)


def test_mirai_i_takes_the_features_of_any_encoder() -> None:
    tokens, labels = digits(4)
    features = torch.randn(4, 64, 20, generator=torch.Generator().manual_seed(3))
    model = alignment().model
    config = m.ForesightConfig(method="mirai-i", convention="paper", projector_dim=8)
    mirai = m.ForesightAlignment(model, "blocks.1", grid=8, width=32, config=config, feature_dim=20)
    assert mirai.teacher is None
    mirai.update()
    loss = mirai(features, tokens[:, :-1], labels).loss
    behind_a_class = torch.cat([torch.zeros(4, 1, 20), features], 1)
    kept = m.ForesightAlignment(model, "blocks.1", grid=8, width=32, config=config, feature_dim=20)._tap
    states = kept.states_of(lambda: model(tokens[:, :-1], labels))[1]
    assert loss.item() == pytest.approx(by_hand(states, behind_a_class, mirai.projectors, [(0, 0)]), abs=1e-6)
    with pytest.raises(RuntimeError, match="give its encoder's features"):
        mirai.target(tokens, labels)


def test_the_average_is_fp32_whatever_the_model_is() -> None:
    mirai = alignment().to(torch.bfloat16)
    assert mirai.teacher is not None
    assert {p.dtype for p in mirai.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in mirai.teacher.parameters()} == {torch.float32}
    before = mirai.teacher.blocks[0].qkv.weight.clone()  # type: ignore[index, union-attr]
    with torch.no_grad():
        mirai.model.blocks[0].qkv.weight.add_(1.0)  # type: ignore[index, union-attr, operator]
    now = mirai.model.blocks[0].qkv.weight.float()  # type: ignore[index, union-attr, operator]
    mirai.decay = 0.9999
    mirai.update()
    moved = mirai.teacher.blocks[0].qkv.weight - before  # type: ignore[index, union-attr]
    assert torch.allclose(moved, 1e-4 * (now - before), rtol=1e-2)
    named = {name: torch.zeros_like(p) for name, p in mirai.teacher.named_parameters()}
    del named["positions"]
    with pytest.raises(KeyError, match="positions"):
        mirai.update(named.items())


def test_the_teacher_stops_at_its_tap_and_is_no_parameter() -> None:
    mirai = alignment()
    assert mirai.teacher is not None
    calls: list[int] = []
    for i in range(3):
        mirai.teacher.get_submodule(f"blocks.{i}").register_forward_hook(lambda *_, i=i: calls.append(i))
    tokens, labels = digits(2)
    assert mirai.target(tokens, labels).shape == (2, 65, 32)
    assert calls == [0]  # the tap's own hook, registered before, ends the pass
    mine = {p.data_ptr() for p in mirai.teacher.parameters()}
    assert not mine & {p.data_ptr() for p in mirai.parameters()}
    assert not any(name.startswith("teacher") for name in mirai.state_dict())


def test_compiled_and_recomputed_it_is_the_same() -> None:
    tokens, labels = digits(4)
    losses, gradients = [], []
    for way in ("plain", "compiled", "recomputed"):
        mirai = alignment()
        if way == "compiled":
            mirai.model.compile(backend="aot_eager")
        if way == "recomputed":
            for block in mirai.model.blocks:  # type: ignore[union-attr]
                whole = block.forward
                block.forward = lambda x, whole=whole: checkpoint(whole, x, use_reentrant=False)
        loss = mirai(mirai.target(tokens, labels), tokens[:, :-1], labels).loss
        loss.backward()
        losses.append(float(loss))
        gradients.append(mirai.model.blocks[0].qkv.weight.grad)  # type: ignore[index, union-attr]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)
    assert all(torch.allclose(g, gradients[0], atol=1e-6) for g in gradients)  # type: ignore[arg-type]


class Recomputed(nn.Module):
    """A block whose activations are recomputed the old way."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=True)  # type: ignore[no-any-return]


def test_mistakes_say_what_to_do() -> None:
    mirai, (tokens, labels) = alignment(), digits(2)
    target = mirai.target(tokens, labels)
    with pytest.raises(ValueError, match="call target\\(\\) with all 64 tokens"):
        mirai.target(tokens[:, :-1], labels)
    with pytest.raises(ValueError, match="gave 60 slots behind the prefix, a 8x8 grid needs 64"):
        mirai(target, tokens[:, :59], labels)
    with pytest.raises(AttributeError, match="nowhere"):
        m.ForesightAlignment(mirai.model, "nowhere", grid=8, width=32)
    blocks = mirai.model.blocks
    blocks[1] = Recomputed(nn.Sequential(blocks[1], blocks[2]))  # type: ignore[index, operator]
    within = m.ForesightAlignment(mirai.model, "blocks.1.inner.0", grid=8, width=32)
    with pytest.raises(RuntimeError, match=r"carry no gradient.*use_reentrant=False"):
        within(target, tokens[:, :-1], labels)
    around = m.ForesightAlignment(mirai.model, "blocks.1", grid=8, width=32)
    assert around(target, tokens[:, :-1], labels).loss.requires_grad
    for given, field in (
        ({"method": "mtp"}, "foresight.method"), ({"method": "mirai-e", "layer": 2}, "tap='blocks.7'"),
        ({"method": "mirai-e", "schedule": {"kind": "cosine"}}, "total_epochs"), ({"method": "none"}, "use mirai-e"),
    ):  # fmt: skip
        with pytest.raises(m.UserError, match=field):
            m.ForesightAlignment(mirai.model, "blocks.1", grid=8, width=32, config=m.ForesightConfig(**given))  # type: ignore[arg-type]
    with pytest.raises(m.UserError, match="no target on a 1x1 grid"):
        m.ForesightAlignment(mirai.model, "blocks.1", grid=1, width=32)


@pytest.mark.parametrize("way", ["ddp", "fsdp", "2", "3"])
def test_on_two_ranks_it_is_as_alone(way: str, ranks: dict[int, RankPool]) -> None:
    losses, sums = train("alone")
    for rank_losses, rank_sums in ranks[2].run(train, way):
        assert rank_losses == pytest.approx(losses, abs=2e-6)
        assert rank_sums == pytest.approx(sums, rel=1e-5)
    assert losses[1] < losses[0]


@pytest.mark.parametrize("way", ["ddp", "2"])
def test_all_ranks_have_the_teacher_of_rank_0(way: str, ranks: dict[int, RankPool]) -> None:
    """The authors' code copies the average before DDP sends weights round, so that each rank's is another."""
    losses, sums = train("alone")
    for rank_losses, rank_sums in ranks[2].run(train, way, True):
        assert rank_losses == pytest.approx(losses, abs=2e-6)
        assert rank_sums == pytest.approx(sums, rel=1e-5)


def test_the_stand_in_has_the_trap_of_llamagen() -> None:
    model = Transformer(ModelConfig(size="custom", block_size=64, **SIZES)).eval()
    tokens, labels = digits(2)
    assert model(tokens, labels)[0].shape == (2, 65, 17)
    with pytest.raises(RuntimeError, match="64"):
        model(tokens[:, :-1], labels)
