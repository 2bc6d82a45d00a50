"""The VQ tokenizer's files load or are refused with a reason; pixels become codes and pixels again as in LlamaGen."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mirai_ds.tokenizer import VQ8, VQ16, VQConfig, VQTokenizer, open_tokenizer, vq
from mirai_ds.tokenizer.vq import infer_config, weights_digest
from tests.model import plain_gpt as plain
from tests.one_line import one_line
from tests.tokenizer import plain_vq
from tests.tokenizer.test_vq_model import SMALL, shapes_of

torch.set_num_threads(1)  # on small tensors two threads mostly wait for each other

ARGS = argparse.Namespace(vq_model="VQ-16", codebook_size=16384, cloud_save_path=None, ema=True)
STATISTIC = "quantize.codebook_used"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return plain.ruled(shapes_of(SMALL), 11)


@pytest.fixture(scope="module")
def tokenizer(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> VQTokenizer:
    path = tmp_path_factory.mktemp("vq") / "vq.pt"
    torch.save({"model": weights}, path)
    return VQTokenizer.load(path)


def images(batch: int, size: int = 16, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (batch, size, size, 3), dtype=np.uint8))


# --- files ---------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Any, Any], Any]] = {
    "released": lambda w, e: {"model": w},
    "training": lambda w, e: {
        "model": w, "optimizer": {"state": {0: {"step": 3}}}, "discriminator": {"x": torch.zeros(2)}, "steps": 7,
        "args": ARGS,
    },
    "ema beside": lambda w, e: {"ema": e, "model": w, "args": ARGS},
    "state_dict": lambda w, e: {"state_dict": w, "epoch": 3},
    "bare": lambda w, e: w,
}  # fmt: skip


@pytest.mark.parametrize("layout", [*LAYOUTS, "safetensors", "old format", "no statistic"])
def test_layouts(layout: str, weights: dict[str, Tensor], tokenizer: VQTokenizer, tmp_path: Path) -> None:
    path = tmp_path / ("vq.safetensors" if layout == "safetensors" else "vq.pt")
    if layout == "safetensors":
        save_file(weights, path)
    elif layout == "no statistic":
        torch.save({key: value for key, value in weights.items() if key != STATISTIC}, path)
    else:
        averaged = {key: value + 1 for key, value in weights.items()}
        data = LAYOUTS.get(layout, LAYOUTS["released"])(weights, averaged)
        torch.save(data, path, _use_new_zipfile_serialization=layout != "old format")
    found = open_tokenizer(path)
    assert isinstance(found, VQTokenizer)
    state = found.model.state_dict()
    assert state.keys() == weights.keys()
    for key, value in weights.items():
        wanted = torch.zeros(65536) if layout == "no statistic" and key == STATISTIC else value
        assert torch.equal(state[key], wanted), key
    assert found.digest == tokenizer.digest
    assert found.encode(images(2)).tolist() == tokenizer.encode(images(2)).tolist()


def test_what_a_tokenizer_says_of_itself(tokenizer: VQTokenizer) -> None:
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.downsampling, tokenizer.channels) == ("VQ-2", 64, 2, 3)
    assert [tokenizer.grid(size) for size in (2, 16, 384)] == [1, 8, 192]
    for size in (0, -2, 1, 15):
        one_line(lambda size=size: tokenizer.grid(size), f"image size {size}", "multiple of 2")
    assert VQTokenizer.random(replace(VQ16, channels=32)).grid(384) == 24
    assert not any(p.requires_grad for p in tokenizer.model.parameters())


def test_digest(weights: dict[str, Tensor]) -> None:
    """Of names, dtypes, shapes and values; the statistic and the order of the file do not matter."""
    digest = weights_digest(weights)
    assert len(digest) == 64
    assert weights_digest(dict(reversed(weights.items()))) == digest
    assert weights_digest({**weights, STATISTIC: torch.ones(3)}) == digest
    key = "decoder.mid.1.k.weight"
    changed = weights[key].clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], torch.tensor(9.0))
    others = [
        {**weights, key: changed}, {**weights, key: weights[key].half()}, {**weights, key: weights[key][..., 0, 0]},
        {"x" if name == key else name: value for name, value in weights.items()},
    ]  # fmt: skip
    assert len({weights_digest(other) for other in others} | {digest}) == 5
    turned = weights[key].transpose(0, 1)
    assert weights_digest({**weights, key: turned}) == weights_digest({**weights, key: turned.contiguous()})


@pytest.mark.parametrize(
    "config",
    [VQ16, VQ8, SMALL, VQConfig(64, (1, 3, 2), 96, 100, 5, 3, 1), replace(SMALL, multipliers=(2,)),
     replace(VQ16, codebook_size=4096), replace(VQ16, code_dim=16, decoder_blocks=4)],
)  # fmt: skip
def test_sizes_are_those_of_the_tensors(config: VQConfig) -> None:
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes_of(config).items()}
    assert infer_config(state, Path("x")) == config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_computed_with_in_fp32(dtype: torch.dtype, weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({key: value.to(dtype) for key, value in weights.items()}, tmp_path / "vq.pt")
    state = VQTokenizer.load(tmp_path / "vq.pt").model.state_dict()
    for key, value in weights.items():
        assert state[key].dtype == torch.float32
        assert torch.equal(state[key], value.to(dtype).float())


@pytest.mark.parametrize("start", [0, *(pytest.param(start, marks=pytest.mark.matrix) for start in (1, 2, 3))])
def test_missing_and_bent_tensors_are_named(start: int, weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "vq.pt"
    codebook = "quantize.embedding.weight"
    for key in list(weights)[start::4]:
        if key != STATISTIC:
            torch.save({name: value for name, value in weights.items() if name != key}, path)
            one_line(lambda: VQTokenizer.load(path), str(path), key)
        if key != codebook:
            torch.save({**weights, key: weights[key][:-1]}, path)
            one_line(lambda: VQTokenizer.load(path), str(path))
    torch.save({**weights, codebook: weights[codebook][:-1]}, path)
    assert VQTokenizer.load(path).vocab_size == 63  # the number of codes is the table's
    torch.save({**weights, "decoder.norm_out.bias": torch.zeros(31), "post_quant_conv.weight": torch.zeros(1)}, path)
    one_line(
        lambda: VQTokenizer.load(path), "2 misshaped (first: decoder.norm_out.bias is (31,), needed (32,))", "VQ-2"
    )


MISTAKES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], tuple[str, ...]]] = {
    "extra": (lambda w: {**w, "loss.x": torch.zeros(1), "z": torch.zeros(1)}, ("2 unexpected (first: 'loss.x')",)),
    "all at once": (
        lambda w: {**{k: v for k, v in w.items() if ".mid." not in k}, "x": torch.zeros(1)},
        ("52 of 156 tensors missing (first: encoder.mid.0.norm1.weight)", "1 unexpected (first: 'x')"),
    ),
    "nan": (lambda w: {**w, "quant_conv.bias": torch.full((4,), torch.nan)}, ("quant_conv.bias", "not finite")),
    "infinite": (lambda w: {**w, "decoder.mid.0.conv1.bias": torch.full((64,), torch.inf)}, ("not finite",)),
    "integers": (lambda w: {**w, "quant_conv.bias": torch.zeros(4, dtype=torch.int64)}, ("quant_conv.bias", "int64")),
    "prefix": (lambda w: {f"module.{k}": v for k, v in w.items()}, ("encoder.conv_in.weight", "prefix 'module.'")),
    "a GPT": (lambda w: {"model": {"tok_embeddings.weight": torch.zeros(4, 4)}}, ("tok_embeddings.weight",)),
    "no tensors": (lambda w: {"model": {"a": 3}, "steps": 3}, ("'a' is int", "'model', 'steps'")),
    "settings": (lambda w: {"steps": 3, "args": ARGS}, ("'steps' is int",)),
    "empty": (lambda w: {}, ("holds {}, not a state dict",)),
    "empty inside": (lambda w: {"model": {}}, ("holds {} in 'model', not a state dict",)),
    "a list inside": (lambda w: {"model": [1]}, ("holds [1] in 'model', not a state dict",)),
    "list": (lambda w: [w], ("holds a list",)),
    "no level": (lambda w: {k: v for k, v in w.items() if "conv_blocks" not in k}, ("has 0 levels",)),
    "a far level": (lambda w: {**w, "encoder.conv_blocks.999.x": torch.zeros(1)}, ("has 1000 levels",)),
    "a far block": (lambda w: {**w, "encoder.conv_blocks.0.res.900.x": torch.zeros(1)}, ("901 and 2 blocks",)),
    "odd width": (lambda w: {**w, "encoder.conv_in.weight": torch.zeros(24, 3, 3, 3)}, ("[32, 64] channels over 24",)),
    "no codes": (lambda w: {**w, "quantize.embedding.weight": torch.zeros(0, 4)}, ("0 codes of 4",)),
    "flat": (lambda w: {**w, "quantize.embedding.weight": torch.zeros(9)}, ("quantize.embedding.weight is (9,)",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_files_that_do_not_fit(mistake: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    change, parts = MISTAKES[mistake]
    torch.save(change(weights), tmp_path / "vq.pt")
    one_line(lambda: open_tokenizer(tmp_path / "vq.pt"), str(tmp_path / "vq.pt"), *parts)


class Bomb:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


def test_files_that_are_no_weights(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "vq.pt"
    one_line(lambda: open_tokenizer(path), str(path), "no such file")
    one_line(lambda: open_tokenizer(tmp_path), "is a folder")
    torch.save({"model": weights, "x": Bomb(tmp_path / "executed")}, path)
    one_line(lambda: open_tokenizer(path), str(path), "refused")
    assert not (tmp_path / "executed").exists()
    torch.save({"model": weights}, path)
    content = path.read_bytes()
    for name in ("cut.pt", "cut.safetensors"):
        (tmp_path / name).write_bytes(content[:-500])
        one_line(lambda name=name: open_tokenizer(tmp_path / name), name, "is not a readable")


def test_places_that_are_not_there(tokenizer: VQTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "vq.pt"
    one_line(lambda: VQTokenizer.load(path, "gpu"), "device = 'gpu'", "use cpu or cuda")
    one_line(lambda: VQTokenizer.load(path, "cpu", "fp16"), "precision = 'fp16'", "fp32, tf32, bf16")
    if not torch.cuda.is_available():
        one_line(lambda: VQTokenizer.load(path, "cuda"), "device = 'cuda'", "use cpu")


# --- pixels and codes ----------------------------------------------------------------------------------------------


@pytest.fixture
def seen(tokenizer: VQTokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """What the encoder is given."""
    given: list[Tensor] = []
    latent = tokenizer.model.latent
    monkeypatch.setattr(tokenizer.model, "latent", lambda x: (given.append(x.clone()), latent(x))[1])
    return given


def test_all_256_levels_exactly(tokenizer: VQTokenizer, seen: list[Tensor]) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    pixels[..., 1] = pixels[..., 1].flip(1)
    tokenizer.encode(pixels)
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    wanted = ((levels - np.float32(0.5)) / np.float32(0.5)).reshape(16, 16)
    (x,) = seen
    assert (x.dtype, tuple(x.shape)) == (torch.float32, (1, 3, 16, 16))
    for channel, value in enumerate((wanted, wanted[::-1], wanted)):
        assert np.array_equal(x[0, channel].numpy(), value)
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)


def test_encode_is_the_networks(tokenizer: VQTokenizer, weights: dict[str, Tensor]) -> None:
    pixels = images(5)
    found = tokenizer.encode(pixels)
    x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    assert (found.dtype, tuple(found.shape), found.device.type) == (torch.int64, (5, 64), "cpu")
    plain_vq.assert_nearest(weights, found, tokenizer.model.latent(x), plain_vq.latent(weights, x))
    assert tokenizer.encode(pixels[:0]).shape == (0, 64)


def test_codes_do_not_depend_on_the_batch(tokenizer: VQTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = images(7, seed=1)
    whole = tokenizer.encode(pixels)
    assert torch.cat([tokenizer.encode(image[None]) for image in pixels]).tolist() == whole.tolist()
    assert tokenizer.encode(pixels.flip(0)).flip(0).tolist() == whole.tolist()
    shown = tokenizer.decode(whole)
    for images_a_pass in (1, 2, 3):
        monkeypatch.setattr(tokenizer, "_images_a_pass", lambda size, n=images_a_pass: n)
        assert tokenizer.encode(pixels).tolist() == whole.tolist()
        assert np.abs(tokenizer.decode(whole).astype(int) - shown).max() <= 1  # a rounding may cross a grey level


def test_images_a_pass() -> None:
    """Memory is bounded whatever the batch; at least one image goes through."""
    assert [VQTokenizer.random(replace(VQ16, channels=32))._images_a_pass(size) for size in (256, 512, 4096)] == [
        16,
        4,
        1,
    ]


def test_decode_is_the_networks(tokenizer: VQTokenizer, weights: dict[str, Tensor]) -> None:
    tokens = torch.from_numpy(np.random.default_rng(2).integers(0, 64, (3, 64)))
    found = tokenizer.decode(tokens)
    assert (found.dtype, found.shape) == (np.uint8, (3, 16, 16, 3))
    x = plain_vq.decode(weights, tokens, 8).permute(0, 2, 3, 1).double().numpy()
    exact = np.clip(127.5 * x + 128, 0, 255)
    assert (np.abs(found + 0.5 - exact) <= 0.501).all()  # the level below, but for a rounding at its edge
    assert (found == np.trunc(exact)).mean() > 0.999
    assert tokenizer.decode(tokens[:0]).shape == (0, 16, 16, 3)


def test_decoded_values_are_clamped_and_truncated(tokenizer: VQTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([-50.0, -1.004, -1, -0.9961, -0.996, 0, 0.99607, 0.9961, 1, 1.5, 1e9, 0.5])
    monkeypatch.setattr(tokenizer.model, "decode_codes", lambda tokens: values.reshape(1, 3, 2, 2))
    found = tokenizer.decode(torch.zeros(1, 1, dtype=torch.int64))
    assert found.transpose(0, 3, 1, 2).flatten().tolist() == [0, 0, 0, 0, 1, 128, 254, 255, 255, 255, 255, 191]


def test_inputs_that_do_not_fit(tokenizer: VQTokenizer) -> None:
    for bad in (images(1).float(), images(1)[0], images(1)[..., :1], images(1)[:, :8], images(1)[..., :2]):
        one_line(lambda bad=bad: tokenizer.encode(bad), "uint8 (B, H, W, 3)", str(tuple(bad.shape)))
    one_line(lambda: tokenizer.encode(images(1, 15)), "image size 15", "multiple of 2")
    for bad in (torch.zeros(2, 3).long(), torch.zeros(4).long(), torch.zeros(1, 4), torch.zeros(1, 0).long()):
        one_line(lambda bad=bad: tokenizer.decode(bad), "square grids", str(tuple(bad.shape)))
    for code in (-1, 64):
        one_line(lambda code=code: tokenizer.decode(torch.tensor([[0, 3, code, 1]])), f"{code}", "0..63")


# --- precision -----------------------------------------------------------------------------------------------------


BACK: Any = torch.backends
HOLDERS = (
    [BACK.cuda.matmul, BACK.cudnn.conv, BACK.mkldnn.matmul, BACK.mkldnn.conv] if hasattr(BACK.cudnn, "conv") else []
)


def flags() -> tuple[str, ...]:
    return tuple(holder.fp32_precision for holder in HOLDERS)


@pytest.fixture(params=["default", "legacy", "per operation", "everywhere"])
def surroundings(request: pytest.FixtureRequest) -> Iterator[tuple[str, ...]]:
    """What a program may have set before."""
    if not HOLDERS:
        pytest.skip("this torch has one switch only")
    before = flags()
    if request.param == "legacy":
        torch.set_float32_matmul_precision("high")
        BACK.cudnn.allow_tf32 = False
    if request.param == "per operation":
        BACK.cuda.matmul.fp32_precision, BACK.cudnn.conv.fp32_precision = "tf32", "ieee"
    if request.param == "everywhere":
        BACK.fp32_precision = "tf32"
    yield flags()
    BACK.fp32_precision = "none"
    if request.param == "legacy":
        torch.set_float32_matmul_precision("highest")
        BACK.cudnn.allow_tf32 = True
    for holder, value in zip(HOLDERS, before, strict=True):
        holder.fp32_precision = value


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_precision_holds_inside_only(
    precision: str, tokenizer: VQTokenizer, surroundings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "precision", precision)
    seen: dict[str, list[Any]] = {}
    rights = {name: getattr(tokenizer.model, name) for name in ("latent", "indices", "decode_codes")}
    for name in rights:

        def spy(x: Tensor, name: str = name, right: Any = rights[name]) -> Tensor:
            seen.setdefault(name, []).append((flags(), torch.is_autocast_enabled("cpu")))
            return right(x)

        monkeypatch.setattr(tokenizer.model, name, spy)
    tokenizer.decode(tokenizer.encode(images(1)))
    exact = ("ieee", "ieee", "ieee", "ieee")
    fast = ("tf32", "tf32", "ieee", "ieee")
    networks = (fast if precision == "tf32" else exact, precision == "bf16")
    assert seen == {"latent": [networks], "indices": [(exact, False)], "decode_codes": [networks]}
    assert flags() == surroundings

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(tokenizer.model, "latent", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        tokenizer.encode(images(1))
    assert flags() == surroundings
    assert not torch.is_autocast_enabled("cpu")


def test_old_switches_are_restored_too(tokenizer: VQTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both switches agree again afterwards: reading the old one would raise if they did not."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    for precision in ("fp32", "tf32", "bf16"):
        monkeypatch.setattr(tokenizer, "precision", precision)
        tokenizer.encode(images(1))
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_bf16_networks_are_near_and_different(tokenizer: VQTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    latents: list[Tensor] = []
    indices = tokenizer.model.indices
    monkeypatch.setattr(tokenizer.model, "indices", lambda z: (latents.append(z.float()), indices(z))[1])
    codes = []
    for precision in ("fp32", "bf16"):
        monkeypatch.setattr(tokenizer, "precision", precision)
        codes.append(tokenizer.encode(images(4)))
    off = float((latents[1] - latents[0]).norm() / latents[0].norm())
    assert 1e-4 < off < 3e-2  # bf16 keeps 8 bits
    assert float((codes[0] == codes[1]).float().mean()) > 0.8
    assert vq.PRECISIONS == ("fp32", "tf32", "bf16")


def test_random_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    first = VQTokenizer.random(SMALL, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.digest == VQTokenizer.random(SMALL, seed=1).digest != VQTokenizer.random(SMALL, seed=2).digest
    assert first.name == "VQ-2"
    assert len(first.encode(images(1)).unique()) > 1
