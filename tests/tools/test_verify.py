"""The check against reference vectors passes on right numbers, and only on those."""

from __future__ import annotations

import io
import json
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mirai_ds.config import UserError
from mirai_ds.tools import verify
from mirai_ds.tools.verify import FileResult, compare, render, rule_tensor, verify_file, verify_files
from tests.model import plain_gpt as plain

torch.set_num_threads(1)  # on small tensors two threads mostly wait for each other

FIXTURES = Path(__file__).parents[1] / "fixtures"
VECTORS = {
    "llamagen_gpt_tiny": 52,
    "mirai_e_official_k3": 10,
    "mirai_e_official_k8_uneven": 10,
    "mirai_i_official_k1": 7,
    "mirai_i_official_k2": 8,
}
Arrays = dict[str, Any]


def arrays_of(name: str) -> Arrays:
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as data:
        return {key: data[key] for key in data.files}


def save(path: Path, arrays: Arrays) -> Path:
    np.savez(path, **arrays)
    return path


def check(tmp_path: Path, arrays: Arrays, tolerance: float = 1e-5) -> FileResult:
    return verify_file(save(tmp_path / "vector.npz", arrays), tolerance)


def failed(result: FileResult) -> set[str]:
    assert result.ok == all(record.ok for record in result.records)
    return {record.name for record in result.records if not record.ok}


def one_line(call: Callable[[], object], *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


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
    right = verify._foresight_config
    monkeypatch.setattr(verify, "_foresight_config", lambda *a: right(*a).model_copy(update=change))
    found = failed(verify_file(FIXTURES / "mirai_e_official_k8_uneven.npz"))
    assert "total_loss" in found
    assert "ntp_loss" not in found
    assert ("head_losses" in found) == (change != {"heads_reduction": "mean"})


def test_other_rotary_zero_row_fails(tmp_path: Path) -> None:
    arrays = arrays_of("llamagen_gpt_tiny")
    arrays["rope"][0, :, 0] = 1.0  # an identity rotation for the class
    assert failed(check(tmp_path, arrays)) == {"rope"}


# --- any configuration ---------------------------------------------------------------------------------------------


def reference_gpt(config: Arrays, seed: int, keep: list[int] | None, batch: int = 1) -> Arrays:
    """A `llamagen_gpt` vector by the plain re-implementation, weights by rule."""
    ffn = -(-(8 * config["dim"] // 3) // 256) * 256
    state = plain.ruled(plain.shapes(config, ffn), seed)
    for value in state.values():
        value.requires_grad_()
    rng = np.random.default_rng(seed)
    tokens = torch.from_numpy(rng.integers(0, config["vocab_size"], (batch, config["block_size"])))
    labels = torch.from_numpy(rng.integers(0, config["num_classes"], batch))
    logits, hidden = plain.forward(state, config, tokens[:, :-1], labels)
    without, _ = plain.forward(state, config, tokens[:, :-1], torch.full_like(labels, config["num_classes"]))
    loss = plain.cross_entropy(logits, tokens)
    loss.backward()
    grads = {key: value.grad for key, value in state.items() if value.grad is not None}
    at = slice(None) if keep is None else keep
    out = {
        "kind": "llamagen_gpt", "config": json.dumps(config), "seed": seed, "tokens": tokens, "labels": labels,
        "logits": logits[:, at], "logits_uncond": without[:, at], "hidden_last": hidden[-1][:, at], "loss": loss,
        "grad_norm": math.sqrt(sum(float(g.double().pow(2).sum()) for g in grads.values())),
        "grad/layers.0.attention.wqkv.weight": grads["layers.0.attention.wqkv.weight"],
    }  # fmt: skip
    out |= {} if keep is None else {"keep": np.array(keep)}
    return {key: np.asarray(value.detach() if isinstance(value, Tensor) else value) for key, value in out.items()}


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


MIRAI = {
    "dim": 16, "n_layer": 2, "n_head": 2, "vocab_size": 20, "num_classes": 4, "encoder_depth": 1, "projector_dim": 8,
    "num_heads": 4,
}  # fmt: skip


def reference_mirai(grid: int, stride: int, variant: str) -> Arrays:
    """A `mirai_objective` vector by plain slicing: head k's flat shift is (down * stride + right)."""
    cells, seed = grid * grid, 7
    config: Arrays = {**MIRAI, "block_size": cells, "z_dims": [16 if variant == "E" else 6]}
    width = config["z_dims"][0]
    wanted = plain.shapes(config, 256)
    for k in range(4):
        wanted |= plain.head_shapes(k, 16, 8, width)
    state = plain.ruled(wanted, seed)
    rng = np.random.default_rng(grid)
    tokens, labels = torch.from_numpy(rng.integers(0, 20, (2, cells))), torch.tensor([3, 0])
    logits, hidden = plain.forward(state, config, tokens[:, :-1], labels)
    if variant == "E":
        teacher = plain.ruled(plain.shapes(config, 256), seed=8)
        target = plain.forward(teacher, config, tokens[:, :-1], labels)[1][0]
    else:
        target = torch.from_numpy(rng.standard_normal((2, cells, width)).astype(np.float32))
    losses = []
    for k, shift in enumerate([0, 1, stride, stride + 1]):
        w = {i: (state[f"projectors.{k}.{i}.weight"], state[f"projectors.{k}.{i}.bias"]) for i in (0, 2, 4)}
        x = hidden[0]
        for i in (0, 2):
            x = x @ w[i][0].T + w[i][1]
            x = x * torch.sigmoid(x)
        x = x @ w[4][0].T + w[4][1]
        if variant == "E":
            student, goal = [0, *range(1, cells - shift)], [0, *range(1 + shift, cells)]
        else:
            length = min(cells - 1, cells - shift)
            student, goal = list(range(1, length + 1)), list(range(shift, length + shift))
        a, b = x[:, student], target[:, goal]
        losses.append(-((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean())
    coefficients = torch.tensor([2.0, 1.0, 0.5, 3.0])
    ntp = plain.cross_entropy(logits, tokens)
    out: Arrays = {
        "kind": "mirai_objective", "variant": variant, "config": json.dumps(config), "seed": seed, "teacher_seed": 8,
        "tokens": tokens, "labels": labels, "coefficients": coefficients, "teacher_features": target,
        "head_losses": torch.stack(losses), "ntp_loss": ntp,
        "total_loss": ntp + (coefficients * torch.stack(losses)).sum(),
    }  # fmt: skip
    return {key: np.asarray(value) for key, value in out.items()}


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


# --- files that cannot be understood -------------------------------------------------------------------------------


def test_files_that_are_no_vectors(tmp_path: Path) -> None:
    path = tmp_path / "file.npz"
    one_line(lambda: verify_files([path]), "file.npz", "no such file")
    one_line(lambda: verify_files([]), "no files given")
    content = (FIXTURES / "mirai_i_official_k1.npz").read_bytes()
    broken = bytearray(content)
    broken[2000:2400] = bytes(400)
    cut = content[: len(content) // 2], content[:-30], content[:100]
    for data in (b"", b"hello", *cut, pickle.dumps({"kind": "x"}), bytes(broken)):
        path.write_bytes(data)
        one_line(lambda: verify_file(path), "file.npz", "npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    one_line(lambda: verify_file(tmp_path / "one.npy"), "is not an .npz file")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("kind.txt", "llamagen_gpt")
    one_line(lambda: verify_file(path), "npz")


class Bomb:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


def test_pickled_arrays_are_refused_and_not_executed(tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    arrays = {**arrays_of("mirai_i_official_k1"), "extra": np.array([Bomb(proof)], dtype=object)}
    path = save(tmp_path / "file.npz", arrays)
    one_line(lambda: verify_file(path), "file.npz", "allow_pickle=False")
    assert not proof.exists()
    np.load(path, allow_pickle=True)["extra"]
    assert proof.exists()


def test_unknown_kinds_name_the_known_ones(tmp_path: Path) -> None:
    arrays = arrays_of("mirai_i_official_k1")
    for kind in ("llamagen", "vq16"):
        spoiled = {**arrays, "kind": np.array(kind)}
        one_line(lambda spoiled=spoiled: check(tmp_path, spoiled), kind, "llamagen_gpt", "mirai_objective")
    del arrays["kind"]
    one_line(lambda: check(tmp_path, arrays), "has no array `kind`")


@pytest.mark.parametrize("name", ["config", "tokens", "labels", "seed", "coefficients", "variant", "teacher_seed"])
def test_missing_inputs_are_named(name: str, tmp_path: Path) -> None:
    arrays = arrays_of("mirai_e_official_k3")
    del arrays[name]
    one_line(lambda: check(tmp_path, arrays), f"has no array `{name}`")


def change_config(arrays: Arrays, **values: Any) -> Arrays:
    config = {**json.loads(str(arrays["config"])), **values}
    return {**arrays, "config": np.array(json.dumps({k: v for k, v in config.items() if v != "absent"}))}


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"dim": "absent"}, "`config` has no 'dim'"),
        ({"n_head": 5}, "model.n_head = 5"),
        ({"block_size": 200}, "square"),
        ({"block_size": 225}, "do not fit block_size = 225"),
        ({"num_heads": 2}, "foresight.weights"),
        ({"num_heads": 12}, "num_heads"),
        ({"encoder_depth": 7}, "foresight.layer = 7"),
        ({"z_dims": [31]}, "z_dims = [31]"),
        ({"vocab_size": 60}, "`tokens` spans 0..63"),
    ],
)
def test_configurations_that_do_not_fit(change: Arrays, part: str, tmp_path: Path) -> None:
    one_line(lambda: check(tmp_path, change_config(arrays_of("mirai_e_official_k3"), **change)), "vector.npz", part)


def test_stored_weights_that_do_not_fit(tmp_path: Path) -> None:
    arrays = arrays_of("llamagen_gpt_tiny")
    key = "state/layers.3.attention.wo.weight"
    one_line(lambda: check(tmp_path, {k: v for k, v in arrays.items() if k != key}), f"has no `{key}`")
    one_line(lambda: check(tmp_path, {**arrays, key: np.zeros((64, 63))}), key, "(64, 63)", "(64, 64)")
    one_line(lambda: check(tmp_path, {**arrays, "state/freqs": np.zeros(1)}), "state/freqs", "belongs to no tensor")
    one_line(lambda: check(tmp_path, {**arrays, "config": np.array("{")}), "not JSON")


def test_inputs_alone_are_nothing_to_check(tmp_path: Path) -> None:
    arrays = {key: arrays_of("mirai_i_official_k1")[key] for key in ("kind", "variant", "config", "tokens", "labels")}
    one_line(lambda: check(tmp_path, arrays), "nothing to check")


def test_table_shows_every_array_and_the_verdict(tmp_path: Path) -> None:
    from rich.console import Console

    arrays = {**arrays_of("mirai_i_official_k1"), "extra": np.float32(0)}
    results = verify_files([FIXTURES / "mirai_i_official_k1.npz", save(tmp_path / "bad.npz", arrays)])
    output = io.StringIO()
    Console(width=200, file=output).print(render(results))
    text = output.getvalue()
    assert text.count("ntp_loss") == 2
    assert "all 7 arrays ok" in text
    assert "1 of 8 arrays FAILED" in text
    (line,) = [line for line in text.splitlines() if "extra" in line]
    assert "not checked" in line
