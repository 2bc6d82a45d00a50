"""Weight files: reading those of unknown origin (.pt, .pth, .bin, .safetensors) without running anything in them."""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mirai_ds.config import UserError

SAFETENSORS = ".safetensors"


def read_weight_file(path: Path) -> Any:
    """The content of a weights file on CPU: a dict of tensors for .safetensors, whatever a torch file holds otherwise.

    Torch files may be mapped into memory: clone what is to outlive the rest.  Raises UserError when it is missing, a
    folder, unreadable, or holds anything but tensors, plain values and argparse.Namespace.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a weights file; give a file inside it")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return read_safetensors_file(path) if path.suffix == SAFETENSORS else read_torch_file(path)


def read_safetensors_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, on CPU.  Raises UserError when it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: is not a readable .safetensors file ({first_line(error)})") from None


def read_safetensors_notes(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file.  Raises UserError when it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: is not a readable .safetensors file ({first_line(error)})") from None


def write_safetensors(path: Path, tensors: dict[str, Tensor], notes: dict[str, str] | None = None) -> None:
    """Write a .safetensors file that others may read as the umask allows: safetensors makes its owner's alone.

    Raises what safetensors or the system raise.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, notes)
    path.chmod(mode)


# What numpy's numbers are pickled as: they hold bytes, and reading them runs nothing.
_NUMBERS = {type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + np.typecodes["Float"]}
_PLAIN: list[Any] = [argparse.Namespace, np.dtype, *_NUMBERS]
_PLAIN += [(np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


def read_torch_file(path: Path) -> Any:
    """The file's content by torch's restricted unpickler; argparse.Namespace (LlamaGen's `args`) and numpy's numbers
    are allowed.

    On CPU, mapped into memory where the format allows.  Raises UserError when it cannot be read or holds other objects.
    """
    try:
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL ([\w.]+)", str(error))
        if name is None:
            raise UserError(f"{path}: is not a readable torch file ({first_line(error)})") from None
        raise UserError(
            f"{path}: refused, nothing in it was executed: it holds a {name[1]} object, not only tensors and plain "
            "values; save its state dict alone and give that file"
        ) from None
    except Exception as error:  # bytes from anywhere: torch raises nearly any type on them
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{path}: is not a readable torch file ({reason})") from None


def first_line(error: Exception) -> str:
    """The first sentence of an error's text, short enough for a one-line message."""
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0].strip()[:160]
