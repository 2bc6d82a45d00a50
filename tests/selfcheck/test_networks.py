"""The check against reference vectors passes on right numbers, and only on those."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mirai_ds.selfcheck import networks
from mirai_ds.selfcheck.check import compare, verify_file, verify_files
from mirai_ds.selfcheck.vectors import rule_tensor
from tests.model import plain_gpt as plain
from tests.model import plain_par
from tests.one_line import one_line
from tests.selfcheck.vectors import (
    FIXTURES,
    VECTORS,
    Arrays,
    arrays_of,
    check,
    failed,
    reference_gpt,
    reference_mirai,
    reference_par,
)

torch.set_num_threads(1)  # on small tensors two threads mostly wait for each other


@pytest.mark.parametrize("name", VECTORS)
def test_reference_vectors_pass(name: str) -> None:
    (result,) = verify_files([FIXTURES / f"{name}.npz"])
    assert failed(result) == set()
    assert len(result.records) == VECTORS[name]
    assert all(record.tolerance == 1e-5 and record.error <= 5e-6 for record in result.records)
    named = {"config", "kind", "seed", "tokens", "labels", "teacher_seed", "variant", "coefficients"}
    inputs = {key for key in arrays_of(name) if key in named or key.startswith("state/")}
    inputs |= {"teacher_features"} if "mirai_i" in name else set()
    assert {record.name for record in result.records} == set(arrays_of(name)) - inputs


# --- wrong numbers fail --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VECTORS)
def test_one_value_off_by_a_thousandth_fails(name: str, tmp_path: Path) -> None:
    """The largest value of every compared array in turn, all in one file but each array for itself."""
    arrays = arrays_of(name)
    checked = {record.name for record in verify_file(FIXTURES / f"{name}.npz").records}
    for key in checked:
        value = arrays[key].copy()
        value.flat[np.abs(value).argmax()] *= 1.001
        arrays[key] = value
    result = check(tmp_path, arrays)
    assert failed(result) == checked
    for record in result.records:
        assert record.error == pytest.approx(1e-3, rel=0.02), record


def swap_heads(arrays: Arrays) -> None:
    """Heads 6 and 7 in the order of distance instead of the authors'."""
    for key in ("head_losses", "coefficients"):
        arrays[key][[5, 6]] = arrays[key][[6, 5]]


def wrong_label(arrays: Arrays) -> None:
    arrays["labels"] = (arrays["labels"] + 1) % 10


def wrong_token(arrays: Arrays) -> None:
    arrays["tokens"][0, -1] = (arrays["tokens"][0, -1] + 1) % 64


def wrong_depth(arrays: Arrays) -> None:
    config = json.loads(str(arrays["config"]))
    arrays["config"] = np.array(json.dumps({**config, "encoder_depth": 3}))


def wrong_teacher(arrays: Arrays) -> None:
    arrays["teacher_seed"] = arrays["teacher_seed"] + 1


def wrong_heads(arrays: Arrays) -> None:
    config = json.loads(str(arrays["config"]))
    arrays["config"] = np.array(json.dumps({**config, "n_head": 4}))


def wrong_seed(arrays: Arrays) -> None:
    arrays["seed"] = arrays["seed"] + 1


def shifted_features(arrays: Arrays) -> None:
    arrays["teacher_features"] = np.roll(arrays["teacher_features"], 1, axis=1)


def other_coefficients(arrays: Arrays) -> None:
    arrays["coefficients"] = arrays["coefficients"][::-1].copy()


@pytest.mark.parametrize(
    ("name", "spoil", "at_least", "not_these"),
    [
        ("mirai_e_official_k8_uneven", swap_heads, {"head_losses", "grad/projectors.5.0.weight"}, {"ntp_loss"}),
        ("mirai_e_official_k8_uneven", other_coefficients, {"total_loss", "grad_norm"}, {"head_losses", "ntp_loss"}),
        ("mirai_e_official_k3", wrong_token, {"ntp_loss", "total_loss"}, {"head_losses", "teacher_features"}),
        ("mirai_e_official_k3", wrong_depth, {"head_losses", "teacher_features", "total_loss"}, {"ntp_loss"}),
        ("mirai_e_official_k3", wrong_teacher, {"head_losses", "teacher_features"}, {"ntp_loss"}),
        ("mirai_e_official_k3", wrong_heads, {"ntp_loss", "head_losses", "teacher_features", "grad_norm"}, set()),
        ("mirai_e_official_k3", wrong_seed, {"ntp_loss", "head_losses"}, {"teacher_features"}),
        ("mirai_i_official_k2", shifted_features, {"head_losses", "total_loss"}, {"ntp_loss"}),
        ("llamagen_gpt_tiny", wrong_label, {"logits", "hidden", "loss", "grad_norm"}, {"logits_uncond", "rope"}),
    ],
)
def test_other_systems_fail(
    name: str, spoil: Callable[[Arrays], None], at_least: set[str], not_these: set[str], tmp_path: Path
) -> None:
    arrays = arrays_of(name)
    spoil(arrays)
    found = failed(check(tmp_path, arrays))
    assert at_least <= found
    assert not (not_these & found)


@pytest.mark.parametrize(
    "change", [{"border": "mask"}, {"border": "clamp"}, {"head_order": "nearest"}, {"class_slot": False},
               {"slots": "predict"}, {"teacher_sees_last_token": True}, {"heads_reduction": "mean"},
               {"normalizer": "constant"}]
)  # fmt: skip
def test_an_installation_with_another_rule_fails(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What would happen if our `official` were not the authors': every rule the vectors pin, broken by itself."""
    right = networks._foresight_config
    monkeypatch.setattr(networks, "_foresight_config", lambda *a: right(*a).model_copy(update=change))
    found = failed(verify_file(FIXTURES / "mirai_e_official_k8_uneven.npz"))
    assert "total_loss" in found
    assert "ntp_loss" not in found
    assert ("head_losses" in found) == (change != {"heads_reduction": "mean"})


def test_other_rotary_zero_row_fails(tmp_path: Path) -> None:
    arrays = arrays_of("llamagen_gpt_tiny")
    arrays["rope"][0, :, 0] = 1.0  # an identity rotation for the class
    assert failed(check(tmp_path, arrays)) == {"rope"}


# --- any configuration ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide() -> Arrays:
    """GPT-B's width and heads on the 384-pixel grid, two blocks, few codes."""
    config = {"dim": 768, "n_layer": 2, "n_head": 12, "vocab_size": 96, "block_size": 576, "num_classes": 7}
    return reference_gpt(config, seed=5, keep=[0, 1, 24, 25, 300, 575])


def test_wide_model_on_the_24_grid(wide: Arrays, tmp_path: Path) -> None:
    result = check(tmp_path, wide)
    assert failed(result) == set()
    assert {record.name for record in result.records} == {
        "logits", "logits_uncond", "hidden_last", "loss", "grad_norm", "grad/layers.0.attention.wqkv.weight"
    }  # fmt: skip


def test_keep_says_where(wide: Arrays, tmp_path: Path) -> None:
    assert wide["logits"].shape == (1, 6, 96)
    spoiled = {**wide, "keep": np.array([0, 1, 24, 25, 301, 575])}
    assert failed(check(tmp_path, spoiled)) == {"logits", "logits_uncond", "hidden_last"}
    one_line(lambda: check(tmp_path, {**wide, "keep": np.array([0, 576])}), "`keep` spans 0..576", "0..575")


@pytest.mark.parametrize("head_dim", [64, 100])
def test_small_models_of_other_head_widths(head_dim: int, tmp_path: Path) -> None:
    config = {"dim": 2 * head_dim, "n_layer": 3, "n_head": 2, "vocab_size": 30, "block_size": 49, "num_classes": 3}
    arrays = reference_gpt(config, seed=6, keep=None, batch=2)
    assert failed(check(tmp_path, arrays)) == set()


@pytest.mark.parametrize(("grid", "n"), [(4, 4), (6, 9), (8, 16)])
def test_par_of_other_grids(grid: int, n: int, tmp_path: Path) -> None:
    arrays = reference_par(grid, n)
    result = check(tmp_path, arrays)
    assert failed(result) == set()
    assert {record.name for record in result.records} == set(arrays) - {"kind", "config", "seed", "tokens", "labels"}


def raster_codes(arrays: Arrays) -> None:
    """What a trainer does that forgets to bring the codes into region order."""
    arrays["tokens"] = arrays["tokens"][:, plain_par.raster(8, 4)]


def as_a_plain_gpt(arrays: Arrays) -> None:
    arrays["kind"] = np.array("llamagen_gpt")


@pytest.mark.parametrize("spoil", [raster_codes, as_a_plain_gpt, wrong_label, wrong_seed])
def test_other_orders_fail(spoil: Callable[[Arrays], None], tmp_path: Path) -> None:
    arrays = arrays_of("par_tiny_n4")
    spoil(arrays)
    assert failed(check(tmp_path, arrays)) == {"logits", "loss"}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"ar_token_num": 9}, "model.par_tokens = 9"),
        ({"ar_token_num": None}, "ar_token_num = None, spe_token_num = 3"),
        ({"ar_token_num": "four"}, "par_tokens = 'four': must be a whole number"),
        ({"spe_token_num": 4}, "the other one less"),
    ],
)
def test_par_configurations_that_do_not_fit(change: Arrays, part: str, tmp_path: Path) -> None:
    arrays = arrays_of("par_tiny_n4")
    config = np.array(json.dumps({**json.loads(str(arrays["config"])), **change}))
    one_line(lambda: check(tmp_path, {**arrays, "config": config}), "vector.npz", part)


@pytest.mark.parametrize("variant", ["E", "I"])
@pytest.mark.parametrize(
    ("grid", "stride", "reading"),
    [(16, 16, ""), (24, 24, "flat shift 24"), (24, 16, "flat shift 16"), (7, 7, "flat shift 7"), (24, 20, None)],
)
def test_objective_on_other_grids(grid: int, stride: int, reading: str | None, variant: str, tmp_path: Path) -> None:
    """Where a file does not say whether the shifts are a grid row or a literal 16, the result says which fits."""
    result = check(tmp_path, reference_mirai(grid, stride, variant))
    if reading is None:
        assert failed(result) == {"head_losses", "total_loss"}
        return
    assert failed(result) == set()
    assert result.reading.endswith(reading)
    assert bool(result.reading) == bool(reading)


def test_a_stated_stride_is_not_guessed(tmp_path: Path) -> None:
    arrays = reference_mirai(24, 16, "E")
    config = json.loads(str(arrays["config"]))
    for stride, ok in ((16, True), (24, False)):
        result = check(tmp_path, {**arrays, "config": np.array(json.dumps({**config, "flat_stride": stride}))})
        assert (result.ok, result.reading) == (ok, "")


# --- nothing is skipped --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llamagen_gpt_tiny", "mirai_e_official_k3", "mirai_i_official_k1"])
def test_an_array_not_understood_fails(name: str, tmp_path: Path) -> None:
    extra = ["perplexity", "grad/layers.9.attention.wo.weight", "teacher_logits", "GRAD_NORM", "seeds"]
    result = check(tmp_path, arrays_of(name) | dict.fromkeys(extra, np.float32(1.0)))
    assert failed(result) == set(extra)
    assert all("not checked" in record.note for record in result.records if record.name in extra)


def test_other_shapes_and_kinds_of_values_fail(tmp_path: Path) -> None:
    arrays = arrays_of("mirai_i_official_k1")
    arrays["head_losses"] = np.repeat(arrays["head_losses"], 2)
    arrays["ntp_loss"] = np.float32(np.nan)
    arrays["total_loss"] = np.array("4.5")
    assert failed(check(tmp_path, arrays)) == {"head_losses", "ntp_loss", "total_loss"}


def test_error_is_relative_to_the_largest_value() -> None:
    theirs = np.array([1.0, -4.0, 2.0], dtype=np.float32)
    assert compare("x", torch.tensor([1.0, -4.0, 2.002]), theirs, 1e-5).error == pytest.approx(0.0005, rel=1e-3)
    assert compare("x", torch.tensor([1.0, math.nan, 2.0]), theirs, 1e-5).error == math.inf
    zero = np.zeros(3, dtype=np.float32)
    assert compare("x", torch.zeros(3), zero, 1e-5).ok
    assert not compare("x", torch.full((3,), 1e-9), zero, 1e-5).ok
    assert not compare("x", torch.zeros(0), np.zeros(0), 1e-5).ok


def test_values_stored_in_half_precision_allow_their_rounding() -> None:
    exact = torch.linspace(-3, 3, 1001)
    assert compare("x", exact, exact.half().numpy(), 1e-5).ok
    assert not compare("x", exact * 1.001, exact.half().numpy(), 1e-5).ok


def test_tolerance_decides(tmp_path: Path) -> None:
    arrays = arrays_of("mirai_i_official_k1")
    arrays["ntp_loss"] = arrays["ntp_loss"] * np.float32(1.0001)
    assert failed(check(tmp_path, arrays, 1e-5)) == {"ntp_loss"}
    assert failed(check(tmp_path, arrays, 1e-3)) == set()
    for tolerance in (0.0, -1.0, math.nan, 1.0):
        one_line(lambda tolerance=tolerance: verify_files([FIXTURES / "x.npz"], tolerance), "tolerance")


def test_weights_by_rule() -> None:
    shapes = {"a.weight": (3, 4), "b.weight": (5,), "b.bias": (5,), "c": (2, 3, 2)}
    for key, wanted in plain.ruled(shapes, 11).items():
        torch.testing.assert_close(rule_tensor(key, shapes[key], 11), wanted, rtol=1e-6, atol=0)
    assert not torch.equal(rule_tensor("a.weight", (3, 4), 12), rule_tensor("a.weight", (3, 4), 11))
