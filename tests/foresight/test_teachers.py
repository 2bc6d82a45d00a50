"""Teachers: the averaged network's features are the network's, an encoder's are timm's; unfit files are errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from mirai_ds.config import ConfigError, EncoderConfig, ForesightConfig, ModelConfig
from mirai_ds.foresight import EmaTeacher, EncoderTeacher
from mirai_ds.model import GPT, initialise

torch.set_num_threads(1)  # on small tensors two threads mostly wait for each other

MODEL = ModelConfig(size="custom", dim=32, n_layer=5, n_head=2, vocab_size=40, num_classes=6, block_size=16)
CPU = torch.device("cpu")
TOKENS = torch.randint(40, (3, 16), generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([5, 0, 2])


@pytest.fixture(scope="module")
def gpt() -> GPT:
    model = GPT(MODEL)
    initialise(model, seed=3, std=0.3)
    return model


def ema_teacher(gpt: GPT, layer: int = 3, dtype: torch.dtype = torch.float32, **changes: Any) -> EmaTeacher:
    foresight = ForesightConfig(**{"method": "mirai-e", "layer": layer, **changes})
    foresight.fill_from_model(MODEL)
    teacher = EmaTeacher(MODEL, foresight, dtype, CPU, autocast=dtype != torch.float32)
    state = gpt.state_dict()
    teacher.load((name, state[name]) for name in sorted(teacher.names))
    return teacher


@pytest.mark.parametrize("layer", [1, 3, 5])
def test_ema_features_are_the_networks(gpt: GPT, layer: int) -> None:
    features = ema_teacher(gpt, layer).features(TOKENS, LABELS, None)
    wanted = gpt(TOKENS[:, :-1], LABELS, tap=(layer,)).hidden[layer]
    assert features.shape == (3, 16, 32)
    assert torch.equal(features, wanted.detach())


def test_ema_teacher_layer_may_differ_from_the_students(gpt: GPT) -> None:
    teacher = ema_teacher(gpt, layer=2, teacher_layer=4)
    assert torch.equal(teacher.features(TOKENS, LABELS, None), gpt(TOKENS[:, :-1], LABELS, tap=(4,)).hidden[4].detach())
    names = {name for name in gpt.state_dict() if name.startswith(("layers.0", "layers.1", "layers.2", "layers.3"))}
    assert teacher.names == names | {"cls_embedding.embedding_table.weight", "tok_embeddings.weight"}


def test_ema_teacher_may_see_the_last_token(gpt: GPT) -> None:
    seen = ema_teacher(gpt, teacher_sees_last_token=True).features(TOKENS, LABELS, None)
    not_seen = ema_teacher(gpt).features(TOKENS, LABELS, None)
    assert (seen.shape[1], not_seen.shape[1]) == (17, 16)
    torch.testing.assert_close(seen[:, :16], not_seen, rtol=1e-5, atol=1e-5)
    other = TOKENS.clone()
    other[:, -1] = (other[:, -1] + 1) % 40
    changed = ema_teacher(gpt, teacher_sees_last_token=True).features(other, LABELS, None)
    assert float((changed[:, 16] - seen[:, 16]).abs().max()) > 1e-3
    assert torch.equal(ema_teacher(gpt).features(other, LABELS, None), not_seen)


def test_ema_teacher_gives_no_gradient_and_never_drops(gpt: GPT) -> None:
    teacher = ema_teacher(gpt)
    assert not any(p.requires_grad for p in teacher.trunk.parameters())
    first = teacher.features(TOKENS, LABELS, None)
    assert not first.requires_grad
    assert torch.equal(teacher.features(TOKENS, LABELS, None), first)
    alone = torch.cat([teacher.features(TOKENS[i : i + 1], LABELS[i : i + 1], None) for i in range(3)])
    torch.testing.assert_close(alone, first, rtol=1e-5, atol=1e-5)  # each image with its own true label
    dropped = gpt(TOKENS[:, :-1], LABELS, torch.arange(3), tap=(3,)).hidden[3].detach()
    assert float((dropped - first).abs().max()) > 0.1


def test_ema_teacher_owns_its_weights(gpt: GPT) -> None:
    teacher = ema_teacher(gpt)
    before = teacher.features(TOKENS, LABELS, None)
    trained = GPT(MODEL)
    trained.load_state_dict(gpt.state_dict())
    teacher = ema_teacher(trained)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1.0)
    assert torch.equal(teacher.features(TOKENS, LABELS, None), before)


def test_ema_teacher_needs_every_tensor(gpt: GPT) -> None:
    teacher, state = ema_teacher(gpt), gpt.state_dict()
    names = sorted(teacher.names)
    with pytest.raises(KeyError, match=r"tok_embeddings.weight.*1 tensors"):
        teacher.load((name, state[name]) for name in names if name != "tok_embeddings.weight")
    with pytest.raises(KeyError, match=r"output\.weight"):
        teacher.load((name, state[name]) for name in [*names, "output.weight"])


def test_low_precision_copy_keeps_exact_positions(gpt: GPT) -> None:
    teacher = ema_teacher(gpt, dtype=torch.bfloat16)
    assert {p.dtype for p in teacher.trunk.parameters()} == {torch.bfloat16}
    assert teacher.trunk.rope.dtype == torch.float32
    assert torch.equal(teacher.trunk.rope, gpt.rope)
    exact = ema_teacher(gpt).features(TOKENS, LABELS, None)
    distance = float((teacher.features(TOKENS, LABELS, None).float() - exact).norm() / exact.norm())
    assert 1e-4 < distance < 0.03


# --- vision encoders -----------------------------------------------------------------------------------------------

GRID, NAME = 4, "test_vit"


def make_encoder(name: str = NAME, size: int = 64, seed: int = 0, **options: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    model: torch.nn.Module = timm.create_model(name, pretrained=False, img_size=size, **options)
    with torch.no_grad():
        for parameter in model.parameters():  # timm's biases and tables start at zero, which would hide mistakes
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def images(side: int = 64, count: int = 2) -> Tensor:
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalised(pixels: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]


def teacher_of(path: Path, grid: int = GRID, **fields: Any) -> EncoderTeacher:
    return EncoderTeacher(EncoderConfig(**{"name": NAME, "weights": str(path), **fields}), grid, CPU)


@pytest.mark.parametrize("layout", ["file.safetensors", "bare.pth", "model.pth", "state_dict.bin"])
def test_encoder_features_are_timms(layout: str, tmp_path: Path) -> None:
    """Weights with a classifier, as published; random ones, saved here."""
    encoder = make_encoder(num_classes=10)
    path, state = tmp_path / layout, encoder.state_dict()
    wrapper = path.stem
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state if wrapper == "bare" else {wrapper: state, "epoch": 3}, path)
    teacher = teacher_of(path)
    found = teacher.features(TOKENS, LABELS, images())
    with torch.no_grad():
        wanted = encoder.forward_features(normalised(images()))[:, 1:]  # type: ignore[operator]
    assert (teacher.feature_dim, found.shape) == (64, (2, 16, 64))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert float((wanted[:, 1:] - wanted[:, :-1]).abs().mean()) > 0.01
    assert not found.requires_grad
    assert not any(p.requires_grad for p in teacher.encoder.parameters())


def test_register_tokens_are_dropped_too(tmp_path: Path) -> None:
    encoder = make_encoder("test_vit4", num_classes=0)
    assert encoder.num_prefix_tokens > 0
    save_file(encoder.state_dict(), tmp_path / "w.safetensors")
    found = teacher_of(tmp_path / "w.safetensors", name="test_vit4").features(TOKENS, LABELS, images())
    with torch.no_grad():
        wanted = encoder.forward_features(normalised(images()))[:, encoder.num_prefix_tokens :]  # type: ignore
    assert found.shape == (2, 16, 96)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "weights.safetensors"
    save_file(make_encoder(num_classes=0).state_dict(), path)
    return path


def test_patch_r_c_sees_image_region_r_c(saved: Path) -> None:
    """One image a region, inverted there and nowhere else: that region's feature changes most."""
    teacher, pixels = teacher_of(saved), images(count=1).repeat(17, 1, 1, 1)
    for row in range(GRID):
        for column in range(GRID):
            region = pixels[GRID * row + column, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            region.copy_(255 - region)
    found = teacher.features(TOKENS, LABELS, pixels)
    change = (found[:16] - found[16]).norm(dim=-1)
    assert change.argmax(1).tolist() == list(range(16))


def test_images_are_normalised_then_resized(saved: Path) -> None:
    """REPA's order; bicubic without antialias, which shows."""
    teacher, pixels = teacher_of(saved), images(96)
    resized = F.interpolate(normalised(pixels), (64, 64), mode="bicubic", align_corners=False, antialias=False)
    smooth = F.interpolate(normalised(pixels), (64, 64), mode="bicubic", align_corners=False, antialias=True)
    found = teacher.features(TOKENS, LABELS, pixels)
    with torch.no_grad():
        wanted, other = (teacher.encoder.forward_features(x)[:, 1:] for x in (resized, smooth))  # type: ignore
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert float((other - found).abs().max()) > 0.01


def test_other_mean_and_std(saved: Path) -> None:
    teacher = teacher_of(saved, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with torch.no_grad():
        wanted = teacher.encoder.forward_features(images().float() / 127.5 - 1)[:, 1:]  # type: ignore[operator]
    torch.testing.assert_close(teacher.features(TOKENS, LABELS, images()), wanted, rtol=1e-4, atol=1e-4)


def test_position_table_follows_the_grid(saved: Path) -> None:
    """Weights of a 4x4 table on another grid: timm resamples them."""
    teacher = teacher_of(saved, grid=6)
    assert teacher.image_size == 96
    assert teacher.features(TOKENS, LABELS, images(96)).shape == (2, 36, 64)
    table = teacher.encoder.state_dict()["pos_embed"]
    original = make_encoder(num_classes=0).state_dict()["pos_embed"]
    assert (table.shape[1], original.shape[1]) == (37, 17)
    torch.testing.assert_close(table[:, 0], original[:, 0])  # the class token's stays


def test_bf16_encoder(saved: Path) -> None:
    exact = teacher_of(saved).features(TOKENS, LABELS, images())
    low = teacher_of(saved, dtype="bf16").features(TOKENS, LABELS, images())
    assert low.dtype == torch.bfloat16
    assert 1e-4 < float((low.float() - exact).norm() / exact.norm()) < 0.05


def fails(call: Callable[[], object], field: str, *parts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert caught.value.field == field
    assert "\n" not in message
    for part in parts:
        assert part in message, message


WEIGHTS, ENCODER = "foresight.encoder.weights", "foresight.encoder.name"


def test_images_are_needed(saved: Path) -> None:
    fails(lambda: teacher_of(saved).features(TOKENS, LABELS, None), "foresight.method", "no images")


def test_wrong_names_files_and_grids(saved: Path, tmp_path: Path) -> None:
    fails(lambda: teacher_of(tmp_path / "none.pth"), WEIGHTS, "no such file")
    fails(lambda: EncoderTeacher(EncoderConfig(name=NAME), GRID, CPU), WEIGHTS, "give the file")
    fails(lambda: teacher_of(saved, name="vit_enormous"), ENCODER, "vit_enormous", "no such model")
    fails(lambda: teacher_of(saved, name="test_resnet"), ENCODER, "not a patch-based vision transformer")
    fails(lambda: teacher_of(saved, image_size=80), "foresight.encoder.image_size", "patch 16 on a 4x4 grid needs 64")


def test_files_that_are_no_weights(saved: Path, tmp_path: Path) -> None:
    content = saved.read_bytes()
    torch.save(make_encoder().state_dict(), tmp_path / "whole.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, data in {
        "cut.safetensors": content[: len(content) // 2], "empty.safetensors": b"", "text.pth": b"hello\nworld",
        "cut.pth": (tmp_path / "whole.pth").read_bytes()[:2000], "list.pth": (tmp_path / "list.pth").read_bytes(),
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
        fails(lambda name=name: teacher_of(tmp_path / name), WEIGHTS, "cannot be read as weights")


def test_weights_of_another_encoder(saved: Path, tmp_path: Path) -> None:
    path, state = tmp_path / "w.safetensors", make_encoder(num_classes=0).state_dict()

    def refused(changed: dict[str, Tensor], *parts: str) -> None:
        save_file({name: value.contiguous() for name, value in changed.items()}, path)
        fails(lambda: teacher_of(path), WEIGHTS, *parts, NAME)

    without = {name: value for name, value in state.items() if name != "blocks.2.attn.qkv.weight"}
    refused(without, "lacks 1 of", "blocks.2.attn.qkv.weight")
    refused({}, "lacks")
    # A relative's layer scales must not be dropped in silence: features would be wrong.
    refused({**state, "blocks.0.ls1.gamma": torch.ones(64)}, "holds 1 tensors", "blocks.0.ls1.gamma")
    refused({**state, "norm.weight": torch.ones(65)}, "of other shapes", "norm.weight (65,), not (64,)")
    kernel = F.interpolate(state["patch_embed.proj.weight"], (14, 14))
    refused({**state, "patch_embed.proj.weight": kernel}, "patch 14, not 16")
    refused({**state, "pos_embed": torch.zeros(1, 17, 48)}, "of other shapes", "pos_embed")
    refused(make_encoder("test_vit3", num_classes=0).state_dict(), WEIGHTS)
    refused({**state, "norm.bias": torch.full((64,), torch.nan)}, "NaN or infinity in 1 of", "norm.bias")
    save_file({**state, "head.weight": torch.zeros(10, 64), "fc_norm.weight": torch.zeros(64)}, path)
    teacher_of(path)  # a classifier is no part of the features


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "module.backbone.", "teacher._orig_mod."])
def test_wrappers_of_the_encoder_are_taken_off(prefix: str, tmp_path: Path) -> None:
    """With what else the program held; two wrapped encoders leave the choice to the user."""
    path, plain = tmp_path / "w.safetensors", tmp_path / "plain.safetensors"
    state = make_encoder(num_classes=0).state_dict()
    save_file(state, plain)
    wrapped = {prefix + name: value for name, value in state.items()}
    save_file({**wrapped, "dino_head.mlp.0.weight": torch.zeros(3, 3)}, path)
    images = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    wanted = teacher_of(plain).features(TOKENS, LABELS, images)
    assert torch.equal(teacher_of(path).features(TOKENS, LABELS, images), wanted)
    save_file({**wrapped, **{f"student.{name}": value.clone() for name, value in state.items()}}, path)
    fails(lambda: teacher_of(path), WEIGHTS, "holds 2 networks", "student.", prefix, "save the one to be used")


@pytest.mark.parametrize("prefix", ["", "vit.", "dinov2."])
def test_transformers_names_are_told_with_the_file_to_take(prefix: str, tmp_path: Path) -> None:
    names = ("embeddings.patch_embeddings.projection.weight", "encoder.layer.0.attention.attention.query.weight")
    save_file({prefix + name: torch.zeros(2, 2) for name in names}, tmp_path / "w.safetensors")
    said = f"has the names of Hugging Face's transformers (e.g. {prefix}{names[0]}), not timm's"
    better = "take model.safetensors of timm/test_vit.r160_in1k"
    fails(lambda: teacher_of(tmp_path / "w.safetensors"), WEIGHTS, said, better)
