"""Compiled blocks do what they are there for: one graph for all of them, a budget that is kept to, halves that are not
kept.  That losses stay is tested in test_speed_switches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mirai_ds.config import ModelConfig, RecomputeConfig, TrainConfig
from mirai_ds.engine.compiled import can_compile, compile_blocks, wanted
from mirai_ds.engine.recompute import recompute_halves
from mirai_ds.model import GPT, initialise
from mirai_ds.runtime.log import LOG

SIZES = {"size": "custom", "dim": 64, "n_layer": 10, "n_head": 2, "vocab_size": 20, "num_classes": 5, "block_size": 16}
TOKENS, LABELS, KEYS = torch.arange(64).view(4, 16) % 20, torch.arange(4), torch.arange(4) * 977


@pytest.fixture
def gpt() -> GPT:
    torch._dynamo.reset()
    network = GPT(ModelConfig(**SIZES))
    initialise(network, 0, 0.1)
    return network


def test_where_nothing_can_compile_auto_does_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A GPU without a C compiler: Triton could not build one launcher."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(LOG, "handlers", [])
    monkeypatch.setattr(LOG, "propagate", True)
    assert [wanted(TrainConfig(), device) for device in (cuda, cpu)] == [can_compile(), False]
    monkeypatch.setattr("shutil.which", lambda name: None)
    caplog.clear()
    assert not wanted(TrainConfig(), cuda)
    assert "no Triton or no C compiler here" in caplog.text
    assert wanted(TrainConfig(compile="blocks"), cuda)  # explicit never falls back
    assert wanted(TrainConfig(compile="blocks"), cpu)
    assert not wanted(TrainConfig(compile="none"), cuda)


def kept_bytes(network: GPT) -> int:
    """What the blocks keep for the backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, _ = network.blocks(network.embed(TOKENS[:, :-1], LABELS, KEYS), KEYS)
    found = sum(seen.values())
    out.sum().backward()
    return found


@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_one_graph_serves_all_blocks(rate: float) -> None:
    """Ten blocks: more than torch recompiles before it gives up on a function (8).  A rate of stochastic depth that
    grows with depth must not compile each block anew."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    gpt = GPT(ModelConfig(**SIZES, drop_path=rate))
    initialise(gpt, 0, 0.1)
    counter = CompileCounter()
    for block in gpt.layers:
        block.forward = torch.compile(block.forward, backend=counter, dynamic=False)  # type: ignore[method-assign]
    out = gpt(TOKENS[:, :-1], LABELS, KEYS)
    assert counter.frame_count == 1
    out.logits.sum().backward()


def test_a_smaller_budget_keeps_less(gpt: GPT) -> None:
    kept = {}
    plain = [block.forward for block in gpt.layers]
    for budget in (1.0, 0.2):
        torch._dynamo.reset()
        for block, forward in zip(gpt.layers, plain, strict=True):
            block.forward = forward  # type: ignore[method-assign]
        compile_blocks(gpt.layers, RecomputeConfig(policy="budget", budget=budget))
        kept[budget] = kept_bytes(gpt)
    assert kept[0.2] < 0.6 * kept[1.0]


def test_recomputed_halves_are_not_kept(gpt: GPT) -> None:
    """Beside the half's input nothing of it stays: at least w1 x, its SiLU, w3 x and their product less, in fp32."""
    kept = kept_bytes(gpt)
    recompute_halves(gpt.layers, RecomputeConfig(policy="mlp"))
    hidden = 4 * 4 * 16 * gpt.config.ffn_hidden
    assert kept - kept_bytes(gpt) >= 10 * 4 * hidden


def test_gradients_of_a_compiled_network(gpt: GPT) -> None:
    def gradients(network: nn.Module) -> list[Tensor]:
        network.zero_grad()
        gpt.loss(TOKENS, LABELS, KEYS)[0].backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    torch.nn.init.normal_(gpt.output.weight, 0, 0.05)
    wanted = gradients(gpt)
    compile_blocks(gpt.layers)
    for found, exact in zip(gradients(gpt), wanted, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)
