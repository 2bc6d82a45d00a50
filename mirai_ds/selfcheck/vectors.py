"""Files of reference vectors: their arrays, checked as they are asked for, and weights by rule."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirai_ds.config import UserError

Array = np.ndarray[Any, Any]
Reading = tuple[str, dict[str, Tensor]]  # how what the file leaves open was read, and the arrays computed so


class Vector:
    """The arrays of one file, with errors that name it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arrays = _read_npz(path)

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def fail(self, problem: str) -> UserError:
        """The error to raise about this file."""
        return UserError(f"{self.path}: {problem}")

    def need(self, name: str) -> Array:
        """The array `name`; raises UserError when the file lacks it."""
        if name not in self.arrays:
            raise self.fail(f"has no array `{name}`; it holds {', '.join(sorted(self.arrays)[:8]) or 'nothing'}")
        return self.arrays[name]

    def integers(self, name: str, low: int, high: int) -> Tensor:
        """An integer array as int64, checked to lie in low..high."""
        array = self.need(name)
        if array.dtype.kind not in "iu" or array.size == 0:
            raise self.fail(f"`{name}` must be integers, not {array.dtype} {array.shape}")
        if int(array.min()) < low or int(array.max()) > high:
            raise self.fail(f"`{name}` spans {array.min()}..{array.max()}, the configuration allows {low}..{high}")
        return torch.from_numpy(array.astype(np.int64))

    def number(self, name: str) -> int:
        """A single integer, e.g. a seed."""
        value = self.need(name)
        if value.size != 1 or value.dtype.kind not in "iu":
            raise self.fail(f"`{name}` must be one integer, not {value.dtype} {value.shape}")
        return int(value.flatten()[0])

    def text(self, name: str) -> str:
        """A string stored as a 0-d array."""
        return str(self.need(name)[()])

    def json(self, name: str) -> Any:
        """The JSON in the string `name`."""
        try:
            return json.loads(self.text(name))
        except json.JSONDecodeError as error:
            raise self.fail(f"`{name}` is not JSON ({error})") from None

    def settings(self) -> dict[str, Any]:
        """The JSON in `config`."""
        data = self.json("config")
        if not isinstance(data, dict):
            raise self.fail("`config` is not a JSON object")
        return data

    def setting(self, name: str) -> Any:
        """One entry of `config`."""
        data = self.settings()
        if name not in data:
            raise self.fail(f"`config` has no {name!r}; it has {', '.join(data)}")
        return data[name]


def _read_npz(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: is not an .npz file, or is cut short")
    arrays: dict[str, Array] = {}
    try:
        with np.load(path, allow_pickle=False) as data:
            for name in data.files:
                arrays[name] = data[name]
                if not isinstance(arrays[name], np.ndarray):
                    raise ValueError(f"{name} is not an array")
    except Exception as error:  # bytes from anywhere: NumPy's header parser raises nearly any type on them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: is not a readable .npz file of plain arrays ({reason})") from None
    return arrays


def rule_tensor(key: str, shape: Sequence[int], seed: int) -> Tensor:
    """float32 weights by the vectors' rule: a function of (seed, key), drawn in fp64, cast, then scaled."""
    generator = np.random.default_rng(zlib.crc32(f"{seed}:{key}".encode()))
    z = generator.standard_normal(tuple(shape)).astype(np.float32)
    if len(shape) >= 2:
        z /= np.float32(math.sqrt(math.prod(shape[1:])))
    else:
        z *= np.float32(0.1)
        if len(shape) == 1 and key.endswith("weight"):
            z += np.float32(1.0)
    return torch.from_numpy(z)


def weights(vector: Vector, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's `state/*` in fp32, which must be exactly `wanted`, or the rule's by `seed`; raises UserError."""
    stored = {key.removeprefix("state/"): value for key, value in vector.arrays.items() if key.startswith("state/")}
    if not stored:
        seed = vector.number("seed")
        return {key: rule_tensor(key, value.shape, seed) for key, value in wanted.items()}
    for key, value in wanted.items():
        if key not in stored:
            raise vector.fail(f"has no `state/{key}`, which its configuration needs")
        if stored[key].shape != tuple(value.shape):
            raise vector.fail(f"`state/{key}` is {stored[key].shape}, its configuration needs {tuple(value.shape)}")
    unknown = sorted(set(stored) - set(wanted))
    if unknown:
        raise vector.fail(f"`state/{unknown[0]}` belongs to no tensor of its configuration")
    return {key: torch.from_numpy(value.astype(np.float32)) for key, value in stored.items()}
