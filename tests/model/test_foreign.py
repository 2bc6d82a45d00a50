"""Foreign weight files: every layout LlamaGen writes, nothing executed, nothing half fitting accepted."""

from __future__ import annotations

import argparse
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mirai_ds.checkpoint.gpt_file import read_gpt_file
from mirai_ds.checkpoint.llamagen import check_gpt_weights, check_heads, infer_model_config, write_llamagen
from mirai_ds.config import ConfigError, ModelConfig
from mirai_ds.model import GPT
from mirai_ds.runtime.weight_files import read_torch_file
from tests.model import plain_gpt as plain
from tests.model import plain_par
from tests.one_line import one_line

SETTINGS: dict[str, Any] = plain.TINY
CONFIG = ModelConfig(size="custom", **SETTINGS)
NAMESPACE = argparse.Namespace(gpt_model="GPT-B", lr=1e-4, ema=True, betas=(0.9, 0.95), code_path=None)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return plain.ruled(plain.shapes(SETTINGS, 256), seed=1)


@pytest.fixture(scope="module")
def averaged() -> dict[str, Tensor]:
    return plain.ruled(plain.shapes(SETTINGS, 256), seed=2)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


LAYOUTS: dict[str, Callable[[Any, Any], Any]] = {
    "ddp": lambda w, e: {"model": w, "optimizer": {"state": {0: {"step": 3}}}, "steps": 5, "args": NAMESPACE},
    "ddp with ema": lambda w, e: {"model": w, "ema": e, "optimizer": {}, "steps": 5, "args": NAMESPACE},
    "mirai": lambda w, e: {
        "model": w, "ema": e, "optimizer": {}, "scaler": {"scale": 1.0}, "steps": 9, "epoch": 2,
        "rng_state": torch.get_rng_state(), "args": NAMESPACE,
    },
    "deepspeed": lambda w, e: {"module": w, "global_steps": 3, "param_shapes": [OrderedDict(a=torch.Size([1]))]},
    "state_dict": lambda w, e: {"state_dict": OrderedDict(w), "epoch": 1},
    "bare": lambda w, e: OrderedDict(w),
    "parameters": lambda w, e: {k: torch.nn.Parameter(v) for k, v in w.items()},
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, suffix: str, tmp_path: Path, weights: Any, averaged: Any) -> None:
    path = tmp_path / f"file{suffix}"
    torch.save(LAYOUTS[layout](weights, averaged), path)
    found = read_gpt_file(path).weights
    assert_same(found, weights)
    assert not any(value.requires_grad for value in found.values())
    check_gpt_weights(found, CONFIG, path)
    if layout in ("ddp with ema", "mirai"):
        assert_same(read_gpt_file(path, "ema").weights, averaged)
    else:
        one_line(lambda: read_gpt_file(path, "ema"), str(path), "no 'ema'", "only 'raw'")


def test_zip_less_files_of_old_torch(tmp_path: Path, weights: Any) -> None:
    torch.save({"model": weights, "args": NAMESPACE}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(read_gpt_file(tmp_path / "old.pt").weights, weights)


def test_safetensors(tmp_path: Path, weights: Any) -> None:
    path = tmp_path / "file.safetensors"
    save_file({**weights, "freqs_cis": torch.zeros(3)}, path)
    found = read_gpt_file(path).weights
    assert sorted(found) == sorted(weights)
    assert all(torch.equal(found[key], weights[key]) for key in weights)
    one_line(lambda: read_gpt_file(path, "ema").weights, "no 'ema'")
    path.write_bytes(path.read_bytes()[:-100])
    one_line(lambda: read_gpt_file(path).weights, str(path), "not a readable .safetensors")


def test_only_freqs_cis_is_dropped(tmp_path: Path, weights: Any) -> None:
    heads = plain.ruled(plain.head_shapes(0, 64, 8, 64), seed=3)
    extra = {"freqs_cis": torch.zeros(17, 8, 2), "something.else": torch.ones(2)}
    torch.save({"model": {**weights, **extra, **heads}}, tmp_path / "file.pt")
    found = read_gpt_file(tmp_path / "file.pt").weights
    assert_same(found, {**weights, "something.else": torch.ones(2), **heads})
    one_line(lambda: check_gpt_weights(found, CONFIG, Path("f.pt")), "1 unexpected", "something.else")
    del found["something.else"]
    check_gpt_weights(found, CONFIG, Path("f.pt"))  # projectors may be there


def test_stored_dtypes_are_kept_and_the_file_is_let_go(tmp_path: Path, weights: Any) -> None:
    path = tmp_path / "file.pt"
    half = {key: value.bfloat16() for key, value in weights.items()}
    torch.save(half, path)
    found = read_gpt_file(path).weights
    with path.open("r+b") as file:  # overwritten in place: what was read must not change with it
        file.write(b"\0" * path.stat().st_size)
    assert_same(found, half)


class Bomb:
    """Runs a command when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_is_refused_and_not_executed(zipped: bool, tmp_path: Path, weights: Any) -> None:
    path, proof = tmp_path / "evil.pt", tmp_path / "executed"
    torch.save({"model": weights, "args": Bomb(proof)}, path, _use_new_zipfile_serialization=zipped)
    one_line(lambda: read_gpt_file(path).weights, str(path), "refused", "nothing in it was executed", "system")
    assert not proof.exists()
    torch.load(path, weights_only=False)  # it really is one
    assert proof.exists()


def test_bare_malicious_pickle(tmp_path: Path) -> None:
    path, proof = tmp_path / "evil.bin", tmp_path / "executed"
    path.write_bytes(pickle.dumps(Bomb(proof), protocol=2))
    one_line(lambda: read_gpt_file(path).weights, str(path))
    assert not proof.exists()


def test_unreadable_files(tmp_path: Path, weights: Any) -> None:
    one_line(lambda: read_gpt_file(tmp_path / "none.pt").weights, "none.pt", "no such file")
    one_line(lambda: read_gpt_file(tmp_path).weights, str(tmp_path), "is a folder", "mirai-ds export")
    torch.save({"model": weights}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    for name, data in {
        "half.pt": content[: len(content) // 2], "tail.pt": content[:-30], "empty.pt": b"", "text.pt": b"hello world\n",
        "image.pt": b"\x89PNG\r\n\x1a\n" + bytes(64), "short.pt": content[:3],
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(data)
        one_line(lambda name=name: read_gpt_file(tmp_path / name).weights, name, "not a readable torch file")


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ([1, 2], "holds a list"),
        ({}, "empty"),
        ({"model": 3}, "are a int"),
        ({"model": {"a": 1}}, "'a' is a int"),
        ({"steps": 3, "epoch": 1}, "'steps' is a int"),
    ],
)
def test_torch_files_without_weights(data: Any, part: str, tmp_path: Path) -> None:
    torch.save(data, tmp_path / "file.pt")
    one_line(lambda: read_gpt_file(tmp_path / "file.pt").weights, "file.pt", part)


def test_strictness_names_the_first_and_counts(weights: Any) -> None:
    path = Path("dir/file.pt")
    check_gpt_weights(weights, CONFIG, path)
    less = {key: value for key, value in weights.items() if not key.startswith("layers.1.")}
    one_line(
        lambda: check_gpt_weights(less, CONFIG, path),
        "dir/file.pt", "7 of 25 tensors missing", "layers.1.attention.wqkv.weight",
    )  # fmt: skip
    more = {**weights, "output.bias": torch.zeros(3), "zzz": torch.zeros(1)}
    one_line(lambda: check_gpt_weights(more, CONFIG, path), "2 unexpected (first: 'output.bias')")
    bent = {**weights, "layers.2.attention.wo.weight": torch.zeros(64, 63)}
    one_line(lambda: check_gpt_weights(bent, CONFIG, path), "1 misshaped", "layers.2.attention.wo.weight", "(64, 63)")
    other = {"a": torch.ones(1)}
    one_line(lambda: check_gpt_weights(other, CONFIG, path), "25 of 25 tensors missing", "not a LlamaGen")


AROUND: dict[str, Callable[[str], str]] = {
    "DDP": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled in DDP": lambda key: f"module._orig_mod.{key}",
    "an objective": lambda key: f"gpt.{key}",
    "FSDP": lambda key: f"_fsdp_wrapped_module.{key}",
    "FSDP of the blocks too": lambda key: f"_fsdp_wrapped_module.{key}".replace(
        ".layers.1.", ".layers.1._fsdp_wrapped_module._checkpoint_wrapped_module."
    ),
    "compiled blocks": lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
}


@pytest.mark.parametrize("around", AROUND)
def test_what_was_around_the_network_is_taken_off_its_keys(around: str, tmp_path: Path, weights: Any) -> None:
    named = {AROUND[around](key): value for key, value in weights.items()}
    stray = {AROUND[around]("freqs_cis"): torch.zeros(3), "n_averaged": torch.tensor(4)}
    torch.save({"model": {**named, **stray}, "steps": 3}, tmp_path / "file.pt")
    save_file({**named, **stray}, tmp_path / "file.safetensors")
    for name in ("file.pt", "file.safetensors"):
        found = read_gpt_file(tmp_path / name)
        assert sorted(found.weights) == sorted(weights)
        assert all(torch.equal(found.weights[key], weights[key]) for key in weights)
        check_gpt_weights(found.weights, CONFIG, tmp_path / name)


def test_an_objective_has_heads_beside_its_gpt(tmp_path: Path, weights: Any) -> None:
    heads = plain.ruled(plain.head_shapes(0, 64, 8, 64), seed=3)
    inside = {f"module.gpt._orig_mod.{key}": value for key, value in weights.items()}
    torch.save({**inside, **{f"module.{key}": value for key, value in heads.items()}}, tmp_path / "file.pt")
    assert_same(read_gpt_file(tmp_path / "file.pt").weights, {**weights, **heads})


def test_keys_of_two_networks_are_refused_by_name(tmp_path: Path, weights: Any) -> None:
    key = "layers.1.attention.wo.weight"
    twice = {**weights, f"module.{key}": weights[key]}
    half = {key if key.startswith("layers") else f"module.{key}": value for key, value in weights.items()}
    for name, mixed, told in (
        ("twice.pt", twice, [repr(key), f"'module.{key}'"]),
        ("half.pt", half, ["'module.cls_embedding.embedding_table.weight'", "'layers.0."]),
    ):
        torch.save({"model": mixed}, tmp_path / name)
        one_line(lambda name=name: read_gpt_file(tmp_path / name), name, "two networks", *told)


@pytest.mark.parametrize("number", [np.float64(0.25), np.float32(2), np.int64(7), np.bool_(True)])
def test_numbers_of_numpy_are_plain_values(number: Any, tmp_path: Path, weights: Any) -> None:
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pt"
        torch.save({"model": weights, "steps": 5, "best": number}, path, _use_new_zipfile_serialization=zipped)
        assert_same(read_gpt_file(path).weights, weights)
        assert read_torch_file(path)["best"] == number


def test_heads_fit_to_the_last_or_not_at_all(weights: Any) -> None:
    heads = plain.ruled(plain.head_shapes(0, 64, 8, 64), seed=3)
    path = Path("f.pt")
    both = {**weights, **heads}
    check_heads(both, heads, path)
    check_heads(weights, heads, path)  # none: the run's own begin anew
    wide = {**heads, "projectors.0.2.weight": torch.zeros(48, 8)}
    one_line(lambda: check_heads(both, wide, path), "f.pt", "projectors.0.2.weight is (8, 8) there and (48, 8) here")
    more = {**heads, "projectors.1.0.weight": torch.zeros(8, 64)}
    one_line(lambda: check_heads(both, more, path), "projectors.1.0.weight is no such tensor there and (8, 64)")
    less = {key: value for key, value in heads.items() if key != "projectors.0.4.bias"}
    one_line(lambda: check_heads(both, less, path), "projectors.0.4.bias is (64,) there and no such tensor here")


def named(size: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        return GPT(ModelConfig(size=size)).state_dict()


def test_wrong_size_is_guessed_from_the_shapes(weights: Any) -> None:
    path = Path("c2i_L_256.pt")
    one_line(
        lambda: check_gpt_weights(named("GPT-L"), ModelConfig(size="GPT-B"), path), "misshaped", "model.size = GPT-L"
    )
    one_line(
        lambda: check_gpt_weights(named("GPT-B"), ModelConfig(size="GPT-XL"), path), "missing", "model.size = GPT-B"
    )
    one_line(lambda: check_gpt_weights(weights, ModelConfig(), path), "model.size = custom (dim 64, n_layer 3")
    other = ModelConfig(size="custom", **{**SETTINGS, "vocab_size": 17, "num_classes": 10})
    one_line(lambda: check_gpt_weights(weights, other, path), "model.vocab_size = 48, not 17", "model.num_classes = 5")
    wide = ModelConfig(size="custom", **SETTINGS, ffn_multiple_of=16)
    one_line(lambda: check_gpt_weights(weights, wide, path), "feed-forward width of 256, not 176")


@pytest.mark.parametrize("size", ["GPT-B", "GPT-L", "GPT-XL", "GPT-3B"])
def test_named_sizes_are_inferred(size: str) -> None:
    found = infer_model_config(named(size), block_size=576)
    assert found == ModelConfig(size=size, block_size=576)
    assert found.heads == {"GPT-B": 12, "GPT-L": 16, "GPT-XL": 20, "GPT-3B": 32}[size]


PAR = ModelConfig(size="custom", par_tokens=4, **SETTINGS)
PAR_WEIGHTS = plain.ruled(plain_par.shapes(SETTINGS, 256, 4), seed=1)


def test_par_is_told_by_its_extra_tensor(tmp_path: Path, weights: Any) -> None:
    with torch.device("meta"):
        released = GPT(ModelConfig(size="GPT-XL", block_size=576, par_tokens=16)).state_dict()
    found = infer_model_config(released, block_size=576)
    assert found == ModelConfig(size="GPT-XL", block_size=576, par_tokens=16)
    assert infer_model_config(PAR_WEIGHTS, 16, n_head=4) == PAR
    assert infer_model_config(weights, 16, n_head=4).par_tokens is None
    torch.save({"model": {**PAR_WEIGHTS, "freqs_cis": torch.zeros(2)}, "args": NAMESPACE}, tmp_path / "par.pt")
    loaded = read_gpt_file(tmp_path / "par.pt").weights
    assert_same(loaded, PAR_WEIGHTS)
    check_gpt_weights(loaded, PAR, tmp_path / "par.pt")
    one_line(lambda: infer_model_config(PAR_WEIGHTS, 49, n_head=4), "model.par_tokens = 4", "7x7 grid")


def test_par_and_plain_weights_are_not_mixed_up(weights: Any) -> None:
    path = Path("f.pt")
    one_line(
        lambda: check_gpt_weights(PAR_WEIGHTS, CONFIG, path),
        "1 unexpected (first: 'spe_tok_embeddings.special_embeddings.weight')", "model.par_tokens = 4, not null",
    )  # fmt: skip
    one_line(lambda: check_gpt_weights(weights, PAR, path), "1 of 26 tensors missing", "model.par_tokens = null, not 4")
    for bad in (torch.zeros(64), torch.zeros(())):
        bent = {**PAR_WEIGHTS, plain_par.LEARNABLE: bad}
        one_line(lambda bent=bent: check_gpt_weights(bent, PAR, path), "1 misshaped", "special_embeddings")


def test_other_sizes_need_the_number_of_heads(weights: Any) -> None:
    one_line(lambda: infer_model_config(weights, 16), "model.n_head = null", "dim 64, n_layer 3", "give it")
    assert infer_model_config(weights, 16, n_head=4) == CONFIG
    one_line(lambda: infer_model_config(named("GPT-B"), n_head=8), "GPT-B has 12")
    one_line(lambda: infer_model_config(weights, 17, n_head=4), "17", "square")
    one_line(lambda: infer_model_config({"a": torch.zeros(2)}), "not a GPT's weights")
    narrow = plain.ruled(plain.shapes(SETTINGS, 176), seed=0)  # floor(8 * 64 / 3) = 170 -> 176 by 16
    assert infer_model_config(narrow, 16, n_head=4).ffn_hidden == 176
    with pytest.raises(ConfigError, match="ffn_multiple_of"):
        infer_model_config(plain.ruled(plain.shapes(SETTINGS, 100), seed=0), 16, n_head=4)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_written_and_read_back_bitwise(suffix: str, tmp_path: Path, weights: Any, averaged: Any) -> None:
    path = tmp_path / "new" / f"out{suffix}"
    write_llamagen(path, weights, averaged, steps=12, info={"name": "run", "grid": [16, 16]})
    found = read_gpt_file(path).weights
    assert {key: value.dtype for key, value in found.items()} == dict.fromkeys(found, torch.float32)
    assert sorted(found) == sorted(weights)
    assert all(torch.equal(found[key], weights[key]) for key in weights)
    assert os.listdir(path.parent) == [path.name]
    average = read_gpt_file(path, "ema")
    assert (average.held, average.steps, average.model) == (("raw", "ema"), 12, {})
    assert_same({key: average.weights[key] for key in averaged}, averaged)


def test_written_as_llamagens_samplers_read_it(tmp_path: Path, weights: Any, averaged: Any) -> None:
    """Their code: torch.load(path, map_location="cpu")["model"], plain torch defaults, then load_state_dict."""
    path = tmp_path / "out.pt"
    big = torch.zeros(1000, 64, dtype=torch.float64)
    view = {**weights, "norm.weight": big[3]}
    write_llamagen(path, view, averaged, steps=12, info={"name": "run"})
    data = torch.load(path, map_location="cpu")
    assert list(data) == ["model", "steps", "args", "ema"]
    assert (data["steps"], data["args"]) == (12, {"name": "run"})
    assert list(data["model"]) == list(weights)
    assert data["model"]["norm.weight"].dtype == torch.float32
    GPT(CONFIG).load_state_dict(data["model"])
    small = sum(value.numel() for value in weights.values()) * 4
    assert path.stat().st_size < 2 * small + 100_000  # the view did not bring its 512 kB along


def test_written_safetensors_carry_their_metadata(tmp_path: Path, weights: Any) -> None:
    from safetensors import safe_open

    path = tmp_path / "out.safetensors"
    tied = {**weights, "output.weight": weights["tok_embeddings.weight"]}  # one memory under two names
    write_llamagen(path, tied, steps=4, info={"name": "run", "epochs": 2.5})
    with safe_open(str(path), "pt") as file:
        assert file.metadata() == {"format": "pt", "steps": "4", "name": "run", "epochs": "2.5"}
    assert torch.equal(load_file(path)["output.weight"], weights["tok_embeddings.weight"])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.pt"
    write_llamagen(path, weights, steps=1)
    before = path.read_bytes()

    def full(_data: object, part: str) -> None:
        Path(part).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    one_line(lambda: write_llamagen(path, weights, steps=2), "out.pt", "cannot be written", "No space left")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["out.pt"]
    (tmp_path / "file").write_text("")
    one_line(lambda: write_llamagen(tmp_path / "file" / "out.pt", weights), "cannot be written")
