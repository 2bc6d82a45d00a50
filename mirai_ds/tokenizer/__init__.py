"""Tokenizers: images to codes and back.  LlamaGen's VQ networks, and a codebook of pixel patches for small images."""

from mirai_ds.tokenizer.files import open_tokenizer
from mirai_ds.tokenizer.interface import Tokenizer
from mirai_ds.tokenizer.patch_codebook import PatchCodebook, ReconstructionError, reconstruction_error
from mirai_ds.tokenizer.vq import PRECISIONS, VQTokenizer
from mirai_ds.tokenizer.vq_model import VQ8, VQ16, VQConfig, VQModel

__all__ = [
    "PRECISIONS",
    "VQ8",
    "VQ16",
    "PatchCodebook",
    "ReconstructionError",
    "Tokenizer",
    "VQConfig",
    "VQModel",
    "VQTokenizer",
    "open_tokenizer",
    "reconstruction_error",
]
