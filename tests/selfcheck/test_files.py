"""Files that `verify` cannot understand are one clear line each; its table shows everything."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mirai_ds.selfcheck.check import render, verify_file, verify_files
from tests.one_line import one_line
from tests.selfcheck.vectors import FIXTURES, Arrays, arrays_of, check, save

torch.set_num_threads(1)  # on small tensors two threads mostly wait for each other


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
    for kind in ("llamagen", "vq17"):
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
