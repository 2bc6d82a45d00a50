"""Vision encoders: presets, one block's features, published weights, compilation."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mirai_ds.config import ConfigError, EncoderConfig, build
from mirai_ds.config.encoder_config import ENCODERS
from mirai_ds.foresight import EncoderTeacher
from mirai_ds.foresight import encoders as module
from mirai_ds.foresight.encoders import (
    encoder_plan,
    load_encoder,
    patch_features,
)

torch.set_num_threads(1)  # on small tensors two threads mostly wait for each other

CPU = torch.device("cpu")
TOKENS, LABELS = torch.zeros(1, 16, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
# name -> (timm's name, patch, width, tokens before the patches, layer)
PRESETS = {
    "dinov2-b": ("vit_base_patch14_dinov2", 14, 768, 1, None),
    "dinov2-l": ("vit_large_patch14_dinov2", 14, 1024, 1, None),
    "dinov3-b": ("vit_base_patch16_dinov3", 16, 768, 5, None),
    "mae-b": ("vit_base_patch16_224.mae", 16, 768, 1, 8),
    "mae-l": ("vit_large_patch16_224.mae", 16, 1024, 1, 16),
}


def make_encoder(name: str, **options: Any) -> nn.Module:
    """timm's model with every parameter random and of a size that shows: biases, tokens, scales."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05)
            else:
                parameter.copy_(parameter.sign().abs() + 0.1 * torch.randn_like(parameter))  # scales 1, biases 0
    return model.eval()


def random_images(side: int, count: int = 1) -> Tensor:
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalised(pixels: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]


def fails(call: Callable[[], object], field: str, *parts: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert caught.value.field == f"foresight.encoder.{field}"
    assert "\n" not in message
    assert len(message) < 500
    for part in parts:
        assert part in message, message


def meta(**fields: Any) -> EncoderConfig:
    return EncoderConfig(**{"name": "test_vit", "weights": "unread", **fields})


# --- presets -------------------------------------------------------------------------------------------------------


def test_presets_fill_what_is_left_out() -> None:
    assert set(ENCODERS) == set(PRESETS)
    for name, (timm_name, _, _, _, layer) in PRESETS.items():
        config = EncoderConfig(name=name)
        assert (config.timm_name, config.layer, config.final_norm) == (timm_name, layer, layer is None)
        assert (config.mean, config.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        again = EncoderConfig(**json.loads(config.model_dump_json()))
        assert again == config
    given = EncoderConfig(name="mae-b", layer=12, final_norm=True, mean=(0.5, 0.5, 0.5))
    assert (given.layer, given.final_norm, given.mean) == (12, True, (0.5, 0.5, 0.5))
    other = EncoderConfig(name="vit_small_patch16_224", layer=3)
    assert (other.timm_name, other.final_norm) == ("vit_small_patch16_224", False)


@pytest.mark.parametrize("grid", [16, 24])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_the_token_grid(name: str, grid: int) -> None:
    """Input sides and feature shapes, computed without memory: 224 and 336 for patch 14, 256 and 384 for 16."""
    _, patch, width, prefix, _ = PRESETS[name]
    config = EncoderConfig(name=name)
    model, size = encoder_plan(config, grid)
    assert size == {14: {16: 224, 24: 336}, 16: {16: 256, 24: 384}}[patch][grid]
    assert (model.num_prefix_tokens, model.num_features) == (prefix, width)
    features = patch_features(model.eval(), config, torch.empty(2, 3, size, size, device="meta"))
    assert features.shape == (2, grid * grid, width)


def by_hand(model: Any, x: Tensor, layer: int | None) -> Tensor:
    """Patch tokens of one block, run block by block with timm's parts; without `layer` timm's own whole forward."""
    if layer is None:
        return model.forward_features(x)[:, model.num_prefix_tokens :]
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    for block in model.blocks[:layer]:
        x = block(x)
    return x[:, model.num_prefix_tokens :]


def check_preset(name: str, grid: int, folder: Path) -> EncoderTeacher:
    """Random weights on timm's default grid, through EncoderConfig and through timm's own loader: the same features."""
    timm_name, patch, width, _, layer = PRESETS[name]
    path = folder / "weights.safetensors"
    save_file(make_encoder(timm_name).state_dict(), path)
    teacher = EncoderTeacher(EncoderConfig(name=name, weights=str(path)), grid, CPU)
    side = patch * grid
    reference = timm.create_model(
        timm_name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=0, img_size=side
    )
    path.unlink()
    images = random_images(side)
    with torch.no_grad():
        wanted = by_hand(reference.eval(), normalised(images), layer)
    found = teacher.features(TOKENS, LABELS, images)
    assert found.shape == (1, grid * grid, width)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert float((wanted[:, 1:] - wanted[:, :-1]).abs().mean()) > 0.1
    return teacher


MATRIX = [pytest.param(name, marks=pytest.mark.matrix) for name in ("dinov2-b", "mae-b")]


@pytest.mark.parametrize("name", ["dinov3-b", *MATRIX])
def test_presets_give_timms_features_in_their_place(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a 4x4 grid; an image that has the encoder's size is not resampled; patch (r, c) is image region (r, c)."""
    teacher = check_preset(name, 4, tmp_path)
    patch, pixels = PRESETS[name][1], random_images(PRESETS[name][1] * 4).repeat(17, 1, 1, 1)
    for row in range(4):
        for column in range(4):
            region = pixels[4 * row + column, :, patch * row : patch * (row + 1), patch * column : patch * (column + 1)]
            region.copy_(255 - region)
    monkeypatch.setattr(module, "F", None)  # so that a resize would fail
    found = teacher.features(TOKENS, LABELS, pixels)
    change = (found[:16] - found[16]).norm(dim=-1)
    assert change.argmax(1).tolist() == list(range(16))


def full_sizes() -> list[Any]:
    """Each preset on one of the grids, in turn; on the other only by hand (`make test-exhaustive`)."""
    return [
        pytest.param(name, grid, marks=pytest.mark.matrix if (i + j) % 2 == 0 else pytest.mark.exhaustive)
        for i, name in enumerate(PRESETS) for j, grid in enumerate([16, 24])
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "grid"), full_sizes())
def test_presets_at_full_size(name: str, grid: int, tmp_path: Path) -> None:
    check_preset(name, grid, tmp_path)


# --- one block's output --------------------------------------------------------------------------------------------


def teacher_of(path: Path, grid: int = 4, **fields: Any) -> EncoderTeacher:
    return EncoderTeacher(meta(weights=str(path), **fields), grid, CPU)


@pytest.mark.parametrize("layer", [1, 3, 6])
def test_features_of_a_block(saved: Path, layer: int) -> None:
    model, images = make_encoder("test_vit", img_size=64), random_images(64, 2)
    with torch.no_grad():
        raw = by_hand(model, normalised(images), layer)
        normed = model.norm(raw)
    for norm, wanted in ((None, raw), (False, raw), (True, normed)):
        teacher = teacher_of(saved, layer=layer, final_norm=norm)
        torch.testing.assert_close(teacher.features(TOKENS, LABELS, images), wanted, rtol=1e-5, atol=1e-5)
        assert len(teacher.encoder.blocks) == layer  # type: ignore[arg-type]
    assert float((raw - normed).abs().mean()) > 0.1
    last = teacher_of(saved, final_norm=False).features(TOKENS, LABELS, images)
    assert torch.allclose(last, raw, rtol=1e-5, atol=1e-5) == (layer == 6)


def products_on_a_gpu() -> str:
    """How fp32 matrices would be multiplied there."""
    matmul: Any = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "exact"
    return "exact" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@pytest.mark.parametrize(("dtype", "wanted"), [("fp32", "exact"), ("tf32", "tf32")])
def test_tf32_is_the_encoders_alone(saved: Path, dtype: str, wanted: str) -> None:
    """And on a CPU it changes nothing."""
    teacher, images, seen = teacher_of(saved, dtype=dtype), random_images(64), []
    teacher.encoder.patch_embed.register_forward_pre_hook(lambda *_: seen.append(products_on_a_gpu()))
    before = products_on_a_gpu()
    features = teacher.features(TOKENS, LABELS, images)
    assert (seen, products_on_a_gpu()) == ([wanted], before)
    assert features.dtype == torch.float32
    assert torch.equal(features, teacher_of(saved).features(TOKENS, LABELS, images))


def test_the_runs_precision_decides_the_encoders() -> None:
    given = {"foresight": {"method": "mirai-i"}, "data": {"source": "npz", "path": "x.npz"}}
    found = {
        precision: build({**given, "train": {"precision": precision}}).foresight.encoder.dtype  # type: ignore[union-attr]
        for precision in ("fp32", "bf16", "bf16-autocast")
    }
    assert found == {"fp32": "fp32", "bf16": "tf32", "bf16-autocast": "tf32"}
    given["foresight"]["encoder"] = {"dtype": "fp32"}  # type: ignore[assignment]
    assert build(given).foresight.encoder.dtype == "fp32"  # type: ignore[union-attr]


def test_later_blocks_are_not_run() -> None:
    model, seen = make_encoder("test_vit", img_size=64), []
    for i, block in enumerate(model.blocks):  # type: ignore[arg-type]
        block.register_forward_hook(lambda *_, i=i: seen.append(i + 1))
    patch_features(model, meta(layer=2), torch.zeros(1, 3, 64, 64))
    assert seen == [1, 2]


def test_wrong_layers_names_and_kinds(saved: Path) -> None:
    fails(lambda: teacher_of(saved, layer=7), "layer", "= 7", "at most 6, the blocks of test_vit")
    fails(lambda: encoder_plan(EncoderConfig(name="mae-b", layer=13), 16), "layer", "at most 12, the blocks of mae-b")
    fails(lambda: teacher_of(saved, name="dinov2-x"), "name", "no such model", "dinov2-b, dinov2-l, dinov3-b, mae-b")
    wrong = "vit_base_patch16_224.mea"
    fails(lambda: teacher_of(saved, name=wrong), "name", wrong, "no such weights", "'vit_base_patch16_224.mae'?")
    fails(lambda: teacher_of(saved, name="vit_tiny_r_s16_p8_224"), "name", "is a hybrid", "plain ViT")
    fails(lambda: load_encoder(EncoderConfig(name="mae-b"), 16), "weights", "give the file", "pretrained: true")


# --- published weights ---------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys, torch
from mirai_ds.config import ConfigError, EncoderConfig, build
from mirai_ds.foresight import EncoderTeacher
out = []
for name, grid in json.loads(sys.argv[1]):
    try:
        teacher = EncoderTeacher(EncoderConfig(name=name, pretrained=True), grid, torch.device("cpu"))
        out.append(teacher.features(None, None, torch.full((1, 3, 64, 64), 9, dtype=torch.uint8)).flatten().tolist())
    except ConfigError as error:
        out.append(str(error))
print(json.dumps(out))
"""


def cached(home: Path, repository: str, weights: dict[str, Tensor]) -> None:
    """A Hugging Face cache folder as its client leaves it behind."""
    folder, commit = home / "hub" / f"models--{repository.replace('/', '--')}", "0123456789abcdef" * 2 + "01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    save_file(weights, folder / "snapshots" / commit / "model.safetensors")


def test_published_weights_from_the_cache_and_without_one(saved: Path, tmp_path: Path) -> None:
    """In a process of its own: the client reads its variables when imported."""
    state = make_encoder("test_vit", img_size=64).state_dict()
    classifier = {"head.weight": torch.zeros(5, 64), "head.bias": torch.zeros(5)}
    cached(tmp_path, "timm/test_vit.r160_in1k", {**state, **classifier})
    cached(tmp_path, "timm/test_vit3.r160_in1k", state)
    wanted = [("test_vit", 4), ("test_vit.r160_in1k", 6), ("test_vit3", 4), ("test_vit2", 4)]
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(wanted)],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2], timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    same, resampled, unfit, absent = json.loads(done.stdout.splitlines()[-1])
    grey = torch.full((1, 3, 64, 64), 9, dtype=torch.uint8)
    for found, grid in ((same, 4), (resampled, 6)):
        features = teacher_of(saved, grid).features(TOKENS, LABELS, grey)
        torch.testing.assert_close(torch.tensor(found), features.flatten(), rtol=1e-5, atol=1e-5)
    assert unfit.startswith("foresight.encoder.pretrained = true: ")
    assert "encoder.name is test_vit3" in unfit
    assert absent.startswith("foresight.encoder.pretrained = true: timm/test_vit2.r160_in1k is not in the Hugging Face")
    for part in ("cannot be downloaded (OfflineModeIsEnabled", "set foresight.encoder.weights", "set HF_HOME"):
        assert part in absent
    assert "\n" not in absent


def test_without_a_connection_there_is_one_try(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub
    import huggingface_hub.utils
    from huggingface_hub.errors import LocalEntryNotFoundError

    tries = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            tries.append((url, timeout))
            raise OSError("no route\nto host")

    def download(repository: str, file: str, local_files_only: bool = False) -> str:
        assert local_files_only
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", Session)
    config = EncoderConfig(name="mae-b", pretrained=True)
    fails(lambda: load_encoder(config, 4), "pretrained", "timm/vit_base_patch16_224.mae", "OSError: no route)")
    assert [(url.endswith("vit_base_patch16_224.mae/resolve/main/model.safetensors"), t) for url, t in tries] == [
        (True, 10)
    ]


def test_unpublished_weights() -> None:
    config = EncoderConfig(name="vit_huge_patch14_gap_224.in1k_ijepa", pretrained=True)
    fails(lambda: load_encoder(config, 4), "pretrained", "no published weights", "set foresight.encoder.weights")


@pytest.mark.matrix
@pytest.mark.parametrize("fields", [{}, {"layer": 3, "block_causal": 4}])
def test_compiled_features_are_the_same(saved: Path, fields: dict[str, Any]) -> None:
    eager = teacher_of(saved, **fields)
    compiled = teacher_of(saved, compile=True, **fields)
    assert compiled._forward is not eager._forward
    for count in (2, 3):
        images = random_images(64, count)
        torch.testing.assert_close(
            compiled.features(TOKENS, LABELS, images), eager.features(TOKENS, LABELS, images), rtol=1e-4, atol=1e-4
        )
