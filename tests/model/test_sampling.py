"""Sampling against a re-implementation without a cache, and the rules one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mirai_ds.config import ModelConfig
from mirai_ds.model import GPT, SamplingRules, sample_tokens
from mirai_ds.model.sampling import draw, filter_logits, guide, image_keys
from mirai_ds.model.stepwise import decode_slots, new_cache, sample_stepwise
from mirai_ds.runtime.counter_random import uniform
from tests.model import plain_gpt as plain

torch.set_num_threads(1)  # on small tensors two threads mostly wait for each other

SETTINGS: dict[str, Any] = plain.TINY


@pytest.fixture(scope="module")
def gpt() -> GPT:
    model = GPT(ModelConfig(size="custom", **SETTINGS)).eval().requires_grad_(False)
    state = plain.ruled({k: tuple(v.shape) for k, v in model.state_dict().items()}, seed=5)
    state["output.weight"] *= 3.0  # peaked enough for the filters to matter
    model.load_state_dict(state)
    return model


def plain_filter(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """LlamaGen's filters on one row, with Python lists."""
    scaled = [x / max(temperature, 1e-5) for x in logits]
    if top_k:
        kth = sorted(scaled, reverse=True)[min(top_k, len(scaled)) - 1]
        scaled = [x if x >= kth else -math.inf for x in scaled]
    if top_p < 1.0:
        top = max(scaled)
        weights = [math.exp(x - top) for x in scaled]
        total, mass, keep = sum(weights), 0.0, set()
        for i in sorted(range(len(scaled)), key=lambda i: -scaled[i]):
            if mass > top_p:
                break
            keep.add(i)
            mass += weights[i] / total
        scaled = [x if i in keep else -math.inf for i, x in enumerate(scaled)]
    return scaled


def plain_draw(logits: list[float], u: float) -> int:
    """The token whose stretch of the cumulative distribution holds u."""
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total, mass = sum(weights), 0.0
    for i, weight in enumerate(weights):
        mass += weight / total
        if u < mass:
            return i
    return len(weights) - 1


def plain_sample(gpt: GPT, labels: Tensor, keys: Tensor, rules: SamplingRules) -> Tensor:
    """No cache: the whole sequence again for every token, two separate passes for guidance."""
    state = {k: v.double() for k, v in gpt.state_dict().items()}
    tokens = torch.zeros(len(labels), 0, dtype=torch.int64)
    nothing = torch.full_like(labels, SETTINGS["num_classes"])
    for position in range(SETTINGS["block_size"]):
        logits = plain.forward(state, SETTINGS, tokens, labels)[0][:, -1]
        after_first = position - 1
        if rules.cfg_scale > 1 and not (rules.cfg_interval > -1 and after_first > rules.cfg_interval):
            without = plain.forward(state, SETTINGS, tokens, nothing)[0][:, -1]
            logits = without + rules.cfg_scale * (logits - without)
        u = uniform(keys, position).tolist()
        rows = [plain_filter(row, rules.temperature, rules.top_k, rules.top_p) for row in logits.tolist()]
        chosen = [plain_draw(row, number) for row, number in zip(rows, u, strict=True)]
        tokens = torch.cat([tokens, torch.tensor(chosen)[:, None]], dim=1)
    return tokens


LABELS, INDICES = torch.tensor([0, 3, 1, 4, 2, 2]), torch.tensor([10, 3, 7, 0, 1, 2])
RULES = {
    "plain": SamplingRules(),
    "guided": SamplingRules(cfg_scale=2.0),
    "all": SamplingRules(cfg_scale=2.0, temperature=0.9, top_k=12, top_p=0.9),
    "two tokens": SamplingRules(cfg_scale=4.0, cfg_interval=0, top_k=20),
    "interval": SamplingRules(cfg_scale=4.0, cfg_interval=5, temperature=1.2, top_p=0.8),
    "below one": SamplingRules(cfg_scale=0.5),
}


@pytest.mark.parametrize("name", RULES)
def test_token_for_token_without_a_cache(gpt: GPT, name: str) -> None:
    found = sample_tokens(gpt, LABELS, INDICES, RULES[name], seed=9)
    assert found.shape == (6, 16)
    assert torch.equal(found, plain_sample(gpt, LABELS, image_keys(9, INDICES), RULES[name]))


def test_interval_is_counted_from_the_second_token(gpt: GPT) -> None:
    """interval 0: the first token and decode step 0 are guided, everything from decode step 1 on is not."""
    always = sample_tokens(gpt, LABELS, INDICES, SamplingRules(cfg_scale=4.0), seed=1)
    never = sample_tokens(gpt, LABELS, INDICES, SamplingRules(), seed=1)
    zero = sample_tokens(gpt, LABELS, INDICES, SamplingRules(cfg_scale=4.0, cfg_interval=0), seed=1)
    long = sample_tokens(gpt, LABELS, INDICES, SamplingRules(cfg_scale=4.0, cfg_interval=14), seed=1)
    assert torch.equal(zero[:, :2], always[:, :2])
    assert not torch.equal(zero, always)
    assert not torch.equal(never[:, 0], always[:, 0])
    assert torch.equal(long, always)


@pytest.mark.parametrize("rules", [SamplingRules(), SamplingRules(cfg_scale=4.0, cfg_interval=5, top_k=12)])
def test_fixed_buffers_draw_what_plain_steps_draw(gpt: GPT, rules: SamplingRules) -> None:
    """The decoder of one slot a step against the sampler of any order."""
    assert torch.equal(
        sample_tokens(gpt, LABELS, INDICES, rules, seed=3), sample_stepwise(gpt, LABELS, INDICES, rules, seed=3)
    )


@pytest.mark.parametrize("slots", [1, 4])
def test_cached_logits_equal_teacher_forced_ones(gpt: GPT, slots: int) -> None:
    """`slots` are given at once at first, the rest one by one; the class slot is the first."""
    tokens = torch.randint(48, (3, 15), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 4, 5])
    forced = gpt(tokens, labels).logits
    cache = new_cache(gpt, 3)
    assert cache[0].key.shape == (3, 4, 16, 16)
    x = gpt.embed(tokens, labels, None)
    start = 0
    for width in (slots, *[1] * (16 - slots)):
        found = decode_slots(gpt, x[:, start : start + width], cache, start)[:, -1]
        start += width
        assert plain.error(found, forced[:, start - 1]) <= 1e-5, start
    assert start == 16


def test_guidance_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 9, generator=generator), torch.randn(2, 9, generator=generator)
    assert torch.equal(guide(a, b, 1.75), b + (a - b) * 1.75)
    assert torch.equal(guide(a, b, 0.0), b)


def test_scale_one_ignores_the_unconditional_rows(gpt: GPT) -> None:
    """cfg_scale <= 1 is off, so the unconditional embedding must not matter; above 1 it must."""
    other = GPT(gpt.config).eval()
    other.load_state_dict(gpt.state_dict())
    with torch.no_grad():
        other.cls_embedding.embedding_table.weight[5] += 1.0
    for scale, same in ((1.0, True), (1.5, False)):
        rules = SamplingRules(cfg_scale=scale)
        pair = [sample_tokens(model, LABELS, INDICES, rules, seed=0) for model in (gpt, other)]
        assert torch.equal(*pair) == same


def test_top_k_keeps_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0, 2.0]])
    kept = filter_logits(logits, SamplingRules(top_k=2))
    assert (kept > -torch.inf).tolist() == [[False, True, True, True, False, True]]
    assert torch.equal(filter_logits(logits, SamplingRules(top_k=0)), logits)
    assert torch.equal(filter_logits(logits, SamplingRules(top_k=99)), logits)


def test_top_p_keeps_the_crossing_token() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    wanted = {0.3: [1], 0.4999: [1], 0.51: [1, 3], 0.74: [1, 3], 0.76: [1, 2, 3], 0.95: [0, 1, 2, 3], 1.0: [0, 1, 2, 3]}
    for top_p, tokens in wanted.items():
        kept = filter_logits(logits, SamplingRules(top_p=top_p))[0] > -torch.inf
        assert kept.nonzero().flatten().tolist() == tokens, top_p


def test_filters_follow_temperature_and_each_other() -> None:
    logits = torch.randn(4, 48, generator=torch.Generator().manual_seed(3)) * 2
    rules = SamplingRules(temperature=0.7, top_k=10, top_p=0.8)
    found = filter_logits(logits, rules)
    wanted = torch.tensor([plain_filter(row, 0.7, 10, 0.8) for row in logits.tolist()])
    assert torch.equal(found > -torch.inf, wanted > -torch.inf)
    kept = wanted > -torch.inf
    assert 4 < int(kept.sum()) < 40
    torch.testing.assert_close(found[kept], wanted[kept], rtol=1e-5, atol=1e-6)


def test_temperature_zero_is_the_most_likely_token(gpt: GPT) -> None:
    rules = SamplingRules(temperature=0.0)
    found = sample_tokens(gpt, LABELS, INDICES, rules, seed=0)
    assert torch.equal(found[:, 0], gpt(LABELS[:, None][:, :0], LABELS).logits[:, 0].argmax(-1))
    assert torch.equal(found, sample_tokens(gpt, LABELS, INDICES, rules, seed=123))


def test_draw_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.4, 0.0, 0.3, 0.05, 0.2, 0.05])
    logits = probabilities.log().expand(20_000, -1)
    counts = torch.bincount(draw(logits, image_keys(3, torch.arange(20_000)), step=7), minlength=6)
    assert int(counts[1]) == 0
    possible = probabilities > 0
    expected = probabilities[possible] * 20_000
    chi2 = float(((counts[possible] - expected) ** 2 / expected).sum())
    assert chi2 < 18.5  # 4 degrees of freedom: exceeded once in 1,000
    again = torch.bincount(draw(logits, image_keys(3, torch.arange(20_000)), step=8), minlength=6)
    assert not torch.equal(counts, again)


def test_steps_draw_independently() -> None:
    keys = image_keys(0, torch.arange(40_000))
    logits = torch.zeros(40_000, 2)
    a, b = draw(logits, keys, 0).double() - 0.5, draw(logits, keys, 1).double() - 0.5
    assert abs(float((a * b).mean()) / 0.25) < 5 / math.sqrt(40_000)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_same_tokens_for_any_batch_split(gpt: GPT, name: str) -> None:
    whole = sample_tokens(gpt, LABELS, INDICES, RULES[name], seed=9)
    for size in (1, 2, 5):
        parts = zip(LABELS.split(size), INDICES.split(size), strict=True)
        assert torch.equal(torch.cat([sample_tokens(gpt, a, i, RULES[name], seed=9) for a, i in parts]), whole), size


def test_seeds_and_indices_decide(gpt: GPT) -> None:
    label = torch.zeros(6, dtype=torch.int64)
    one = sample_tokens(gpt, label, torch.arange(6), SamplingRules(), seed=0)
    assert len({tuple(row) for row in one.tolist()}) == 6
    assert not torch.equal(one, sample_tokens(gpt, label, torch.arange(6), SamplingRules(), seed=1))
    assert torch.equal(one[3:], sample_tokens(gpt, label[3:], torch.arange(3, 6), SamplingRules(), seed=0))


def test_sampling_under_autocast(gpt: GPT) -> None:
    """The cache is fp32 and the new keys are bf16 there; tokens are close to, but not always, the fp32 ones."""
    exact = sample_tokens(gpt, LABELS, INDICES, SamplingRules(temperature=0.0), seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sample_tokens(gpt, LABELS, INDICES, SamplingRules(temperature=0.0), seed=0)
    assert float((mixed[:, :4] == exact[:, :4]).float().mean()) > 0.7
