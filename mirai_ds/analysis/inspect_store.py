"""What a store holds, and whether every byte of it is what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mirai_ds.config import UserError
from mirai_ds.data.stores import (
    IMAGE_FORMAT,
    TOKEN_FORMAT,
    ImageStore,
    TokenStore,
    open_image_store,
    open_token_store,
    store_format,
)
from mirai_ds.data.stores.files import read_manifest
from mirai_ds.data.stores.tokens import TokenManifest
from mirai_ds.runs.records import size_text as size_text  # where no torch is needed
from mirai_ds.runtime.time_left import TimeLeft


def inspect_store(path: Path, verify: bool) -> tuple[list[str], list[str]]:
    """Lines that describe the store at `path`, and with `verify` a line for each damage.  Raises UserError."""
    store = _open(path)
    lines = _tokens(store) if isinstance(store, TokenStore) else _images(store)
    damages = _verified(store) if verify else []
    if verify:
        lines.append(f"{'verified':12} {'every digest fits' if not damages else f'{len(damages)} damages'}")
    return lines, damages


def store_as_json(path: Path, verify: bool) -> dict[str, Any]:
    """The store's manifest, and with `verify` its damages, under stable keys.  Raises UserError."""
    store = _open(path)
    return {
        "kind": "token store" if isinstance(store, TokenStore) else "image store",
        "path": str(path),
        "manifest": store.manifest.model_dump(mode="json"),
        "digests_read": verify,
        "damages": _verified(store) if verify else [],
    }


def _open(path: Path) -> TokenStore | ImageStore:
    kind = store_format(path)
    if kind == TOKEN_FORMAT:
        return open_token_store(path)
    if kind == IMAGE_FORMAT:
        return open_image_store(path)
    read_manifest(path, TokenManifest)  # says what is wrong with it
    raise UserError(f"{path}: is a store of a kind this version does not know: {kind!r}")


def _verified(store: TokenStore | ImageStore) -> list[str]:
    if isinstance(store, TokenStore):
        what, total = "images", len(store.labels)
    else:
        what, total = "shards", len(store.manifest.shard_digests)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeLeft(0))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:  # stdout may be JSON
        task = bar.add_task(what, total=total)
        return store.damages(lambda done: bar.update(task, completed=done))


def _tokens(store: TokenStore) -> list[str]:
    m = store.manifest
    side = round(m.tokens_per_image**0.5)
    return [
        f"{'store':12} {store.path}: tokens, {size_text(store.codes.nbytes)}",
        f"{'content':12} {m.num_images} images x {m.num_views} views x {m.tokens_per_image} tokens ({side}x{side})",
        f"{'tokenizer':12} {m.tokenizer.name}, {m.tokenizer.vocab_size} codes (largest here {m.max_code}), "
        f"digest {m.tokenizer.digest[:12]}",
        *_shared(store),
    ]


def _images(store: ImageStore) -> list[str]:
    m = store.manifest
    side, quality = m.geometry.views.side, "" if m.quality is None else f" {m.quality}"
    return [
        f"{'store':12} {store.path}: images, {size_text(sum(m.shard_bytes))} in {len(m.shard_bytes)} shards",
        f"{'content':12} {m.num_images} crops of {side}x{side} pixels as {m.encoding}{quality}",
        *_shared(store),
    ]


def _shared(store: TokenStore | ImageStore) -> list[str]:
    m, geometry = store.manifest, store.manifest.geometry
    counts = np.bincount(store.labels, minlength=len(m.classes))
    ends = m.classes[0] if len(m.classes) == 1 else f"{m.classes[0]} ... {m.classes[-1]}"
    made_with = ", ".join(f"{name} {value[:24]}" for name, value in sorted(m.made_with.items()) if value)
    ten = f", crop range {geometry.crop_range:g}" if geometry.crops == "ten" else ""
    return [
        f"{'views':12} {geometry.crops} of {geometry.image_size} pixels{ten}",
        f"{'classes':12} {len(m.classes)} ({ends}), {counts.min()} to {counts.max()} images each",
        f"{'problems':12} {m.failed} images could not be read, {m.converted} were converted (problems.jsonl)",
        f"{'made with':12} {made_with}",
        f"{'seal':12} {m.seal}",
    ]
