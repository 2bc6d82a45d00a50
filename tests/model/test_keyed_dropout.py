"""Dropout by keys: the right rate, unbiased, independent, and the same however a batch is split.

All keys are fixed, so nothing here is flaky; bounds are five standard deviations of the ideal law or wider.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mirai_ds.config import ModelConfig
from mirai_ds.model import GPT, initialise
from mirai_ds.model.keyed_dropout import drop_path, dropout, keep_mask, path_rates, path_scales
from mirai_ds.runtime.counter_random import derive_keys, root_key, uniform

torch.set_num_threads(1)  # on small tensors two threads mostly wait for each other

MASK64 = (1 << 64) - 1


def sample_keys(count: int) -> Tensor:
    return derive_keys(root_key(5, 1) + torch.arange(count), 2)


def splitmix(state: int) -> int:
    """Reference splitmix64 (Steele et al. 2014) in Python integers."""
    z = (state + 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def correlation(a: Tensor, b: Tensor) -> float:
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a * b).mean() / (a.std() * b.std()))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("elements", [4096, 4097, 4099])
def test_rate(rate: float, elements: int) -> None:
    mask = keep_mask(derive_keys(sample_keys(64), 3), elements, rate)
    assert mask.shape == (64, elements)
    n = mask.numel()
    assert float(mask.float().mean()) == pytest.approx(1 - rate, abs=5 * math.sqrt(rate * (1 - rate) / n))
    each = mask.float().mean(1)  # and in every sample, not only on average
    assert float((each - (1 - rate)).abs().max()) < 5 * math.sqrt(rate * (1 - rate) / elements)


def test_mask_is_the_documented_hash() -> None:
    """Four 16-bit lanes of splitmix64's output, compared with the threshold, by Python's own integers."""
    key = sample_keys(1)
    base = int(derive_keys(key, 7)) & MASK64
    kept = []
    for lane in range(3):
        number = splitmix((base + lane * 0x9E3779B97F4A7C15) & MASK64)
        for part in range(4):
            bits = (number >> (16 * part)) & 0xFFFF
            signed = bits - 65536 if bits >= 32768 else bits
            kept.append(signed >= round(0.3 * 65536) - 32768)
    assert keep_mask(derive_keys(key, 7), 11, 0.3)[0].tolist() == kept[:11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_survivors_are_scaled_without_bias(dtype: torch.dtype) -> None:
    x = torch.randn(32, 4096, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = dropout(x, 0.1, derive_keys(sample_keys(32), 5))
    assert out.dtype == dtype
    kept = out != 0
    assert torch.equal(kept, keep_mask(derive_keys(sample_keys(32), 5), 4096, 0.1))
    wanted = x[kept].double() * (65536 / (65536 - round(0.1 * 65536)))
    bias = float((out[kept].double() / wanted).mean()) - 1.0
    # In bf16 one rounding is up to 2e-3 either way, but not on average: a scale rounded to bf16 would be off by 1.6e-3.
    assert abs(bias) < (1e-7 if dtype == torch.float32 else 1e-4)


def test_expectation_and_gradient() -> None:
    x = torch.full((64, 8192), 3.0, requires_grad=True)
    out = dropout(x, 0.25, derive_keys(sample_keys(64), 1))
    assert float(out.detach().mean()) == pytest.approx(3.0, abs=5 * 3 * math.sqrt(0.25 / 0.75 / x.numel()))
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(out.detach() != 0, torch.tensor(1 / 0.75), torch.tensor(0.0)))


def test_sites_samples_and_elements_are_independent() -> None:
    keys, n = sample_keys(256), 256 * 1024
    bound = 5 / math.sqrt(n)
    masks = [keep_mask(derive_keys(keys, site), 1024, 0.5) for site in range(5)]
    for i in range(5):
        for j in range(i):
            assert abs(correlation(masks[i], masks[j])) < bound, (i, j)
    mask = masks[0]
    for shift in (1, 2, 3, 4, 5, 8, 64):
        assert abs(correlation(mask[:, shift:], mask[:, :-shift])) < 1.1 * bound, shift
    for shift in (1, 2, 16):
        assert abs(correlation(mask[shift:], mask[:-shift])) < 1.1 * bound, shift
    diagonal = mask[1:, :-1], mask[:-1, 1:]  # a stream that only advances with the sample would repeat here
    assert abs(correlation(*diagonal)) < 1.1 * bound


def test_every_element_is_dropped_sometimes() -> None:
    kept = keep_mask(derive_keys(sample_keys(4096), 2), 12, 0.5).float().mean(0)
    assert float((kept - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(4096)


@pytest.mark.parametrize("split", [(1, 7), (4, 4), (2, 3, 3)])
def test_same_mask_whatever_the_split(split: tuple[int, ...]) -> None:
    x = torch.randn(8, 6, 10, generator=torch.Generator().manual_seed(0))
    keys = sample_keys(8)
    parts = zip(x.split(split), keys.split(split), strict=True)
    assert torch.equal(
        torch.cat([dropout(a, 0.3, derive_keys(k, 4)) for a, k in parts]), dropout(x, 0.3, derive_keys(keys, 4))
    )
    parts = zip(x.split(split), keys.split(split), strict=True)
    assert torch.equal(torch.cat([drop_path(a, scales(k, 0.3)) for a, k in parts]), drop_path(x, scales(keys, 0.3)))


def scales(keys: Tensor, rate: float) -> Tensor:
    """The factors of the last of two blocks."""
    return path_scales(derive_keys(keys, 9)[None, None].expand(2, 1, -1), path_rates(rate, 2))[1, 0]


def test_drop_path_drops_whole_samples() -> None:
    x = torch.ones(4096, 3, 2)
    out = drop_path(x, scales(sample_keys(4096), 0.25))
    kept = out[:, 0, 0] != 0
    assert torch.equal(out, (kept.float() / 0.75)[:, None, None].expand_as(x))
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=5 * math.sqrt(0.25 * 0.75 / 4096))
    narrow = drop_path(torch.ones(4096, 1).bfloat16(), scales(sample_keys(4096), 0.1))
    assert float(narrow.max()) == float(torch.tensor(1 / 0.9).bfloat16())
    big = drop_path(torch.full((4096, 1), 300.0).bfloat16(), scales(sample_keys(4096), 0.1))
    assert float(big.max()) == 334.0  # 333.3 to the nearest bf16; with a scale rounded to bf16 first it would be 332


def test_drop_path_grows_with_depth_and_survives_a_cast() -> None:
    """LlamaGen's rule: linear from 0 at the first block to the rate at the last."""
    rates = path_rates(0.2, 5)
    wanted = torch.tensor([0.2 * index / 4 for index in range(5)], dtype=torch.float64)
    assert torch.equal(rates.view(torch.float64), torch.stack([wanted, 1 / (1 - wanted)], dim=1))
    gpt = GPT(small(drop_path=0.2)).bfloat16()
    assert torch.equal(gpt.path_rates, path_rates(0.2, 3))
    kept = (path_scales(derive_keys(sample_keys(4096), 9)[None, None].expand(5, 2, -1), rates) > 0).float().mean((1, 2))
    assert float((kept - (1 - wanted)).abs().max()) < 5 * math.sqrt(0.16 / 4096)


def test_uniform_is_uniform() -> None:
    u = uniform(sample_keys(1 << 16), 0).double()
    assert float(u.min()) >= 0.0
    assert float(u.max()) < 1.0
    counts = torch.histc(u, 64, 0.0, 1.0)
    chi2 = float(((counts - 1024) ** 2 / 1024).sum())
    assert 30 < chi2 < 120  # 63 degrees of freedom: mean 63, deviation 11


def small(**rates: float) -> ModelConfig:
    zero = dict.fromkeys(("token_dropout", "resid_dropout", "ffn_dropout", "class_dropout", "drop_path"), 0.0)
    return ModelConfig(
        size="custom", dim=16, n_layer=3, n_head=2, vocab_size=20, num_classes=4, block_size=4, ffn_multiple_of=8,
        **(zero | rates),
    )  # fmt: skip


def embeddings(rate: float, count: int) -> tuple[GPT, Tensor]:
    gpt = GPT(small(class_dropout=rate))
    initialise(gpt, 0)
    return gpt, gpt.cls_embedding(torch.full((count,), 2), sample_keys(count)).detach()[:, 0]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_labels_are_dropped_at_their_rate(rate: float) -> None:
    gpt, rows = embeddings(rate, 8192)
    table = gpt.cls_embedding.embedding_table.weight.detach()
    dropped, kept = (rows == table[4]).all(1), (rows == table[2]).all(1)
    assert bool((dropped ^ kept).all())
    assert float(dropped.float().mean()) == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / 8192))


def test_label_dropout_ends() -> None:
    gpt, rows = embeddings(0.0, 64)
    assert torch.equal(rows, gpt.cls_embedding.embedding_table.weight.detach()[2].expand(64, -1))
    gpt, rows = embeddings(1.0, 64)
    assert torch.equal(rows, gpt.cls_embedding.embedding_table.weight.detach()[4].expand(64, -1))


def outputs(config: ModelConfig, keys: Tensor | None) -> Tensor:
    gpt = GPT(config)
    initialise(gpt, 1, std=0.3)
    tokens = torch.arange(24).view(8, 3) % 20
    return gpt(tokens, torch.arange(8) % 4, keys, tap=(3,)).hidden[3].detach()


def test_identity_when_off() -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert dropout(x, 0.0, derive_keys(sample_keys(4), 0)) is x
    assert dropout(x, 0.5, None) is x
    assert drop_path(x, None) is x
    assert torch.equal(drop_path(x, scales(sample_keys(4), 0.0)), x)
    assert torch.equal(outputs(small(), sample_keys(8)), outputs(small(), None))


@pytest.mark.parametrize("rate", ["token_dropout", "resid_dropout", "ffn_dropout", "class_dropout", "drop_path"])
def test_each_rate_of_the_network_acts_and_follows_the_sample(rate: str) -> None:
    config = small(**{rate: 0.5})
    keys = sample_keys(8)
    out = outputs(config, keys)
    assert not torch.equal(out, outputs(config, None))
    assert torch.equal(out, outputs(config, keys.clone()))
    assert not torch.equal(out, outputs(config, keys.flip(0)))


def test_drop_path_is_linear_over_depth_and_replaces_the_others() -> None:
    gpt = GPT(small(drop_path=0.2, resid_dropout=0.1, ffn_dropout=0.1, token_dropout=0.1))
    assert gpt.path_rates is not None
    assert gpt.path_rates.view(torch.float64)[:, 0].tolist() == pytest.approx([0.0, 0.1, 0.2])
    assert [(layer.resid_rate, layer.ffn_rate) for layer in gpt.layers] == [(0.0, 0.0)] * 3
    assert gpt.config.token_dropout == 0.1


def test_a_networks_dropout_does_not_depend_on_the_split() -> None:
    gpt = GPT(small(token_dropout=0.2, resid_dropout=0.2, ffn_dropout=0.2, class_dropout=0.5))
    initialise(gpt, 1, std=0.3)
    tokens, labels, keys = torch.arange(24).view(8, 3) % 20, torch.arange(8) % 4, sample_keys(8)
    whole = gpt(tokens, labels, keys, tap=(3,)).hidden[3]
    parts = [gpt(tokens[i : i + 2], labels[i : i + 2], keys[i : i + 2], tap=(3,)).hidden[3] for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-6)


def test_every_use_of_randomness_has_a_site_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two uses with one site would share their mask."""
    from mirai_ds.model import gpt as module

    seen: list[tuple[int, ...]] = []
    keys = sample_keys(8)
    for name in ("dropout", "path_scales", "uniform"):
        right = getattr(module, name)

        def spy(*arguments: Any, right: Any = right) -> Any:
            if right is path_scales:
                seen.extend(tuple(use) for block in arguments[0].tolist() for use in block)
                return right(*arguments)
            at_site = derive_keys(*arguments) if right is uniform else arguments[-1]
            seen.append(tuple(at_site.tolist()))
            return right(*arguments)

        monkeypatch.setattr(module, name, spy)
    outputs(small(class_dropout=0.5, drop_path=0.5), keys)
    wanted = [tuple(derive_keys(keys, site).tolist()) for site in range(2 + 4 * 3)]
    assert sorted(seen) == sorted(wanted)  # label, tokens, and four in each of three blocks
