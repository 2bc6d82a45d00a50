"""PAR's order, slots, mask and numbers: against the facts, an independent rewrite, and by changing one token at a time.

The reference's own numbers are `tests/fixtures/par_tiny_n4.npz`, checked in `tests/selfcheck`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mirai_ds.config import ModelConfig
from mirai_ds.config.sizes import parameter_count
from mirai_ds.model import GPT, initialise, next_token_loss
from mirai_ds.model.gpt import GPTTrunk
from mirai_ds.model.orders import token_order
from mirai_ds.model.rope2d import rope_table
from tests.model import plain_gpt as plain
from tests.model import plain_par

torch.set_num_threads(1)  # on small tensors two threads mostly wait for each other

GRIDS = [(16, 4), (24, 4), (24, 16), (8, 4), (8, 16), (6, 9), (4, 4)]


def settings(grid: int) -> dict[str, Any]:
    return {**plain.TINY, "block_size": grid * grid}


@cache
def par(grid: int = 8, n: int = 4, **changes: Any) -> tuple[GPT, dict[str, Tensor]]:
    gpt = GPT(ModelConfig(size="custom", par_tokens=n, **{**settings(grid), **changes})).eval()
    state = plain.ruled({k: tuple(v.shape) for k, v in gpt.state_dict().items()}, seed=4)
    gpt.load_state_dict(state)
    return gpt, state


def batch(grid: int, size: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(grid)
    return torch.randint(48, (size, grid * grid), generator=generator), torch.arange(size)


def test_first_cells_of_16_by_4() -> None:
    order = token_order(16, 4).positions()
    assert [divmod(cell, 16) for cell in order.cell[:6]] == [(0, 0), (0, 8), (8, 0), (8, 8), (0, 1), (0, 9)]
    assert order.number[:3] == [0, 4, 8]
    assert order.number[16] == 32  # a row down
    assert (order.number[7], order.number[8]) == (28, 1)  # across the seam
    assert order.input_slot[:6] == [1, 2, 3, 4, 8, 9]
    assert order.seen_before[:9] == [0, 1, 2, 3, 4, 4, 4, 4, 8]
    assert order.seen_with[:9] == [1, 2, 3, 4, 8, 8, 8, 8, 12]
    assert order.slots == 259


@pytest.mark.parametrize(("grid", "n"), GRIDS)
def test_order_of_any_grid(grid: int, n: int) -> None:
    order, side = token_order(grid, n).positions(), round(n**0.5)
    width = grid // side
    assert order.cell == plain_par.raster(grid, n)
    for row in range(grid):
        for column in range(grid):
            q = (((row % width) * width + column % width) * side + row // width) * side + column // width
            assert order.number[row * grid + column] == q
    assert order.number[-1] == grid * grid - 1  # what a model is not given is the last cell in both orders
    sees = plain_par.sees(order.slots + 1, n)  # the last cell's slot too
    for q in range(grid * grid):
        visible = [sum(sees[slot][other] for other in order.input_slot) for slot in (q, order.input_slot[q])]
        assert (order.seen_before[q], order.seen_with[q]) == tuple(visible)


@pytest.mark.parametrize(("grid", "n"), GRIDS)
def test_there_and_back(grid: int, n: int) -> None:
    raster = torch.arange(2 * grid * grid * 3).view(2, grid * grid, 3)
    order = token_order(grid, n)
    sequence = order.to_sequence(raster)
    assert torch.equal(sequence, raster[:, plain_par.raster(grid, n)])
    assert torch.equal(order.to_raster(sequence), raster)
    assert not torch.equal(sequence, raster)


def test_raster_order_is_the_order_of_a_plain_model() -> None:
    order = token_order(4, None).positions()
    assert order.number == order.cell == order.seen_before == list(range(16))
    assert order.input_slot == order.seen_with == list(range(1, 17))
    assert order.slots == 16


@pytest.mark.parametrize(("grid", "n"), [(8, 4), (4, 4), (6, 9), (8, 16)])
def test_each_logit_sees_exactly_the_tokens_made_before_its_step(grid: int, n: int) -> None:
    """n = 4: logits 4..7 see x_0..x_3, logits 8..11 see x_0..x_7.  Each row of the batch has one token changed."""
    gpt, _ = par(grid, n)
    cells = grid * grid
    tokens, _ = batch(grid, 1)
    rows = tokens.expand(cells + 1, -1).clone()
    for q, cell in enumerate(plain_par.raster(grid, n)):
        rows[1 + q, cell] = (rows[1 + q, cell] + 7) % 48
    labels = torch.zeros(cells + 1, dtype=torch.int64)
    logits = gpt.order.to_sequence(gpt(rows, labels).logits.detach())  # x_{N-1} is given too, and seen by no logit
    moved = (logits[1:] - logits[:1]).abs().amax(-1) > 0  # (changed token, logit)
    wanted = torch.tensor([[q < plain_par.made_before(p, n) for p in range(cells)] for q in range(cells)])
    assert torch.equal(moved, wanted)
    if n == 4:
        assert wanted[:, 4:8].sum(0).tolist() == [4] * 4
        assert wanted[:, 8:12].sum(0).tolist() == [8] * 4


@pytest.mark.parametrize(("grid", "n"), [(8, 4), (6, 9), (8, 16)])
def test_numbers_equal_a_plain_rewrite(grid: int, n: int) -> None:
    gpt, state = par(grid, n)
    tokens, labels = batch(grid)
    wide = {key: value.double() for key, value in state.items()}
    sequence = tokens[:, plain_par.raster(grid, n)]
    for given in (grid * grid - 1, grid * grid):
        logits, hidden = plain_par.forward(wide, settings(grid), n, sequence[:, :given], labels)
        out = gpt(tokens[:, :given], labels, tap=(1, 2, 3))
        assert out.hidden[1].shape[1] == given + n
        assert plain.error(gpt.order.to_sequence(out.logits), logits[:, : grid * grid]) <= 1e-5
        assert all(plain.error(out.hidden[i + 1], hidden[i]) <= 1e-5 for i in range(3))
    trunk = GPTTrunk(gpt.config, 2)
    trunk.load_state_dict({name: gpt.state_dict()[name] for name in trunk.state_dict()})
    assert plain.error(trunk.features(tokens, labels), hidden[1]) <= 1e-5


def test_every_gradient_equals_a_plain_rewrites() -> None:
    gpt, state = par(8, 4)
    tokens, labels = batch(8)
    leaves = {key: value.double().requires_grad_() for key, value in state.items()}
    sequence = tokens[:, plain_par.raster(8, 4)]
    logits, _ = plain_par.forward(leaves, settings(8), 4, sequence[:, :-1], labels)
    plain.cross_entropy(logits[:, :64], sequence).backward()
    gpt.zero_grad()
    next_token_loss(gpt(tokens[:, :-1], labels).logits, tokens).backward()
    assert float(leaves[plain_par.LEARNABLE].grad.abs().min()) > 0  # type: ignore[union-attr]
    for name, parameter in gpt.named_parameters():
        assert plain.error(parameter.grad, leaves[name].grad) <= 1e-5, name  # type: ignore[arg-type]


def test_counts_keys_and_initial_weights() -> None:
    with torch.device("meta"):
        gpt = GPT(ModelConfig(par_tokens=4))
    found = {key: tuple(value.shape) for key, value in gpt.state_dict().items()}
    size = {"dim": 768, "n_layer": 12, "vocab_size": 16384, "num_classes": 1000}
    assert list(found.items()) == list(plain_par.shapes(size, 2048, 4).items())
    assert len(found) == 89
    assert sum(p.numel() for p in gpt.parameters()) == parameter_count(gpt.config) == 110_890_752
    assert parameter_count(ModelConfig(size="GPT-XL", block_size=576, par_tokens=16)) == 774_699_520 + 15 * 1280
    small = GPT(ModelConfig(size="custom", par_tokens=4, **settings(8)))
    initialise(small, seed=0)
    other = GPT(ModelConfig(size="custom", **settings(8)))
    initialise(other, seed=0)
    table = small.state_dict()[plain_par.LEARNABLE]
    assert float(table.std()) == pytest.approx(0.02, rel=0.25)  # 192 numbers: 5 standard errors
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in other.state_dict().items())


def test_rotations_by_slot() -> None:
    gpt, _ = par(8, 4)
    table, cells = rope_table(8, 16), plain_par.raster(8, 4)
    assert gpt.rope.shape == (68, 8, 2)
    for slot in (0, 5, 6, 7):  # the class and the learnable tokens
        assert not gpt.rope[slot].any()
    for slot, q in [(1, 0), (4, 3), (8, 4), (67, 63)]:
        assert torch.equal(gpt.rope[slot], table[1 + cells[q]])


def test_plain_models_keep_the_causal_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask tensor where none is needed: fused causal kernels take none."""
    seen: list[tuple[bool, bool]] = []
    right = F.scaled_dot_product_attention

    def spy(*arguments: Any, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        seen.append((attn_mask is not None, is_causal))
        return right(*arguments, attn_mask=attn_mask, is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    tokens, labels = batch(8)
    GPT(ModelConfig(size="custom", **settings(8)))(tokens[:, :-1], labels)
    assert seen == [(False, True)] * 3
    par(8, 4)[0](tokens[:, :-1], labels)
    assert seen[3:] == [(True, False)] * 3


def test_dropout_follows_the_sample_and_reaches_the_learnable_tokens() -> None:
    gpt, _ = par(8, 4, token_dropout=0.5, resid_dropout=0.2, ffn_dropout=0.2, class_dropout=0.5)
    tokens, labels = batch(8, 6)
    keys = torch.tensor([11, 5, 7, 3, 2, 1])
    whole = gpt(tokens, labels % 5, keys).logits.detach()
    parts = [gpt(tokens[i : i + 2], labels[i : i + 2] % 5, keys[i : i + 2]).logits.detach() for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    assert plain.error(gpt(tokens, labels % 5).logits, whole) > 0.05
    middle = gpt.embed(tokens, labels % 5, keys)[:, 5:8].detach()
    assert 0.35 < float((middle == 0).float().mean()) < 0.65  # 1152 draws at one half: 10 standard errors
    assert not torch.equal(middle[0] == 0, middle[1] == 0)


def test_other_numbers_of_tokens_are_refused() -> None:
    gpt, _ = par(8, 4)
    tokens, labels = batch(8)
    for length in (0, 62, 65):
        given = tokens[:, :length] if length < 65 else torch.cat([tokens, tokens[:, :1]], 1)
        with pytest.raises(ValueError, match=f"64 tokens or all but the last, not {length}"):
            gpt(given, labels)


def test_bf16_autocast_keeps_an_fp32_residual_stream() -> None:
    gpt, _ = par(8, 4)
    tokens, labels = batch(8)
    exact = gpt(tokens[:, :-1], labels, tap=(3,)).hidden[3].detach()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gpt(tokens[:, :-1], labels, tap=(3,)).hidden[3].detach()
    assert mixed.dtype == torch.float32
    assert 1e-5 < plain.error(mixed, exact) < 0.1
