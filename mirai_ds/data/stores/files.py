"""What token and image stores share: a sealed manifest, labels and names, digests, files written aside.

A store is a folder that any NumPy can read without this package.  The manifest is written last: a folder without one is
an unfinished extraction, never a store.  It carries the digest of everything else and of itself.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import Field, ValidationError

from mirai_ds.config import UserError
from mirai_ds.config.errors import from_validation, shown
from mirai_ds.config.model_config import Section
from mirai_ds.data.crops import ViewGeometry
from mirai_ds.runtime.disk import digest_of_file, write_whole

Array = np.ndarray[Any, Any]

MANIFEST, LABELS, NAMES, PROBLEMS = "manifest.json", "labels.npy", "names.txt", "problems.jsonl"
DIGEST = r"^[0-9a-f]{64}$"


class GeometryFacts(Section):
    """How views were cut; see `ViewGeometry`."""

    image_size: int = Field(ge=1)
    crops: Literal["ten", "flip", "one"]
    crop_range: float = Field(ge=1)

    @property
    def views(self) -> ViewGeometry:
        """The geometry itself."""
        return ViewGeometry(self.image_size, self.crops, self.crop_range)


class StoreManifest(Section):
    """What both kinds of store say of themselves."""

    num_images: int = Field(ge=1)
    geometry: GeometryFacts
    classes: list[str] = Field(min_length=1)
    failed: int = Field(ge=0, description="images that could not be read; listed in problems.jsonl")
    converted: int = Field(ge=0, description="images kept after a conversion of note; listed in problems.jsonl")
    made_with: dict[str, str] = Field(description="versions and settings that decide the content")
    labels_digest: str = Field(pattern=DIGEST)
    names_digest: str = Field(pattern=DIGEST)
    problems_digest: str = Field(pattern=DIGEST)

    @property
    def named(self) -> bool:
        """Whether images and classes have names: those of imported codes may be numbers that say nothing."""
        return "from" not in self.made_with or self.classes != [str(label) for label in range(len(self.classes))]

    @property
    def upright(self) -> bool:
        """Whether photographs were turned by their orientation tag."""
        return self.made_with.get("orientation") == "applied"

    seal: str = Field("", description="sha256 of this file's other fields")


M = TypeVar("M", bound=StoreManifest)


def seal_of(manifest: StoreManifest) -> str:
    """sha256 of the manifest without its seal: the identity of the store's content."""
    text = json.dumps(manifest.model_dump(mode="json", exclude={"seal"}), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(folder: Path, manifest: StoreManifest) -> None:
    """Seal and write it: from now on the folder is a store."""
    sealed = manifest.model_copy(update={"seal": seal_of(manifest)})
    text = json.dumps(sealed.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / MANIFEST, text.encode())


def read_manifest(folder: Path, kind: type[M]) -> M:
    """The manifest in `folder`; raises UserError when it is missing, not of this `kind`, edited or damaged."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder}: no such store")
    if not path.is_file():
        unfinished = (folder / "plan.json").is_file()
        raise UserError(
            f"{folder}: extraction is not finished; give the same `mirai-ds extract` command again"
            if unfinished
            else f"{folder}: is not a store of mirai_ds (it has no {MANIFEST})"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); the file is damaged") from None
    form, wanted = data.get("format") if isinstance(data, dict) else None, kind.model_fields["format"].default
    if form != wanted:
        raise UserError(f"{path}: format = {shown(form)}: this must be a store of format {wanted!r}")
    try:
        manifest = kind.model_validate(data)
    except ValidationError as error:
        first = str(from_validation(error, kind, str(path))).splitlines()[0]
        raise UserError(f"{first}; the file was edited or is damaged") from None
    if seal_of(manifest) != manifest.seal:
        raise UserError(f"{path}: was edited or is damaged (its seal does not fit); extract the store again")
    return manifest


def store_format(folder: Path) -> str | None:
    """`format` of the manifest in `folder`; None where there is none that can be read."""
    try:
        form = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("format")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return form if isinstance(form, str) else None


def write_array(path: Path, array: Array) -> None:
    """A .npy file, whole or not at all."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_whole(path, buffer.getvalue())


def open_array(path: Path, dtype: str, shape: tuple[int, ...]) -> Array:
    """A .npy file mapped into memory, exactly of this type, shape and length.  Raises UserError."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the store is incomplete") from None
    except Exception as error:  # bytes from anywhere: NumPy's header parser raises nearly any type on them
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: is cut short or damaged ({reason})") from None
    if array.dtype != np.dtype(dtype) or array.shape != shape or not array.flags.c_contiguous:
        raise UserError(f"{path}: is {array.dtype} {array.shape}, the manifest says {dtype} {shape}")
    offset = getattr(array, "offset", None)
    if offset is None or path.stat().st_size != offset + array.nbytes:
        raise UserError(f"{path}: has {path.stat().st_size} bytes, not what its header says; it is damaged")
    return array


def read_labels(folder: Path, manifest: StoreManifest) -> Array:
    """(num_images,) int32 in memory, digest and range checked."""
    path = folder / LABELS
    labels = np.array(open_array(path, "int32", (manifest.num_images,)))
    if digest_of_file(path) != manifest.labels_digest:
        raise UserError(f"{path}: does not have the digest in the manifest; it is damaged")
    if int(labels.min()) < 0 or int(labels.max()) >= len(manifest.classes):
        raise UserError(
            f"{path}: labels span {labels.min()}..{labels.max()}, there are {len(manifest.classes)} classes"
        )
    return labels


def read_names(folder: Path, manifest: StoreManifest) -> list[str]:
    """The file name of each image, below the folder it was extracted from; digest checked."""
    path = folder / NAMES
    check_digest(path, manifest.names_digest)
    names = path.read_text(encoding="utf-8").split("\n")[:-1]
    if len(names) != manifest.num_images:
        raise UserError(f"{path}: has {len(names)} lines, the manifest says {manifest.num_images} images")
    return names


def check_digest(path: Path, digest: str) -> None:
    """Raises UserError when the file is missing or has another digest."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; the store is incomplete")
    if digest_of_file(path) != digest:
        raise UserError(f"{path}: does not have the digest in the manifest; it is damaged")


def complaints(*checks: Callable[[], object]) -> list[str]:
    """What those of `checks` say that raise UserError."""
    messages = []
    for check in checks:
        try:
            check()
        except UserError as error:
            messages.append(str(error))
    return messages


def write_lists(folder: Path, names: Iterable[str], labels: Array, problems: list[dict[str, Any]]) -> dict[str, Any]:
    """Write names, labels and problems; returns what the manifest says of them."""
    write_whole(folder / NAMES, "".join(f"{name}\n" for name in names).encode())
    write_array(folder / LABELS, labels.astype(np.int32))
    lines = "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in problems)
    write_whole(folder / PROBLEMS, lines.encode())
    digests = {"names_digest": NAMES, "labels_digest": LABELS, "problems_digest": PROBLEMS}
    kept = sum(problem["kept"] for problem in problems)
    counts = {"failed": len(problems) - kept, "converted": kept}
    return {**counts, **{field: digest_of_file(folder / name) for field, name in digests.items()}}
