"""The configured data: opened, checked against the model, split into training and held-out samples."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mirai_ds.config import ConfigError, DataConfig, ModelConfig, UserError
from mirai_ds.data.npz_file import from_npz
from mirai_ds.data.stores import (
    IMAGE_FORMAT,
    TOKEN_FORMAT,
    TokenManifest,
    TokenStore,
    open_image_store,
    open_token_store,
    store_format,
)
from mirai_ds.data.stores.files import read_manifest
from mirai_ds.data.token_source import Dataset, TokenDecoder, TokenSource
from mirai_ds.data.views import ArrayViews, FileViews, PackedViews, ViewSource
from mirai_ds.tokenizer import PatchCodebook, open_tokenizer

Array = np.ndarray[Any, Any]


def digits() -> TokenSource:
    """scikit-learn's handwritten digits: 1,797 of 8x8 pixels with 17 grey levels, so the pixels *are* the code."""
    from sklearn.datasets import load_digits

    data = load_digits()
    codes = data.images.astype(np.uint8)
    grey = np.round(np.arange(17) * (255 / 16)).astype(np.uint8)
    images = np.repeat(grey[codes][:, None, None], 3, axis=2)
    codebook = np.broadcast_to(grey[:, None, None, None], (17, 1, 1, 3)).copy()
    labels = data.target.astype(np.int64)
    return TokenSource(codes.reshape(len(codes), 1, 64), labels, ArrayViews(images), PatchCodebook(codebook))


def from_store(data: DataConfig, path: Path, device: str = "cpu") -> TokenSource:
    """A token store, with the images and the tokenizer that the configuration names.  Raises UserError."""
    store = open_token_store(path)
    images = None if data.images is None else _images(store, Path(data.images))
    decoder = _decoder(data, store, device)
    manifest = store.manifest
    seal = hashlib.sha256("".join(manifest.codes_digests).encode()).hexdigest()
    return TokenSource(store.codes, store.labels, images, decoder, max_code=manifest.max_code, seal=seal)


def _images(store: TokenStore, path: Path) -> ViewSource:
    """Pixels of the store's views: from an image store, or from the original files."""
    found = store_format(path)
    if found == TOKEN_FORMAT:
        raise ConfigError("data.images", str(path), "is a token store; give an image store or the folder of the images")
    if found != IMAGE_FORMAT:
        if not path.is_dir():
            raise ConfigError("data.images", str(path), "no such folder")
        return FileViews(path, store.names(), store.manifest.geometry.views)
    images = open_image_store(path)
    ours, theirs = store.manifest.geometry, images.manifest.geometry
    if ours != theirs:
        problem = f"its views are {theirs}; those of {store.path} are {ours}; extract the images with the same settings"
        raise ConfigError("data.images", str(path), problem)
    if store.manifest.names_digest != images.manifest.names_digest:
        pairs = zip(store.names(), images.names(), strict=False)
        place, names = next(((i, p) for i, p in enumerate(pairs) if p[0] != p[1]), (None, None))
        where = f"image {place} is {names[1]!r} there and {names[0]!r} in the token store" if names else "other counts"
        raise ConfigError("data.images", str(path), f"was not made of the same images: {where}")
    return PackedViews(images)


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


def check_fits(source: TokenSource, model: ModelConfig) -> None:
    """Codes, labels and token count within the model's; raises ConfigError naming the field to change."""
    if source.codes.shape[2] != model.block_size:
        problem = f"the data has {source.codes.shape[2]} tokens an image; use that"
        raise ConfigError("model.block_size", model.block_size, problem)
    codes, labels = source.largest_code(), int(source.labels.max())
    if codes >= model.vocab_size:
        problem = f"the data's codes go up to {codes}; use at least {codes + 1}"
        raise ConfigError("model.vocab_size", model.vocab_size, problem)
    if labels >= model.num_classes:
        problem = f"the data's labels go up to {labels}; use at least {labels + 1}"
        raise ConfigError("model.num_classes", model.num_classes, problem)
    if source.decoder is not None and source.decoder.vocab_size != model.vocab_size:
        problem = f"the data's codebook has {source.decoder.vocab_size} entries; use that"
        raise ConfigError("model.vocab_size", model.vocab_size, problem)


def load_dataset(data: DataConfig, model: ModelConfig, device: str = "cpu") -> Dataset:
    """The configured source, checked against the model and split by class with a fixed seed, or as `held_out_path`
    says.  device: where a tokenizer that shows samples runs.  Raises UserError."""
    source = _open(data, data.path, device)
    if len(source) < 2:
        raise ConfigError("data.path", data.path, f"holds {len(source)} images; it must hold at least 2")
    check_fits(source, model)
    if data.held_out_path is not None:
        held_out = _open(data.model_copy(update={"images": None, "tokenizer": None}), data.held_out_path, device)
        check_fits(held_out, model)
        if data.source == "store":
            _check_same_tokenizer(Path(data.path or ""), Path(data.held_out_path))
        return Dataset(source, replace(held_out, decoder=source.decoder))
    train, held = split(source.labels, data.held_out_fraction or 0.0, data.split_seed)
    return Dataset(source if not len(held) else source.subset(train), source.subset(held))


def _check_same_tokenizer(train: Path, held_out: Path) -> None:
    """Codes of two tokenizers look alike and mean other things; imported ones may be of an unknown one."""
    ours, theirs = (read_manifest(path, TokenManifest).tokenizer for path in (train, held_out))
    if "unknown" not in (ours.digest, theirs.digest) and ours.digest != theirs.digest:
        problem = f"was made with {theirs.name} {theirs.digest[:12]}, data.path with {ours.name} {ours.digest[:12]}"
        raise ConfigError("data.held_out_path", str(held_out), problem)


def _open(data: DataConfig, path: str | None, device: str) -> TokenSource:
    if data.source == "digits":
        return digits()
    return from_npz(path or "") if data.source == "npz" else from_store(data, Path(path or ""), device)


def split(labels: Array, fraction: float, seed: int) -> tuple[Array, Array]:
    """Sorted sample numbers for training and held out, each class in both where that is possible."""
    from sklearn.model_selection import train_test_split

    if fraction == 0:
        return np.arange(len(labels)), np.arange(0)
    counts = np.unique(labels, return_counts=True)[1]
    held = min(max(1, round(len(labels) * fraction)), len(labels) - 1)
    possible = counts.min() > 1 and min(held, len(labels) - held) >= len(counts)
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=held, random_state=seed, stratify=labels if possible else None
    )
    return np.sort(train), np.sort(held_out)


def load_decoder(data: DataConfig, device: str = "cpu") -> TokenDecoder | None:
    """What shows the configured data's tokens, a network on `device`; None where nothing does.  Opens no more than
    that needs."""
    if data.source != "store":
        source = digits() if data.source == "digits" else from_npz(data.path or "")
        return source.decoder
    try:
        store = open_token_store(Path(data.path or ""))
    except UserError:
        if data.tokenizer is None:
            raise
        return open_tokenizer(Path(data.tokenizer), device)  # the store may be gone where samples are drawn
    return _decoder(data, store, device)
