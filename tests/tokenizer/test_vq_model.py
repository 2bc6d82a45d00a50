"""The VQ networks are LlamaGen's: sizes, keys, and values against the reference's and a plain re-implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mirai_ds.tokenizer import VQ8, VQ16, VQConfig, VQModel, vq_model
from tests.model import plain_gpt as plain
from tests.tokenizer import plain_vq

torch.set_num_threads(1)  # on small tensors two threads mostly wait for each other

FIXTURE = Path(__file__).parents[1] / "fixtures" / "vq16_64px.npz"
SMALL = VQConfig(
    channels=32, multipliers=(1, 2), z_channels=48, codebook_size=64, code_dim=4, encoder_blocks=1, decoder_blocks=2
)
BOUND = 1e-5  # fp64 from a vector that other code made in fp32; a GroupNorm eps of 1e-5 instead of 1e-6 is off by more
ROUNDING = 2.0  # times the error of the plain functions in fp32, both measured from fp64: an order of operations


def shapes_of(c: VQConfig) -> plain_vq.Shapes:
    return plain_vq.shapes(
        c.channels, c.multipliers, c.z_channels, c.codebook_size, c.code_dim, c.encoder_blocks, c.decoder_blocks
    )


def ruled(config: VQConfig, seed: int) -> tuple[VQModel, plain_vq.State]:
    """A model and its state dict, weights by the golden rule."""
    state = plain.ruled(shapes_of(config), seed)
    with torch.device("meta"):
        model = VQModel(config)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False), state


def error(ours: Tensor, exact: Tensor) -> float:
    """Largest difference in units of the largest value."""
    assert ours.shape == exact.shape
    return float((ours.double() - exact).abs().max() / exact.abs().max())


def distance(ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference in units of the norm."""
    assert ours.shape == exact.shape
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.fixture(scope="module")
def vq16() -> tuple[VQModel, plain_vq.State]:
    return ruled(VQ16, 31)


@pytest.mark.parametrize(
    ("config", "total", "encoder", "decoder", "tensors"),
    [(VQ16, 71_883_403, 29_298_176, 42_449_795, 343), (VQ8, 70_109_835, None, None, 299)],
)
def test_parameter_counts(config: VQConfig, total: int, encoder: int | None, decoder: int | None, tensors: int) -> None:
    with torch.device("meta"):
        model = VQModel(config)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert sum(count.values()) == total
    assert encoder in (None, count["encoder"])
    assert decoder in (None, count["decoder"])
    assert count["quantize"] + count["quant_conv"] + count["post_quant_conv"] == 135_432
    assert len(list(model.parameters())) == tensors
    assert [name for name, _ in model.named_buffers()] == ["quantize.codebook_used"]
    assert len(model.state_dict()) == tensors + 1


@pytest.mark.parametrize(
    "config", [VQ16, VQ8, SMALL, replace(SMALL, multipliers=(1,)), replace(SMALL, multipliers=(2, 1, 3))]
)
def test_keys_and_shapes(config: VQConfig) -> None:
    with torch.device("meta"):
        state = VQModel(config).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == shapes_of(config)
    assert state["quantize.codebook_used"].dtype == torch.float32


def assert_rounding(ours: Tensor, plain: Callable[[torch.memory_format], Tensor], exact: Tensor) -> None:
    """As near to fp64 as the same operations in fp32 on this processor, in norm and at the worst place.

    oneDNN takes other convolutions for other memory formats, whose errors differ by a factor of three where the
    processor has matrix units, and codes enter the decoder with their channels last: the worse format is the measure.
    """
    orders = [plain(torch.contiguous_format), plain(torch.channels_last)]
    for measure in (error, distance):
        assert measure(ours, exact) <= ROUNDING * max(measure(order, exact) for order in orders)


def in_format(state: plain_vq.State, form: torch.memory_format) -> plain_vq.State:
    return {name: value.to(memory_format=form) if value.dim() == 4 else value for name, value in state.items()}


def assert_latent(ours: Tensor, state: plain_vq.State, x: Tensor, exact: Tensor) -> None:
    assert_rounding(ours, lambda form: plain_vq.latent(in_format(state, form), x.to(memory_format=form)), exact)


def assert_decoded(ours: Tensor, state: plain_vq.State, tokens: Tensor, side: int, exact: Tensor) -> None:
    assert_rounding(ours, lambda form: plain_vq.decode(in_format(state, form), tokens, side), exact)


def test_reference_vector(vq16: tuple[VQModel, plain_vq.State]) -> None:
    """The vector is what the plain functions give in fp64, on any processor, and the networks round as these do."""
    model, state = vq16
    with np.load(FIXTURE, allow_pickle=False) as data:
        names = ("latent", "indices", "decode_codes", "decoded")
        given = {name: torch.from_numpy(data[name]) for name in names}
    x = torch.from_numpy(np.random.default_rng(31).uniform(-1, 1, (2, 3, 64, 64)).astype(np.float32))
    wide = {name: value.double() for name, value in state.items()}
    exact = plain_vq.latent(wide, x.double())
    assert error(given["latent"], exact) <= BOUND
    latent = model.latent(x)
    assert_latent(latent, state, x, exact)
    plain_vq.assert_nearest(state, model.indices(latent), latent, given["latent"])
    assert model.indices(given["latent"]).tolist() == given["indices"].tolist()
    exact = plain_vq.decode(wide, given["decode_codes"], 4)
    assert error(given["decoded"], exact) <= BOUND
    assert_decoded(model.decode_codes(given["decode_codes"]), state, given["decode_codes"], 4, exact)


def assert_same_networks(model: VQModel, state: plain_vq.State, size: int, batch: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    side = size // model.config.downsampling
    x = torch.from_numpy(rng.uniform(-1, 1, (batch, 3, size, size)).astype(np.float32))
    exact = {name: value.double() for name, value in state.items()}
    wanted = plain_vq.latent(exact, x.double())
    assert wanted.shape == (batch, model.config.code_dim, side, side)
    latent = model.latent(x)
    assert_latent(latent, state, x, wanted)
    found = model.indices(latent)
    assert found.dtype == torch.int64
    plain_vq.assert_nearest(state, found, latent, wanted)
    assert len(found.unique()) > min(4, side)
    tokens = torch.from_numpy(rng.integers(0, model.config.codebook_size, (batch, side * side)))
    assert_decoded(model.decode_codes(tokens), state, tokens, side, plain_vq.decode(exact, tokens, side))


@pytest.mark.parametrize("multipliers", [(1, 2), (1, 2, 1), (2,)])
def test_small_networks_against_plain_functions(multipliers: tuple[int, ...]) -> None:
    assert_same_networks(*ruled(replace(SMALL, multipliers=multipliers), 3), size=16, batch=3, seed=1)


def test_vq16_against_plain_functions(vq16: tuple[VQModel, plain_vq.State]) -> None:
    assert_same_networks(*vq16, size=64, batch=1, seed=2)


@pytest.mark.parametrize(("config", "size", "batch"), [
    pytest.param(VQ16, 256, 2, marks=pytest.mark.matrix), pytest.param(VQ8, 64, 2, marks=pytest.mark.matrix),
    pytest.param(VQ16, 384, 1, marks=pytest.mark.exhaustive), pytest.param(VQ8, 256, 1, marks=pytest.mark.exhaustive),
])  # fmt: skip
def test_full_networks_against_plain_functions(config: VQConfig, size: int, batch: int) -> None:
    assert_same_networks(*ruled(config, 17), size=size, batch=batch, seed=3)


def test_order_of_codes_is_raster() -> None:
    """Position (row, column) of the latent is entry row * width + column, and decodes to that place."""
    model, _ = ruled(SMALL, 5)
    codes = torch.nn.functional.normalize(model.quantize.embedding.weight, dim=-1)
    latent = codes[torch.arange(6)].T.reshape(1, 4, 2, 3) * torch.tensor([0.1, 1, 7])  # lengths do not matter
    assert model.indices(latent).tolist() == [[0, 1, 2, 3, 4, 5]]
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    tokens[1, 1 * 8 + 6] = 9
    with torch.no_grad():
        model.decoder = torch.nn.Identity()
        model.post_quant_conv = torch.nn.Identity()
        z = model.decode_codes(tokens)
    assert (z[0] != z[1]).any(0).nonzero().tolist() == [[1, 6]]
    torch.testing.assert_close(z[1, :, 1, 6], codes[9])


def test_equal_distances_take_the_lowest_code() -> None:
    model, _ = ruled(SMALL, 5)
    model.quantize.embedding.weight[40] = model.quantize.embedding.weight[7]
    model.quantize.embedding.weight[3] = 2 * model.quantize.embedding.weight[7]  # the same code at length 1
    latent = model.quantize.embedding.weight[[40, 7, 3, 50]].T.reshape(1, 4, 2, 2)
    assert model.indices(latent).tolist() == [[3, 3, 3, 50]]


@pytest.mark.parametrize("entries", [1, 64 * 5, 64 * 1000])
def test_distances_in_chunks(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = ruled(SMALL, 6)
    latent = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 4, 5, 7)).astype(np.float32))
    monkeypatch.setattr(vq_model, "DISTANCE_ENTRIES", entries)
    assert model.indices(latent).tolist() == plain_vq.indices(state, latent).tolist()


def test_distance_matrices_stay_below_256_mb() -> None:
    assert vq_model.DISTANCE_ENTRIES // 16384 * 16384 * 4 * 2 <= 256 * 2**20


def test_codes_are_compared_in_fp32() -> None:
    """A bf16 latent and autocast around: the codes are those of the same numbers in fp32."""
    model, state = ruled(replace(SMALL, codebook_size=4096, code_dim=8), 7)
    latent = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 8, 16, 16)).astype(np.float32)).bfloat16()
    wanted = plain_vq.indices(state, latent.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert model.indices(latent).tolist() == wanted.tolist()
    coarse = {key: value.bfloat16().float() for key, value in state.items()}
    assert plain_vq.indices(coarse, latent.float()).tolist() != wanted.tolist()  # what bf16 would have flipped


def test_downsampling() -> None:
    assert [config.downsampling for config in (VQ16, VQ8, SMALL)] == [16, 8, 2]
    assert VQ16.widths == [128, 128, 256, 256, 512]
