"""The GPT against LlamaGen: numbers, keys, counts, initial weights, dtypes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mirai_ds.config import ModelConfig
from mirai_ds.config.sizes import parameter_count, projector_parameters
from mirai_ds.foresight.heads import projectors
from mirai_ds.model import GPT, initial_value, initialise, next_token_loss
from mirai_ds.model.gpt import GPTTrunk, RMSNorm
from mirai_ds.model.rope2d import apply_rope, rope_table
from tests.model import plain_gpt as plain

torch.set_num_threads(1)  # on small tensors two threads mostly wait for each other

GOLDEN = Path(__file__).parents[1] / "fixtures" / "llamagen_gpt_tiny.npz"
# LlamaGen's instantiated models: parameters, feed-forward width, (tensors, elements) with and without weight decay.
SIZES: dict[str, tuple[int, int, tuple[int, int], tuple[int, int]]] = {
    "GPT-B": (110_888_448, 2048, (63, 110_869_248), (25, 19_200)),
    "GPT-L": (342_910_976, 2816, (123, 342_860_800), (49, 50_176)),
    "GPT-XL": (774_699_520, 3584, (183, 774_606_080), (73, 93_440)),
    "GPT-XXL": (1_410_972_672, 4096, (243, 1_410_823_680), (97, 148_992)),
    "GPT-3B": (3_096_659_200, 8704, (123, 3_096_502_400), (49, 156_800)),
}


def tiny(**changes: Any) -> ModelConfig:
    return ModelConfig(size="custom", **{**plain.TINY, **changes})


def ruled_gpt(seed: int = 3, **changes: Any) -> GPT:
    gpt = GPT(tiny(**changes)).eval()
    gpt.load_state_dict(plain.ruled({k: tuple(v.shape) for k, v in gpt.state_dict().items()}, seed))
    return gpt


def batch(config: ModelConfig, size: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (size, config.block_size), generator=generator)
    return tokens, torch.randint(config.num_classes, (size,), generator=generator)


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Any], GPT]:
    with np.load(GOLDEN, allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files}
    gpt = GPT(ModelConfig.from_reference(json.loads(str(arrays["config"])))).eval()
    gpt.load_state_dict({k[6:]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith("state/")})
    return arrays, gpt


def test_numbers_equal_llamagens(golden: tuple[dict[str, Any], GPT]) -> None:
    arrays, gpt = golden
    tokens, labels = torch.from_numpy(arrays["tokens"]), torch.from_numpy(arrays["labels"])
    out = gpt(tokens[:, :-1], labels, tap=(1, 2, 3, 4, 5, 6))
    assert plain.error(out.logits, arrays["logits"]) <= 1e-5
    assert plain.error(torch.stack([out.hidden[i] for i in range(1, 7)]), arrays["hidden"]) <= 1e-5
    assert plain.error(gpt.rope, arrays["rope"]) <= 1e-6
    unconditional = gpt(tokens[:, :-1], torch.full_like(labels, 10)).logits
    assert plain.error(unconditional, arrays["logits_uncond"]) <= 1e-5
    assert float(next_token_loss(out.logits, tokens).detach()) == pytest.approx(float(arrays["loss"]), rel=1e-6)


def test_gradients_equal_llamagens(golden: tuple[dict[str, Any], GPT]) -> None:
    arrays, gpt = golden
    tokens, labels = torch.from_numpy(arrays["tokens"]), torch.from_numpy(arrays["labels"])
    gpt.zero_grad()
    next_token_loss(gpt(tokens[:, :-1], labels).logits, tokens).backward()
    wanted = {name[5:]: value for name, value in arrays.items() if name.startswith("grad/")}
    assert set(wanted) == {name for name, _ in gpt.named_parameters()}
    for name, parameter in gpt.named_parameters():
        assert parameter.grad is not None
        assert plain.error(parameter.grad, wanted[name]) <= 1e-5, name
    norm = math.sqrt(sum(float(p.grad.double().pow(2).sum()) for p in gpt.parameters() if p.grad is not None))
    assert norm == pytest.approx(float(arrays["grad_norm"]), rel=1e-6)


@pytest.mark.parametrize("head_dim", [64, 100])
def test_rope_table_turns_rows_then_columns(head_dim: int) -> None:
    table = rope_table(5, head_dim)
    assert table.shape == (26, head_dim // 2, 2)
    assert table.dtype == torch.float32
    assert torch.equal(table[0], torch.zeros(head_dim // 2, 2))
    pairs = head_dim // 4
    for row, column, pair in [(0, 0, 0), (3, 1, 0), (3, 1, pairs - 1), (2, 4, 3)]:
        frequency = 10000.0 ** (-2.0 * pair / (head_dim // 2))
        cell = table[1 + 5 * row + column]
        for angle, found in ((row * frequency, cell[pair]), (column * frequency, cell[pairs + pair])):
            assert found.tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-6)


def test_rope_turns_adjacent_pairs_in_fp32() -> None:
    x = torch.randn(1, 2, 1, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    table = torch.rand(2, 4, 2, generator=torch.Generator().manual_seed(1))
    out = apply_rope(x, table)
    assert out.dtype == torch.bfloat16
    for slot in range(2):
        for pair in range(4):
            a, b = x[0, slot, 0, 2 * pair].float(), x[0, slot, 0, 2 * pair + 1].float()
            cos, sin = table[slot, pair]
            wanted = torch.stack([a * cos - b * sin, b * cos + a * sin]).bfloat16()
            assert torch.equal(out[0, slot, 0, 2 * pair : 2 * pair + 2], wanted)


@torch.no_grad()
def test_class_slot_scores_exactly_zero() -> None:
    """Zero query and key: every slot weighs the class with exp(0), whatever was learned; the class sees only itself."""
    gpt = ruled_gpt()
    layer = gpt.layers[0].attention
    x = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(2))
    q, k, v = layer.wqkv(x).view(2, 6, 3, 4, 16).unbind(2)
    q, k = apply_rope(q, gpt.rope[:6]), apply_rope(k, gpt.rope[:6])
    assert torch.equal(q[:, 0], torch.zeros_like(q[:, 0]))
    assert torch.equal(k[:, 0], torch.zeros_like(k[:, 0]))
    out = layer(x, gpt.rope[:6])
    torch.testing.assert_close(out[:, 0], layer.wo(v[:, 0].reshape(2, -1)), rtol=1e-5, atol=1e-6)
    score = (q[:, 1] * k[:, 1]).sum(-1, keepdim=True) / 4.0  # of slot 1 on itself; on the class it is 0
    share = torch.sigmoid(score)
    expected = layer.wo((share * v[:, 1] + (1 - share) * v[:, 0]).reshape(2, -1))
    torch.testing.assert_close(out[:, 1], expected, rtol=1e-5, atol=1e-6)
    identity = gpt.rope[:6].clone()
    identity[0, :, 0] = 1.0
    assert float((layer(x, identity)[:, 1] - out[:, 1]).abs().max()) > 1e-3


def test_rms_norm_casts_before_the_weight() -> None:
    norm = RMSNorm(64, 1e-5).bfloat16()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64, generator=generator))
    x = torch.randn(8, 64, generator=generator).bfloat16()
    normed = x.float() / torch.sqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    cast_first, cast_last = normed.bfloat16() * norm.weight, (normed * norm.weight.float()).bfloat16()
    assert not torch.equal(cast_first, cast_last)
    found = norm(x)
    assert found.dtype == torch.bfloat16
    # rsqrt and 1/sqrt differ by an ulp of fp32, which can move a rounding to bf16 now and then, but not often.
    assert float((found == cast_first).float().mean()) > 0.995
    assert float((found == cast_last).float().mean()) < 0.95


@pytest.mark.parametrize("size", SIZES)
def test_counts_keys_and_shapes_of_the_named_sizes(size: str) -> None:
    parameters, ffn, decayed, plain_ones = SIZES[size]
    config = ModelConfig(size=size)
    with torch.device("meta"):
        gpt = GPT(config)
    assert parameter_count(config) == parameters
    assert sum(p.numel() for p in gpt.parameters()) == parameters
    settings = {"dim": config.dim, "n_layer": config.n_layer, "vocab_size": 16384, "num_classes": 1000}
    found = {key: tuple(value.shape) for key, value in gpt.state_dict().items()}
    assert list(found.items()) == list(plain.shapes(settings, ffn).items())
    assert len(found) == 4 + 7 * config.depth
    for wanted, kept in ((decayed, True), (plain_ones, False)):
        group = [p for p in gpt.parameters() if (p.dim() >= 2) == kept]
        assert (len(group), sum(p.numel() for p in group)) == wanted


def test_counts_of_sizes_no_paper_trains() -> None:
    assert parameter_count(ModelConfig(size="GPT-XXXL")) == 3_893_027_840
    assert parameter_count(ModelConfig(size="GPT-1B")) == 1_199_616_000
    assert parameter_count(ModelConfig(block_size=576)) == SIZES["GPT-B"][0]


@pytest.mark.parametrize(
    ("dim", "multiple", "hidden"),
    [(2048, 256, 5632), (2560, 256, 6912), (3200, 256, 8704), (4096, 256, 11008), (64, 256, 256), (100, 1, 266)],
)
def test_feed_forward_width(dim: int, multiple: int, hidden: int) -> None:
    config = ModelConfig(size="custom", dim=dim, n_layer=1, n_head=dim // 4, ffn_multiple_of=multiple)
    assert config.ffn_hidden == hidden


@pytest.mark.parametrize(
    ("dim", "target", "count"),
    [(768, 768, 7_344_896), (1024, 1024, 8_393_728), (1280, 1024, 8_918_016), (1280, 1280, 9_442_560)],
)
def test_projector_counts(dim: int, target: int, count: int) -> None:
    with torch.device("meta"):
        heads = projectors(2, dim, 2048, target)
    assert sum(p.numel() for p in heads[1].parameters()) == count
    assert projector_parameters(dim, 2048, target) == count
    assert {k: tuple(v.shape) for k, v in heads.state_dict(prefix="projectors.").items()} == {
        **plain.head_shapes(0, dim, 2048, target),
        **plain.head_shapes(1, dim, 2048, target),
    }


def test_initial_loss_is_ln_v() -> None:
    config = tiny(vocab_size=512)
    gpt = GPT(config)
    initialise(gpt, seed=4)
    tokens, labels = batch(config, 3)
    out = gpt(tokens[:, :-1], labels, torch.arange(3))
    assert torch.equal(out.logits, torch.zeros(3, 16, 512))
    assert float(next_token_loss(out.logits, tokens).detach()) == pytest.approx(6.2383246, abs=1e-6)  # ln 512


def test_initial_weights_follow_llamagens_rule() -> None:
    gpt = GPT(tiny(vocab_size=300, dim=128))
    initialise(gpt, seed=0)
    for name, parameter in gpt.named_parameters():
        value = parameter.detach()
        if name == "output.weight":
            assert torch.equal(value, torch.zeros_like(value))
        elif value.dim() == 1:
            assert torch.equal(value, torch.ones_like(value)), name
        else:
            n = value.numel()
            assert float(value.std()) == pytest.approx(0.02, rel=5 / math.sqrt(2 * n)), name
            assert abs(float(value.mean())) < 5 * 0.02 / math.sqrt(n), name
    heads = projectors(1, 64, 128, 32)
    initialise(heads, seed=0, std=0.5)
    assert float(heads[0][2].weight.detach().std()) == pytest.approx(0.5, rel=0.03)
    assert torch.equal(heads[0][2].bias, torch.zeros(128))


def test_initial_weights_do_not_depend_on_rank_or_method() -> None:
    """Ranks have other global random states, and a Mirai run holds its GPT under a prefix."""
    torch.manual_seed(1)
    one = GPT(tiny())
    torch.manual_seed(2)
    two = torch.nn.ModuleDict({"projectors": projectors(1, 64, 8, 4), "gpt": GPT(tiny())})
    initialise(one, seed=7)
    initialise(two, seed=7)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[f"gpt.{name}"]), name
    first, second = "layers.0.attention.wo.weight", "layers.1.attention.wo.weight"
    assert not torch.equal(one.state_dict()[first], one.state_dict()[second])


@pytest.mark.parametrize("seeds", [(0, 1), (7, 8), (0, 2**31 - 1)])
def test_initial_weights_depend_on_the_seed(seeds: tuple[int, int]) -> None:
    values = [initial_value("layers.0.attention.wo.weight", (64, 64), seed).flatten() for seed in seeds]
    assert abs(float(F.cosine_similarity(*values, dim=0))) < 0.1  # 64 * 64 numbers: 0.016 by chance


def test_autocast_keeps_an_fp32_residual_stream_and_a_cast_does_not() -> None:
    gpt = ruled_gpt(token_dropout=0.1)
    tokens, labels = batch(gpt.config)
    inside: list[torch.dtype] = []
    hook = gpt.layers[0].attention.wo.register_forward_hook(lambda _m, _i, out: inside.append(out.dtype))
    exact = gpt(tokens[:, :-1], labels, tap=(3,))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gpt(tokens[:, :-1], labels, tap=(1, 3))
        dropped = gpt(tokens[:, :-1], labels, torch.arange(2), tap=(3,))
    cast = gpt.to(torch.bfloat16)(tokens[:, :-1], labels, tap=(3,))
    hook.remove()
    assert inside == [torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16]
    assert mixed.hidden[1].dtype == mixed.hidden[3].dtype == dropped.hidden[3].dtype == torch.float32
    assert cast.hidden[3].dtype == torch.bfloat16
    assert mixed.logits.dtype == cast.logits.dtype == torch.float32
    distance = [plain.error(out.hidden[3].float(), exact.hidden[3].detach()) for out in (mixed, cast)]
    assert 1e-5 < distance[0] < distance[1] < 0.2


@pytest.mark.parametrize("length", [0, 1, 5, 15, 16])
def test_features_of_any_length_are_a_prefix(length: int) -> None:
    gpt = ruled_gpt()
    tokens, labels = batch(gpt.config)
    full = gpt.features(tokens, labels)
    assert full.shape == (2, 17, 64)
    found = gpt.features(tokens[:, :length], labels)
    assert found.shape == (2, 1 + length, 64)
    torch.testing.assert_close(found, full[:, : 1 + length], rtol=1e-5, atol=1e-5)


def test_trunk_is_the_first_blocks() -> None:
    gpt = ruled_gpt()
    trunk = GPTTrunk(gpt.config, 2).eval()
    trunk.load_state_dict({name: gpt.state_dict()[name] for name in trunk.state_dict()})
    tokens, labels = batch(gpt.config)
    assert torch.equal(trunk.features(tokens[:, :-1], labels), gpt(tokens[:, :-1], labels, tap=(2,)).hidden[2])


def test_later_tokens_do_not_reach_earlier_slots() -> None:
    gpt = ruled_gpt()
    tokens, labels = batch(gpt.config)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % gpt.config.vocab_size  # the token in slot 10
    a, b = gpt(tokens, labels).logits.detach(), gpt(changed, labels).logits.detach()
    assert torch.equal(a[:, :10], b[:, :10])
    assert float((a[:, 10:] - b[:, 10:]).abs().amax((0, 2)).min()) > 1e-4


def test_training_mode_alone_changes_nothing() -> None:
    """Dropout is a matter of keys, not of module.train()."""
    gpt = ruled_gpt()
    tokens, labels = batch(gpt.config)
    quiet = gpt(tokens[:, :-1], labels).logits
    assert torch.equal(gpt.train()(tokens[:, :-1], labels).logits, quiet)
    assert plain.error(gpt(tokens[:, :-1], labels, torch.arange(2)).logits, quiet.detach()) > 0.05
