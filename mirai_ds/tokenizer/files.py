"""Tokenizers by their files."""

from __future__ import annotations

from pathlib import Path

from mirai_ds.tokenizer.interface import Tokenizer
from mirai_ds.tokenizer.patch_codebook import PatchCodebook
from mirai_ds.tokenizer.vq import VQTokenizer


def open_tokenizer(path: Path, device: str = "cpu", precision: str = "fp32") -> Tokenizer:
    """The tokenizer in a file: a patch codebook (.npz), else VQ weights; raises UserError.

    device and precision: of the VQ networks.  A patch codebook works exactly, on the CPU, whatever they are.
    """
    if Path(path).suffix == ".npz":
        return PatchCodebook.load(Path(path))
    return VQTokenizer.load(Path(path), device, precision)
