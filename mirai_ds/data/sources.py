"""The configured data: opened, checked against the model, split into training and held-out samples.

A kind of data is an entry of `SOURCES`, beside its traits in `config/run_config.py: SOURCES`; a function of the user's
own is named `package.module:function` and takes the `data` section.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mirai_ds.config import ConfigError, DataConfig, ModelConfig
from mirai_ds.config.own import import_own
from mirai_ds.data.digits import digits
from mirai_ds.data.meaning import Meaning
from mirai_ds.data.npz_file import from_npz
from mirai_ds.data.store_source import check_store, from_store, store_decoder, store_meaning
from mirai_ds.data.token_source import Dataset, TokenDecoder, TokenSource
from mirai_ds.runtime.log import LOG

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class DataSource:
    """One kind of data.

    open: the `data` section and the device of a decoder -> its samples.  decoder: what shows its tokens, opening no
    more than that needs (None: what `open` gives).  check: reads all of `data.path` and raises UserError for damage.
    meaning: what labels stand for, where that can be said without opening all.
    """

    open: Callable[[DataConfig, str], TokenSource]
    decoder: Callable[[DataConfig, str], TokenDecoder | None] | None = None
    check: Callable[[str], None] | None = None
    meaning: Callable[[DataConfig], Meaning | None] = lambda data: None


SOURCES = {
    "digits": DataSource(lambda data, device: digits()),
    "npz": DataSource(lambda data, device: from_npz(data.path or "")),
    "store": DataSource(from_store, store_decoder, check_store, store_meaning),
}


def source_of(data: DataConfig) -> DataSource:
    """The configured entry, or the user's own function as one.  Raises ConfigError when that cannot be imported."""
    if data.source in SOURCES:
        return SOURCES[data.source]
    return DataSource(lambda data, device: _own(data))


def _own(data: DataConfig) -> TokenSource:
    made = import_own(data.source, "data.source")(data)
    if not isinstance(made, TokenSource):
        problem = f"must return a mirai_ds.data.TokenSource, not {type(made).__name__}"
        raise ConfigError("data.source", data.source, problem)
    return made


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
    open_source = source_of(data).open
    source = open_source(data, device)
    if len(source) < 2:
        raise ConfigError("data.path", data.path, f"holds {len(source)} images; it must hold at least 2")
    check_fits(source, model)
    if data.held_out_path is not None:
        apart: dict[str, Any] = {"path": data.held_out_path, "more_views": [], "images": None, "tokenizer": None}
        held_out = open_source(data.model_copy(update=apart), device)
        _check_same_meaning(source, held_out, data)
        check_fits(held_out, model)
        return Dataset(source, replace(held_out, decoder=source.decoder))
    train, held = split(source.labels, data.held_out_fraction or 0.0, data.split_seed)
    return Dataset(source if not len(held) else source.subset(train), source.subset(held))


def _check_same_meaning(train: TokenSource, held_out: TokenSource, data: DataConfig) -> None:
    """Raises ConfigError where held-out labels or codes mean other things; says what of it is not known."""
    if train.meaning is None or held_out.meaning is None:
        return
    problem = train.meaning.conflict(held_out.meaning, "data.path", fewer=True)
    if problem is not None:
        raise ConfigError(
            "data.held_out_path", data.held_out_path, f"{problem}; give held-out samples of the same kind"
        )
    unknown, cuts = train.meaning.unknown(held_out.meaning), train.meaning.cuts_differ(held_out.meaning)
    if unknown:
        LOG.info("data.held_out_path: %s not compared with data.path's: not known of both", " and ".join(unknown))
    if cuts is not None:
        LOG.info("data.held_out_path: %s of data.path", cuts)


def check_files(data: DataConfig) -> None:
    """Read all of what the configuration names, where its kind has digests.  Raises UserError for damage."""
    check = source_of(data).check
    for path in (data.path, *data.more_views, data.held_out_path):
        if check is not None and path:
            check(path)


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


def load_meaning(data: DataConfig | None) -> Meaning | None:
    """What the configured data's labels stand for; None where that is not known without opening all of it."""
    return None if data is None else source_of(data).meaning(data)


def load_decoder(data: DataConfig, device: str = "cpu") -> TokenDecoder | None:
    """What shows the configured data's tokens, a network on `device`; None where nothing does.  Opens no more than
    that needs."""
    source = source_of(data)
    return source.open(data, device).decoder if source.decoder is None else source.decoder(data, device)
