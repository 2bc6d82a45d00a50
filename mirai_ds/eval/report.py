"""A row of scores with its protocol, for people and as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mirai_ds.config import UserError
from mirai_ds.eval.evaluation import is_row
from mirai_ds.runtime.disk import write_whole
from mirai_ds.runtime.weight_files import first_line

NAMES = {
    "fid": "FID", "frechet_distance": "Frechet distance", "sfid": "sFID", "inception_score": "Inception Score",
    "precision": "precision", "recall": "recall",
}  # fmt: skip


def render(row: dict[str, Any]) -> str:
    """The scores, the protocol they hold under, and what makes them differ from published ones, as text."""
    return "\n".join([*_scores(row), "", *_protocol(row), "", *_departures(row)])


def _scores(row: dict[str, Any]) -> Iterator[str]:
    for key, name in NAMES.items():
        if row[key] is not None:
            yield f"{name:18} {row[key]:.{6 if key == 'frechet_distance' else 4}f}"
    if row["frechet_distance"] is not None:
        yield f"sFID and Inception Score are not defined with {row['protocol']['features']['network']}"
    if "NaN" in row["protocol"]["inception_score"]:
        yield f"{'Inception Score':18} {row['protocol']['inception_score']}"


def _protocol(row: dict[str, Any]) -> Iterator[str]:
    protocol, reference = row["protocol"], row["reference"]
    features, pairs = protocol["features"], protocol["precision_recall"]
    yield _line("samples", row["samples"], f"{row['num_samples']} images", _size(protocol["samples_resolution"]))
    yield _line("", f"sha256 {row['samples_sha256']}", protocol["origin"].get("samples", ""))
    record = protocol["sampling"]
    plain = (
        {} if record is None else {key: value for key, value in record.items() if not isinstance(value, (dict, list))}
    )
    made = [f"{key} {value}" for key, value in plain.items()] or ["unknown: no record beside the samples"]
    yield _line("made with", *made)
    images = "no images" if protocol["reference_images"] is None else f"{protocol['reference_images']} images"
    standard = "has the published reference's properties" if reference["standard"] else "NOT the published reference"
    yield _line("reference", reference["name"], images, _size(protocol["reference_resolution"]), standard)
    yield _line("", f"sha256 {reference['sha256']}", protocol["origin"].get("reference", "no features needed"))
    if protocol["reference_sizes"] is not None:
        yield _line("sizes", protocol["reference_sizes"])
    if protocol["reference_made"] is not None:
        yield _line("made from", *(f"{key} {value}" for key, value in protocol["reference_made"].items()))
    for key, origin in protocol["statistics"].items():
        yield _line("statistics", f"{NAMES[key]} {origin}")
    own = protocol["reference_own_fid"]
    if own is not None:
        yield _line("self-check", f"FID of the reference's own images to its stored statistics {own:.4f}")
    described = [f"{key} {value}" for key, value in features.items() if key not in ("network", "file", "sha256")]
    yield _line("network", features["network"], features["file"], f"sha256 {features['sha256']}")
    yield _line("", *described, f"batches of {protocol['batch_size']}", protocol["device"])
    if row["inception_score"] is not None:
        yield _line("Inception Score", protocol["inception_score"])
    if row["precision"] is not None:
        redone = f"{pairs['blocks_in_fp32']} of {pairs['blocks']} blocks redone in fp32"
        extra = [redone] if pairs["arithmetic"].startswith("fp16") else []
        yield _line("precision, recall", pairs["arithmetic"], f"{pairs['neighbour']}rd neighbour", *extra)
    yield _line("versions", *(f"{name} {version}" for name, version in protocol["versions"].items()))


def _departures(row: dict[str, Any]) -> Iterator[str]:
    reasons = row["protocol"]["departures"]
    if not reasons:
        yield "Under the published protocol (ImageNet 256x256, 50,000 samples), as far as the files show."
        return
    yield "NOT comparable with published ImageNet 256x256 numbers:"
    for reason in reasons:
        yield f"  - {reason}"


def _line(title: str, *parts: str) -> str:
    return f"{title:18} {', '.join(part for part in parts if part)}".rstrip()


def _size(resolution: list[int] | None) -> str:
    return "" if resolution is None else f"{resolution[1]}x{resolution[0]}"


def _holds_scores(path: Path) -> bool:
    try:
        return is_row(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return False


def write_json(path: Path, others: tuple[Path, Path]) -> Callable[[dict[str, Any]], None]:
    """What writes a row to `path`, which is checked now: hours of work must not end at a folder that is not there.

    Raises UserError, also where there is anything but scores.
    """
    if any(path.resolve() == other.resolve() for other in others):
        raise UserError(f"--json {path}: is an input; give another name")
    if path.is_file() and not _holds_scores(path):
        raise UserError(f"--json {path}: is there and holds no scores; give another name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--json {path}: its folder cannot be made ({first_line(error)})") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--json {path}: is a folder, or in one that cannot be written to; give another name")

    def write(row: dict[str, Any]) -> None:
        try:
            write_whole(path, json.dumps(row, indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"--json {path}: cannot be written ({first_line(error)})") from None

    return write
