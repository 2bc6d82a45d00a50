"""Check this installation's numbers against vectors computed by the reference systems (LlamaGen, Mirai's authors).

A vector is an .npz file that says what it is in `kind` and holds inputs and what the reference made of them.  Every
array of the file is an input, is computed and compared, or makes the file fail as not checked.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from mirai_ds.config import ForesightConfig, ModelConfig, UserError
from mirai_ds.config.errors import from_validation, nearest
from mirai_ds.foresight import EmaTeacher, MiraiObjective
from mirai_ds.model import GPT, next_token_loss

if TYPE_CHECKING:
    from rich.table import Table

Array = np.ndarray[Any, Any]

TOLERANCE = 1e-5  # a correct fp32 rewrite stays within 3e-6; wrong borders and slots are off by 1e-2 and less

REFERENCE_NAMES = ("dim", "n_layer", "n_head", "vocab_size", "block_size", "num_classes")


@dataclass(frozen=True)
class ArrayResult:
    """One array of a file: error = max|a - b| / max|b| in fp64; infinite where it cannot be compared, see `note`."""

    name: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether it was compared and is within tolerance (NaN is not)."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class FileResult:
    """All arrays of a file that are not inputs; `reading` says how what the file leaves open was read."""

    path: Path
    kind: str
    records: tuple[ArrayResult, ...]
    reading: str = ""

    @property
    def ok(self) -> bool:
        """Whether every array is within tolerance."""
        return all(record.ok for record in self.records)


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

    def settings(self) -> dict[str, Any]:
        """The JSON in `config`."""
        try:
            data = json.loads(self.text("config"))
        except json.JSONDecodeError as error:
            raise self.fail(f"`config` is not JSON ({error})") from None
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
    except (ValueError, OSError, EOFError, KeyError, SyntaxError, zipfile.BadZipFile, zlib.error) as error:
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


def _weights(vector: Vector, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file's `state/*`, which must be exactly `wanted`, or the rule's by `seed`."""
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


def _model_config(vector: Vector) -> ModelConfig:
    given = vector.settings()
    fields = {name: vector.setting(name) for name in REFERENCE_NAMES}
    for theirs, ours in (("norm_eps", "norm_eps"), ("rope_base", "rope_base"), ("multiple_of", "ffn_multiple_of")):
        if theirs in given:
            fields[ours] = given[theirs]
    try:
        return ModelConfig(size="custom", **fields)
    except ValidationError as error:
        raise from_validation(error, ModelConfig, str(vector.path)) from None


def _batch(vector: Vector, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """tokens (B, N) and labels (B,) int64."""
    tokens = vector.integers("tokens", 0, config.vocab_size - 1)
    labels = vector.integers("labels", 0, config.num_classes)
    if tokens.ndim != 2 or tokens.shape[1] != config.block_size or labels.shape != tokens.shape[:1]:
        shapes = f"`tokens` {tuple(tokens.shape)} and `labels` {tuple(labels.shape)}"
        raise vector.fail(f"{shapes} do not fit block_size = {config.block_size}")
    return tokens, labels


@torch.no_grad()
def _network_arrays(vector: Vector, gpt: GPT, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """What the GPT alone gives: logits, logits_uncond and hidden_last at `keep`, hidden of every block, rope."""
    out = {"rope": gpt.rope}
    keep: Tensor | slice = slice(None)
    if "keep" in vector:
        keep = vector.integers("keep", 0, gpt.config.block_size - 1).flatten()
    if {"logits", "hidden", "hidden_last"} & vector.arrays.keys():
        result = gpt(tokens[:, :-1], labels, tap=tuple(range(1, gpt.config.depth + 1)))
        out["logits"] = result.logits[:, keep]
        out["hidden"] = torch.stack([result.hidden[i + 1] for i in range(gpt.config.depth)])
        out["hidden_last"] = result.hidden[gpt.config.depth][:, keep]
    if "logits_uncond" in vector:
        nothing = torch.full_like(labels, gpt.config.num_classes)
        out["logits_uncond"] = gpt(tokens[:, :-1], nothing).logits[:, keep]
    return out


def _gradient_arrays(vector: Vector, module: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """`grad/*` and the global L2 norm over all parameters, where the file holds any."""
    if not any(name == "grad_norm" or name.startswith("grad/") for name in vector.arrays):
        return {}
    loss.backward()
    grads = {
        "grad/" + name.removeprefix("gpt."): torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in module.named_parameters()
    }
    norm = torch.stack([grad.double().pow(2).sum() for grad in grads.values()]).sum().sqrt()
    return grads | {"grad_norm": norm}


Reading = tuple[str, dict[str, Tensor]]


def _read_gpt(vector: Vector) -> Iterator[Reading]:
    """`llamagen_gpt`: the network, its loss and every gradient."""
    config = _model_config(vector)
    tokens, labels = _batch(vector, config)
    gpt = GPT(config).eval()
    gpt.load_state_dict(_weights(vector, gpt.state_dict()))
    out = _network_arrays(vector, gpt, tokens, labels)
    if any(name in ("loss", "grad_norm") or name.startswith("grad/") for name in vector.arrays):
        loss = next_token_loss(gpt(tokens[:, :-1], labels).logits, tokens)
        out |= {"loss": loss.detach()} | _gradient_arrays(vector, gpt, loss)
    yield "", out


def _foresight_config(vector: Vector, model: ModelConfig, stride: int) -> ForesightConfig:
    """The authors' alignment rule with the file's heads; `stride` is the flat shift of one row down."""
    variant = vector.text("variant")
    if variant not in ("E", "I"):
        raise vector.fail(f"`variant` = {variant!r}; use 'E' or 'I'")
    coefficients = vector.need("coefficients")
    layer = vector.setting("encoder_depth")
    try:
        config = ForesightConfig(
            method="mirai-e" if variant == "E" else "mirai-i", convention="official", layer=layer,
            num_heads=vector.setting("num_heads"), weights=[float(c) for c in coefficients.flatten()],
            projector_dim=vector.setting("projector_dim"), flat_stride=None if stride == model.grid else stride,
        )  # fmt: skip
        config.fill_from_model(model)
    except ValidationError as error:
        raise from_validation(error, ForesightConfig, str(vector.path)) from None
    except UserError as error:
        raise vector.fail(str(error)) from None
    return config


def _teacher_features(
    vector: Vector, model: ModelConfig, foresight: ForesightConfig, batch: tuple[Tensor, Tensor]
) -> Tensor:
    """Variant I: given, (B, N, C).  Variant E: the EMA teacher with weights by `teacher_seed`."""
    if foresight.method == "mirai-i":
        given = vector.need("teacher_features")
        if given.ndim != 3 or given.shape[:2] != tuple(batch[0].shape) or given.dtype.kind != "f":
            raise vector.fail(f"`teacher_features` is {given.dtype} {given.shape}, not {(*batch[0].shape, 'C')} floats")
        return torch.from_numpy(given.astype(np.float32))
    teacher = EmaTeacher(model, foresight, torch.float32, torch.device("cpu"), autocast=False)
    seed = vector.number("teacher_seed")
    teacher.load((name, rule_tensor(name, p.shape, seed)) for name, p in teacher.trunk.named_parameters())
    return teacher.features(*batch, None)


def _read_mirai(vector: Vector) -> Iterator[Reading]:
    """`mirai_objective`: the authors' objective, variant E or I.

    Their flat shifts are written for a 16 grid.  On another grid a file may mean one grid row or, literally, 16; unless
    its `config` has `flat_stride`, both are tried and the result says which one it is.
    """
    model = _model_config(vector)
    batch = _batch(vector, model)
    given = vector.settings().get("flat_stride")
    strides = dict.fromkeys([model.grid, 16] if given is None else [given])
    for stride in strides:
        foresight = _foresight_config(vector, model, stride)
        target = _teacher_features(vector, model, foresight, batch)
        width = vector.setting("z_dims")
        if not isinstance(width, list) or width != [target.shape[-1]]:
            raise vector.fail(f"`config` has z_dims = {width}, the teacher's features are {target.shape[-1]} wide")
        try:
            objective = MiraiObjective(model, foresight, target.shape[-1]).eval()
        except UserError as error:
            raise vector.fail(str(error)) from None
        names = {name.removeprefix("gpt."): value for name, value in objective.state_dict().items()}
        weights = _weights(vector, names)
        objective.load_state_dict({name: weights[name.removeprefix("gpt.")] for name in objective.state_dict()})
        total, metrics = objective(*batch, None, target, 1.0)
        out = {"ntp_loss": metrics["ntp"], "head_losses": -metrics["cosine"], "total_loss": total.detach()}
        out |= _gradient_arrays(vector, objective, total) | _network_arrays(vector, objective.gpt, *batch)
        if foresight.method == "mirai-e":
            out["teacher_features"] = target
        yield (f"one row down = flat shift {stride}" if len(strides) > 1 else ""), out


class Kind(NamedTuple):
    """How to check a kind of vector: which arrays are only inputs, and every reading of a file as computed arrays."""

    inputs: Callable[[Vector], set[str]]
    read: Callable[[Vector], Iterator[Reading]]


_COMMON = {"kind", "config", "seed", "tokens", "labels", "keep"}


def _gpt_inputs(vector: Vector) -> set[str]:
    return _COMMON | {name for name in vector.arrays if name.startswith("state/")}


def _mirai_inputs(vector: Vector) -> set[str]:
    given = {"teacher_features"} if vector.text("variant") == "I" else set()
    return _gpt_inputs(vector) | {"teacher_seed", "variant", "coefficients"} | given


KINDS: dict[str, Kind] = {
    "llamagen_gpt": Kind(_gpt_inputs, _read_gpt),
    "mirai_objective": Kind(_mirai_inputs, _read_mirai),
}


def compare(name: str, ours: Tensor | None, theirs: Array, tolerance: float) -> ArrayResult:
    """One record.  Half a unit in the last place is allowed on top for values that the file rounded to float16."""
    if ours is None:
        return ArrayResult(name, math.inf, tolerance, "not checked: this kind of file has no such array")
    if tuple(ours.shape) != theirs.shape or theirs.size == 0:
        return ArrayResult(name, math.inf, tolerance, f"computed {tuple(ours.shape)}, the file has {theirs.shape}")
    if theirs.dtype.kind not in "fiu":
        return ArrayResult(name, math.inf, tolerance, f"not checked: {theirs.dtype} values")
    wanted = theirs.astype(np.float64)
    difference = np.abs(ours.detach().double().numpy() - wanted)
    if theirs.dtype == np.float16:
        difference = np.maximum(difference - 0.5 * np.spacing(np.abs(theirs)).astype(np.float64), 0.0)
    worst, scale = float(difference.max()), float(np.abs(wanted).max())
    if not math.isfinite(worst) or not math.isfinite(scale):
        return ArrayResult(name, math.inf, tolerance, "values are not finite")
    return ArrayResult(name, worst / scale if scale else (0.0 if worst == 0 else math.inf), tolerance)


def verify_file(path: Path, tolerance: float = TOLERANCE) -> FileResult:
    """Compute every array of the file at `path` and compare; raises UserError when the file cannot be understood."""
    vector = Vector(path)
    name = vector.text("kind")
    if name not in KINDS:
        raise vector.fail(f"kind = {name!r}: {nearest(name, KINDS)} (known kinds: {', '.join(sorted(KINDS))})")
    inputs = KINDS[name].inputs(vector)
    outputs = [array for array in vector.arrays if array not in inputs]
    if not outputs:
        raise vector.fail("holds inputs only, nothing to check")
    results = []
    for reading, computed in KINDS[name].read(vector):
        records = tuple(compare(array, computed.get(array), vector.arrays[array], tolerance) for array in outputs)
        results.append(FileResult(path, name, records, reading))
        if results[-1].ok:
            return results[-1]
    return results[0]


def verify_files(paths: Sequence[Path], tolerance: float = TOLERANCE) -> list[FileResult]:
    """`verify_file` of each path, in fp32 on CPU."""
    if not paths:
        raise UserError("no files given; name at least one .npz vector")
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance = {tolerance}: must be between 0 and 1; correct code stays below {TOLERANCE}")
    return [verify_file(Path(path), tolerance) for path in paths]


def render(results: Sequence[FileResult]) -> Table:
    """A table of every array, for a terminal."""
    from rich.table import Table

    table = Table("file", "array", "error", "tolerance", "", box=None, pad_edge=False)
    for result in results:
        for record in result.records:
            verdict = "ok" if record.ok else f"FAILED {record.note}".strip()
            table.add_row(result.path.name, record.name, f"{record.error:.1e}", f"{record.tolerance:.0e}", verdict)
        failed = sum(not record.ok for record in result.records)
        count = len(result.records)
        summary = f"{failed} of {count} arrays FAILED" if failed else f"all {count} arrays ok"
        table.add_row(result.path.name, f"({result.kind})", "", "", ", ".join(filter(None, [summary, result.reading])))
    return table
