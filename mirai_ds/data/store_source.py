"""A token store as a source, with the images and the tokenizer that the configuration names."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from mirai_ds.config import ConfigError, DataConfig, UserError
from mirai_ds.data.folder_walk import is_hidden
from mirai_ds.data.meaning import Meaning
from mirai_ds.data.stacked import StackedCodes, StackedViews
from mirai_ds.data.stores import (
    IMAGE_FORMAT,
    TOKEN_FORMAT,
    ImageStore,
    TokenStore,
    open_image_store,
    open_token_store,
    store_format,
)
from mirai_ds.data.token_source import TokenDecoder, TokenSource
from mirai_ds.data.views import FileViews, PackedViews, ViewSource
from mirai_ds.runtime.log import LOG
from mirai_ds.tokenizer import open_tokenizer

Array = np.ndarray[Any, Any]


def from_store(data: DataConfig, device: str = "cpu") -> TokenSource:
    """`data.path`, `data.more_views` opened.  device: where a tokenizer that shows tokens runs.  Raises UserError."""
    store = open_token_store(Path(data.path or ""))
    stores = [store]
    for path in data.more_views:
        stores.append(_another(stores, path))
    images = None if data.images is None else [_images(one, Path(data.images)) for one in stores]
    odd = next((name for name in store.manifest.classes if is_hidden(name)), None)
    if odd is not None:
        LOG.warning("data.path: %s counts %r as a class, a system's folder: extract it again", store.path, odd)
    digests = [digest for one in stores for digest in one.manifest.codes_digests]
    single = len(stores) == 1
    return TokenSource(
        store.codes if single else StackedCodes([one.codes for one in stores]), store.labels,
        None if images is None else images[0] if single else StackedViews(images, store.manifest.num_views),
        _decoder(data, store, device), max_code=max(one.manifest.max_code for one in stores),
        seal=hashlib.sha256("".join(digests).encode()).hexdigest(), meaning=_meaning(store),
    )  # fmt: skip


def _another(stores: list[TokenStore], path: str) -> TokenStore:
    """A further store of the images of `stores`, other views of them.  Raises UserError for anything else."""
    store, other, field = stores[0], open_token_store(Path(path)), "data.more_views"
    ours, theirs = store.manifest, other.manifest
    known, new = _meaning(store), _meaning(other)
    problem = known.conflict(new, "data.path")
    if problem is None and ours.upright != theirs.upright:
        problem = known.cuts_differ(new)
    if problem is None and other.codes.shape[1:] != store.codes.shape[1:]:
        shapes = [f"{facts.num_views} views of {facts.tokens_per_image} tokens" for facts in (theirs, ours)]
        problem = f"has {shapes[0]} an image, data.path {shapes[1]}: extract it with the same --size and --crops"
    again = next((one.path for one in stores if one.manifest.codes_digests == theirs.codes_digests), None)
    if problem is None and again is not None:
        problem = f"holds the same codes as {again}; give a store of another --crop-range, or remove it"
    if problem is not None:
        raise ConfigError(field, path, problem)
    _check_same_images(store, other, field)
    unknown = known.unknown(new) + ["file names"] * (not (ours.named and theirs.named))
    if unknown:
        LOG.info("%s: %s of %s not compared with data.path's: not known of both", field, ", ".join(unknown), path)
    return other


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
        _check_labels(store.labels, views.images.labels(), "data.images", path)
        return views
    images = open_image_store(path)
    ours, theirs = store.manifest, images.manifest
    if (ours.geometry, ours.upright) != (theirs.geometry, theirs.upright):
        cuts = [f"{facts.geometry}{', turned upright' * facts.upright}" for facts in (theirs, ours)]
        problem = (
            f"its views are {cuts[0]}; those of {store.path} are {cuts[1]}; extract the images with the same settings"
        )
        raise ConfigError("data.images", str(path), f"{problem}, or give the folder of the original images")
    _check_same_images(store, images, "data.images")
    return PackedViews(images)


def _check_same_images(store: TokenStore, other: TokenStore | ImageStore, field: str) -> None:
    """Raises ConfigError unless both are of the same images in the same order, by their names where those are known."""
    ours, theirs = store.manifest, other.manifest
    named = isinstance(other, ImageStore) or (ours.named and theirs.named)
    if ours.num_images != theirs.num_images or (named and ours.names_digest != theirs.names_digest):
        pairs = zip(store.names(), other.names(), strict=False) if named else ()
        place, names = next(((i, p) for i, p in enumerate(pairs) if p[0] != p[1]), (None, None))
        counts = f"it has {theirs.num_images}, the token store {ours.num_images}"
        where = f"image {place} is {names[1]!r} there and {names[0]!r} in the token store" if names else counts
        raise ConfigError(field, str(other.path), f"was not made of the same images: {where}")
    _check_labels(store.labels, other.labels, field, other.path)


def _check_labels(ours: Array, theirs: Array | None, field: str, path: Path) -> None:
    """Files of the same names, as of MNIST and Fashion-MNIST, may be other images.  theirs: None where not known."""
    if theirs is None:
        return
    differs = np.flatnonzero(ours != theirs)
    if len(differs):
        place = int(differs[0])
        label = f"image {place} has label {theirs[place]} there and {ours[place]} in the token store"
        raise ConfigError(field, str(path), f"was not made of the same images: {label}")


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


def store_meaning(data: DataConfig) -> Meaning | None:
    """What the store's labels and codes stand for, by its manifest alone; None where it is gone."""
    try:
        return _meaning(open_token_store(Path(data.path or "")))
    except UserError:
        return None


def check_store(path: str) -> None:
    """Whether the codes are those that were extracted: every digest.  Raises UserError at the first that is not."""
    for damage in open_token_store(Path(path)).damages():
        raise UserError(damage)
