"""Objects of a user's own that a configuration names: `package.module:name`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mirai_ds.config.errors import ConfigError, nearest

_OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_own(name: str) -> bool:
    """Whether `name` has the form of an object's."""
    return _OWN.fullmatch(name) is not None


def check_name(name: str, known: Iterable[str], field: str, renamed: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError unless `name` is one of `known` or has the form of an object's; renamed: old names -> new."""
    if name not in (known := list(known)) and not is_own(name):
        raise ConfigError(field, name, f"{nearest(name, known, renamed)}; your own is package.module:name")


def import_own(name: str, field: str) -> Any:
    """The object `package.module:name`.  Raises ConfigError when it cannot be imported."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        problem = f"cannot be imported ({error}); is its folder on PYTHONPATH?"
        raise ConfigError(field, name, problem) from None
