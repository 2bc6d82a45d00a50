"""PAR's block decoding with a cache against a re-implementation without one; every image has its own numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mirai_ds.config import ModelConfig
from mirai_ds.model import GPT, SamplingRules, sample_tokens
from mirai_ds.model.orders import token_order
from mirai_ds.model.sampling import image_keys
from mirai_ds.model.stepwise import decode_slots, new_cache
from mirai_ds.runtime.counter_random import uniform
from tests.model import plain_gpt as plain
from tests.model import plain_par
from tests.model.test_sampling import plain_draw, plain_filter

torch.set_num_threads(1)  # on small tensors two threads mostly wait for each other

LABELS, INDICES = torch.tensor([0, 3, 1, 4, 2, 2]), torch.tensor([10, 3, 7, 0, 1, 2])


def par(grid: int = 8, n: int = 4) -> GPT:
    gpt = GPT(ModelConfig(size="custom", par_tokens=n, **settings(grid))).eval().requires_grad_(False)
    state = plain.ruled({k: tuple(v.shape) for k, v in gpt.state_dict().items()}, seed=5)
    state["output.weight"] *= 3.0  # peaked enough for the filters to matter
    gpt.load_state_dict(state)
    return gpt


def settings(grid: int) -> dict[str, Any]:
    return {**plain.TINY, "block_size": grid * grid}


def plain_sample(gpt: GPT, grid: int, n: int, rules: SamplingRules, seed: int) -> Tensor:
    """No cache: for every step the whole sequence again, in fp64, zeros standing for what is not made yet."""
    state = {k: v.double() for k, v in gpt.state_dict().items()}
    cells, keys = grid * grid, image_keys(seed, INDICES)
    made = torch.zeros(len(LABELS), cells, dtype=torch.int64)
    nothing = torch.full_like(LABELS, plain.TINY["num_classes"])
    first, step = 0, 0
    while first < cells:
        count = 1 if first < n else n
        logits = plain_par.forward(state, settings(grid), n, made[:, :-1], LABELS)[0]
        if rules.cfg_scale > 1 and not (rules.cfg_interval > -1 and step - 1 > rules.cfg_interval):
            without = plain_par.forward(state, settings(grid), n, made[:, :-1], nothing)[0]
            logits = without + rules.cfg_scale * (logits - without)
        for q in range(first, first + count):
            rows = [plain_filter(row, rules.temperature, rules.top_k, rules.top_p) for row in logits[:, q].tolist()]
            made[:, q] = torch.tensor(
                [plain_draw(row, u) for row, u in zip(rows, uniform(keys, q).tolist(), strict=True)]
            )
        first, step = first + count, step + 1
    image = torch.empty_like(made)
    image[:, plain_par.raster(grid, n)] = made
    return image


RULES = {
    "plain": SamplingRules(),
    "all": SamplingRules(cfg_scale=2.0, temperature=0.9, top_k=12, top_p=0.9),
    "interval": SamplingRules(cfg_scale=4.0, cfg_interval=5, temperature=1.2, top_p=0.8),
}


@pytest.mark.parametrize(("grid", "n", "name"), [(8, 4, "plain"), (8, 4, "all"), (8, 4, "interval"), (6, 9, "all")])
def test_token_for_token_without_a_cache(grid: int, n: int, name: str) -> None:
    gpt = par(grid, n)
    found = sample_tokens(gpt, LABELS, INDICES, RULES[name], seed=9)
    assert found.shape == (6, grid * grid)
    assert torch.equal(found, plain_sample(gpt, grid, n, RULES[name], seed=9))


@pytest.mark.parametrize(("cells", "n", "steps"), [(256, 4, 67), (576, 4, 147), (576, 16, 51), (64, 4, 19)])
def test_number_of_steps(cells: int, n: int, steps: int) -> None:
    found = list(token_order(math.isqrt(cells), n).decoding_steps())
    assert len(found) == steps == n + (cells - n) // n
    slots = [slot for start, count in found for slot in range(start, start + count)]
    assert slots == list(range(cells))


def test_a_step_is_one_forward_pass() -> None:
    gpt, seen = par(), []
    gpt.layers[0].register_forward_pre_hook(lambda _m, arguments: seen.append(tuple(arguments[0].shape[:2])))
    sample_tokens(gpt, LABELS, INDICES, SamplingRules(cfg_scale=2.0), seed=0)
    assert seen == [(12, 1)] * 4 + [(12, 4)] * 15


@pytest.mark.parametrize(("grid", "n"), [(8, 4), (6, 9), (8, 16)])
def test_cached_logits_equal_teacher_forced_ones(grid: int, n: int) -> None:
    gpt, cells = par(grid, n), grid * grid
    order = gpt.order
    sequence = torch.randint(48, (3, cells), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([1, 4, 5])
    forced = order.to_sequence(gpt(order.to_raster(sequence), labels).logits)
    cache = new_cache(gpt, 3)
    assert cache[0].key.shape == (3, 4, cells, 16)
    for start, slots in order.decoding_steps():
        given = sequence[:, :start]
        x = gpt.cls_embedding(labels, None)
        if start:
            x = order.step_input(given, start, gpt.tok_embeddings, gpt.spe_tok_embeddings)
        found = decode_slots(gpt, x, cache, start)
        assert found.shape == (3, slots, 48)
        assert plain.error(found, forced[:, start : start + slots]) <= 1e-5, start


def test_interval_counts_steps_not_tokens() -> None:
    """Interval 3: the first pass and four more are guided, which makes x_0..x_3 and the block x_4..x_7."""
    gpt = par()
    always, some = (
        gpt.order.to_sequence(sample_tokens(gpt, LABELS, INDICES, SamplingRules(cfg_scale=4.0, cfg_interval=i), seed=1))
        for i in (-1, 3)
    )
    assert torch.equal(some[:, :8], always[:, :8])
    assert not torch.equal(some[:, 8:12], always[:, 8:12])


@pytest.mark.parametrize("name", ["plain", "all"])
def test_same_tokens_for_any_batch_split(name: str) -> None:
    gpt = par()
    whole = sample_tokens(gpt, LABELS, INDICES, RULES[name], seed=9)
    for size in (1, 4):
        parts = zip(LABELS.split(size), INDICES.split(size), strict=True)
        assert torch.equal(torch.cat([sample_tokens(gpt, a, i, RULES[name], seed=9) for a, i in parts]), whole), size


def test_images_differ_by_index_and_seed() -> None:
    gpt, label = par(), torch.zeros(6, dtype=torch.int64)
    one = sample_tokens(gpt, label, torch.arange(6), SamplingRules(), seed=0)
    assert len({tuple(row) for row in one.tolist()}) == 6
    assert not torch.equal(one, sample_tokens(gpt, label, torch.arange(6), SamplingRules(), seed=1))
    assert torch.equal(one[3:], sample_tokens(gpt, label[3:], torch.arange(3, 6), SamplingRules(), seed=0))


def test_tokens_of_one_step_are_drawn_independently() -> None:
    """A model without knowledge: every token uniform over 2, so that a shared number would show as equal tokens."""
    gpt = par()
    with torch.no_grad():
        gpt.output.weight[:] = 0.0
    images = 512
    tokens = sample_tokens(gpt, torch.zeros(images, dtype=torch.int64), torch.arange(images), SamplingRules(), seed=0)
    block = gpt.order.to_sequence(tokens)[:, 4:8].double() / 47 - 0.5  # about uniform on -0.5..0.5: variance 1/12
    for i in range(4):
        for j in range(i):
            assert abs(float((block[:, i] * block[:, j]).mean()) * 12) < 5 / math.sqrt(images)


def test_sampling_under_autocast() -> None:
    gpt = par()
    exact = gpt.order.to_sequence(sample_tokens(gpt, LABELS, INDICES, SamplingRules(temperature=0.0), seed=0))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gpt.order.to_sequence(sample_tokens(gpt, LABELS, INDICES, SamplingRules(temperature=0.0), seed=0))
    assert float((mixed[:, :4] == exact[:, :4]).float().mean()) > 0.7
