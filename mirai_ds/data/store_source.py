"""A token store as a source, with the images and the tokenizer that the configuration names."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from mirai_ds.config import ConfigError, DataConfig, UserError
from mirai_ds.data.meaning import Meaning
from mirai_ds.data.stores import (
    IMAGE_FORMAT,
    TOKEN_FORMAT,
    TokenStore,
    open_image_store,
    open_token_store,
    store_format,
)
from mirai_ds.data.token_source import TokenDecoder, TokenSource
from mirai_ds.data.views import FileViews, PackedViews, ViewSource
from mirai_ds.tokenizer import open_tokenizer

Array = np.ndarray[Any, Any]


def from_store(data: DataConfig, device: str = "cpu") -> TokenSource:
    """`data.path` opened.  device: where a tokenizer that shows tokens runs.  Raises UserError."""
    store = open_token_store(Path(data.path or ""))
    images = None if data.images is None else _images(store, Path(data.images))
    decoder = _decoder(data, store, device)
    manifest = store.manifest
    seal = hashlib.sha256("".join(manifest.codes_digests).encode()).hexdigest()
    return TokenSource(
        store.codes, store.labels, images, decoder, max_code=manifest.max_code, seal=seal, meaning=_meaning(store)
    )


def _meaning(store: TokenStore) -> Meaning:
    made_with, facts = store.manifest.tokenizer, store.manifest
    return Meaning(
        facts.classes if facts.named else None,
        (made_with.name, made_with.digest) if made_with.digest != "unknown" else None,
        facts.geometry.views, facts.upright,
    )  # fmt: skip


def _images(store: TokenStore, path: Path) -> ViewSource:
    """Pixels of the store's views: from an image store, or from the original files."""
    form = store_format(path)
    if form == TOKEN_FORMAT:
        raise ConfigError("data.images", str(path), "is a token store; give an image store or the folder of the images")
    if form != IMAGE_FORMAT:
        if not path.is_dir():
            raise ConfigError("data.images", str(path), "no such folder")
        views = FileViews(path, store.names(), store.manifest.geometry.views, store.manifest.upright)
        _check_labels(store.labels, views.images.labels(), path)
        return views
    images = open_image_store(path)
    ours, theirs = store.manifest, images.manifest
    if (ours.geometry, ours.upright) != (theirs.geometry, theirs.upright):
        cuts = [f"{facts.geometry}{', turned upright' * facts.upright}" for facts in (theirs, ours)]
        problem = f"its views are {cuts[0]}; those of {store.path} are {cuts[1]}"
        raise ConfigError("data.images", str(path), f"{problem}; extract the images with the same settings")
    if ours.names_digest != theirs.names_digest:
        pairs = zip(store.names(), images.names(), strict=False)
        place, names = next(((i, p) for i, p in enumerate(pairs) if p[0] != p[1]), (None, None))
        where = f"image {place} is {names[1]!r} there and {names[0]!r} in the token store" if names else "other counts"
        raise ConfigError("data.images", str(path), f"was not made of the same images: {where}")
    _check_labels(store.labels, images.labels, path)
    return PackedViews(images)


def _check_labels(ours: Array, theirs: Array | None, path: Path) -> None:
    """Files of the same names, as of MNIST and Fashion-MNIST, may be other images.  theirs: None where not known."""
    if theirs is None:
        return
    differs = np.flatnonzero(ours != theirs)
    if len(differs):
        place = int(differs[0])
        label = f"image {place} has label {theirs[place]} there and {ours[place]} in the token store"
        raise ConfigError("data.images", str(path), f"was not made of the same images: {label}")


def _decoder(data: DataConfig, store: TokenStore, device: str) -> TokenDecoder | None:
    own, facts = store.codebook(), store.manifest.tokenizer
    if data.tokenizer is None:
        return own
    tokenizer = open_tokenizer(Path(data.tokenizer), device)
    if facts.digest not in ("unknown", tokenizer.digest):
        problem = (
            f"is {tokenizer.name} {tokenizer.digest[:12]}, the store was made with {facts.name} {facts.digest[:12]}"
        )
        raise ConfigError("data.tokenizer", data.tokenizer, problem)
    return tokenizer


def store_decoder(data: DataConfig, device: str = "cpu") -> TokenDecoder | None:
    """What shows the store's tokens; the store may be gone where samples are drawn, if `data.tokenizer` is there."""
    try:
        store = open_token_store(Path(data.path or ""))
    except UserError:
        if data.tokenizer is None:
            raise
        return open_tokenizer(Path(data.tokenizer), device)
    return _decoder(data, store, device)


def check_store(path: str) -> None:
    """Whether the codes are those that were extracted: every digest.  Raises UserError at the first that is not."""
    for damage in open_token_store(Path(path)).damages():
        raise UserError(damage)
