"""Check this installation's numbers against vectors of the reference systems (LlamaGen, PAR, Mirai's authors, ADM).

A vector is an .npz file that says what it is in `kind` and holds inputs and what the reference made of them.  Every
array of the file is an input, is computed and compared, or makes the file fail as not checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from torch import Tensor

from mirai_ds.config import UserError
from mirai_ds.config.errors import nearest
from mirai_ds.selfcheck.images import read_ten_crop, read_vq16, ten_crop_inputs, vq16_inputs
from mirai_ds.selfcheck.metrics import TOLERANCES, adm_inputs, read_adm
from mirai_ds.selfcheck.networks import gpt_inputs, mirai_inputs, read_gpt, read_mirai
from mirai_ds.selfcheck.vectors import Array, Reading, Vector

if TYPE_CHECKING:
    from rich.table import Table

TOLERANCE = 1e-5  # a correct fp32 rewrite stays within 3e-6; wrong borders and slots are off by 1e-2 and less


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


class Kind(NamedTuple):
    """How to check a kind of vector: which arrays are only inputs, and every reading of a file as computed arrays.

    tolerances: of arrays whose own accuracy is known, by name, whatever the caller's tolerance; 0 = exact.
    """

    inputs: Callable[[Vector], set[str]]
    read: Callable[[Vector], Iterator[Reading]]
    tolerances: Mapping[str, float] = MappingProxyType({})


KINDS: dict[str, Kind] = {
    "adm_metrics": Kind(adm_inputs, read_adm, TOLERANCES),
    "llamagen_gpt": Kind(gpt_inputs, read_gpt),
    "mirai_objective": Kind(mirai_inputs, read_mirai),
    "par_gpt": Kind(gpt_inputs, read_gpt),
    "ten_crop": Kind(ten_crop_inputs, read_ten_crop),
    "vq16": Kind(vq16_inputs, read_vq16),
}


def compare(name: str, ours: Tensor | None, theirs: Array, tolerance: float) -> ArrayResult:
    """One record.  Integers must be equal, whatever `tolerance`; values that the file rounded to float16 may be off by
    half a unit in the last place on top of it."""
    if ours is None:
        return ArrayResult(name, math.inf, tolerance, "not checked: this kind of file has no such array")
    if tuple(ours.shape) != theirs.shape or theirs.size == 0:
        return ArrayResult(name, math.inf, tolerance, f"computed {tuple(ours.shape)}, the file has {theirs.shape}")
    if theirs.dtype.kind not in "fiu":
        return ArrayResult(name, math.inf, tolerance, f"not checked: {theirs.dtype} values")
    wanted = theirs.astype(np.float64)
    if not ours.is_floating_point():
        tolerance = 0.0
    difference = np.abs(ours.detach().double().numpy() - wanted)
    if theirs.dtype == np.float16:
        difference = np.maximum(difference - 0.5 * np.spacing(np.abs(theirs)).astype(np.float64), 0.0)
    worst, scale = float(difference.max()), float(np.abs(wanted).max())
    if not math.isfinite(worst) or not math.isfinite(scale):
        return ArrayResult(name, math.inf, tolerance, "values are not finite")
    error = worst / scale if scale else (0.0 if worst == 0 else math.inf)
    note = f"{int((difference > 0).sum())} of {difference.size} values differ" if tolerance == 0 < error else ""
    return ArrayResult(name, error, tolerance, note)


def verify_file(path: Path, tolerance: float = TOLERANCE) -> FileResult:
    """Compute every array of the file at `path` and compare; raises UserError when the file cannot be understood."""
    vector = Vector(path)
    name = vector.text("kind")
    if name not in KINDS:
        raise vector.fail(f"kind = {name!r}: {nearest(name, KINDS)} (known kinds: {', '.join(sorted(KINDS))})")
    kind = KINDS[name]
    inputs = kind.inputs(vector)
    outputs = [array for array in vector.arrays if array not in inputs]
    allowed = {array: kind.tolerances.get(array, tolerance) for array in outputs}
    if not outputs:
        raise vector.fail("holds inputs only, nothing to check")
    results = []
    for reading, computed in kind.read(vector):
        records = tuple(compare(array, computed.get(array), vector.arrays[array], allowed[array]) for array in outputs)
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
            table.add_row(
                result.path.name,
                record.name,
                f"{record.error:.1e}",
                f"{record.tolerance:.0e}" if record.tolerance else "exact",
                verdict,
            )
        failed = sum(not record.ok for record in result.records)
        count = len(result.records)
        summary = f"{failed} of {count} arrays FAILED" if failed else f"all {count} arrays ok"
        table.add_row(result.path.name, f"({result.kind})", "", "", ", ".join(filter(None, [summary, result.reading])))
    return table
