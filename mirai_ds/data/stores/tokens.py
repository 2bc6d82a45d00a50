"""The token store: every view's codes of every image in one memory-mapped uint16 array.

codes.npy       (images, views, tokens) uint16, raster order      labels.npy  (images,) int32
names.txt       one file name a line, in the same order           problems.jsonl
manifest.json   counts, geometry, tokenizer, digests              tokenizer.npz  (patch codebooks only)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from mirai_ds.config import UserError
from mirai_ds.config.model_config import Section
from mirai_ds.data.stores.files import (
    DIGEST,
    LABELS,
    MANIFEST,
    NAMES,
    PROBLEMS,
    StoreManifest,
    check_digest,
    complaints,
    open_array,
    read_labels,
    read_manifest,
    read_names,
)
from mirai_ds.tokenizer import PatchCodebook

Array = np.ndarray[Any, Any]

TOKEN_FORMAT: Literal["mirai_ds tokens 1"] = "mirai_ds tokens 1"
CODES, TOKENIZER = "codes.npy", "tokenizer.npz"
DIGEST_IMAGES = 4096  # images a digest covers: 21 MB of ImageNet's codes at 256 pixels


class TokenizerFacts(Section):
    """What made the codes.  `unknown` for imported ones: LlamaGen's files do not say."""

    name: str
    digest: str
    vocab_size: int = Field(ge=1, le=65536)


class TokenManifest(StoreManifest):
    """See the module."""

    format: Literal["mirai_ds tokens 1"] = TOKEN_FORMAT
    num_views: int = Field(ge=1)
    tokens_per_image: int = Field(ge=1)
    max_code: int = Field(ge=0, le=65535)
    tokenizer: TokenizerFacts
    codebook_digest: str | None = Field(None, pattern=DIGEST, description="of tokenizer.npz, where there is one")
    digest_images: int = Field(ge=1)
    codes_digests: list[str]


@dataclass(frozen=True)
class TokenStore:
    """codes (n, views, tokens) uint16, mapped; labels (n,) int32, in memory."""

    path: Path
    manifest: TokenManifest
    codes: Array
    labels: Array

    def names(self) -> list[str]:
        """File names in order; reads and checks names.txt."""
        return read_names(self.path, self.manifest)

    def codebook(self) -> PatchCodebook | None:
        """The patch codebook the codes were made with, if it was one.  Raises UserError when it is damaged."""
        path, facts = self.path / TOKENIZER, self.manifest.tokenizer
        if facts.name != PatchCodebook.name:
            return None
        check_digest(path, self.manifest.codebook_digest or "")
        codebook = PatchCodebook.load(path)
        if codebook.digest != facts.digest:
            raise UserError(f"{path}: does not have the digest in the manifest; it is damaged")
        return codebook

    def files(self) -> list[str]:
        """Names of all files of the store, the manifest last."""
        own = [TOKENIZER] if self.manifest.codebook_digest is not None else []
        return [CODES, LABELS, NAMES, PROBLEMS, *own, MANIFEST]

    def damages(self, progress: Callable[[int], None] = lambda _: None) -> list[str]:
        """Read everything and compare digests: a line for each damage.  progress is told the images read so far."""
        problems = partial(check_digest, self.path / PROBLEMS, self.manifest.problems_digest)
        damages = complaints(self.names, self.codebook, problems)
        step = self.manifest.digest_images
        for block, digest in enumerate(code_digests(self.codes, step)):
            if digest != self.manifest.codes_digests[block]:
                last = min((block + 1) * step, len(self.codes)) - 1
                damages.append(
                    f"{self.path / CODES}: images {block * step} to {last} do not have the digest of their codes"
                )
            progress(min((block + 1) * step, len(self.codes)))
        return damages


def code_digests(codes: Array, step: int = DIGEST_IMAGES) -> Iterator[str]:
    """sha256 of each `step` images' codes."""
    for start in range(0, len(codes), step):
        yield hashlib.sha256(codes[start : start + step].tobytes()).hexdigest()


def open_token_store(path: Path) -> TokenStore:
    """Open and check a store: manifest and its seal, shape and length of every array, digest and range of the labels.

    The digests of the codes are not read (`TokenStore.damages` does).  Raises UserError.
    """
    manifest = read_manifest(path, TokenManifest)
    shape = (manifest.num_images, manifest.num_views, manifest.tokens_per_image)
    blocks = -(-manifest.num_images // manifest.digest_images)
    views = manifest.geometry.views.num_views
    if len(manifest.codes_digests) != blocks or views != manifest.num_views:
        raise UserError(f"{path}: its manifest contradicts itself (views or digests); extract the store again")
    return TokenStore(path, manifest, open_array(path / CODES, "uint16", shape), read_labels(path, manifest))
