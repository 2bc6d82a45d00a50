"""mirai_ds: DeepSpeed trainer for autoregressive image models with Mirai foresight alignment.

What a program of one's own imports is in `mirai_ds.library` and, loaded at its first use, here: see docs/library.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mirai_ds.version import __version__

if TYPE_CHECKING:
    from mirai_ds.library import (
        Aligned,
        ForesightAlignment,
        ForesightConfig,
        ImageModel,
        Samples,
        UserError,
        foresight_cosine,
    )

__all__ = [
    "Aligned",
    "ForesightAlignment",
    "ForesightConfig",
    "ImageModel",
    "Samples",
    "UserError",
    "__version__",
    "foresight_cosine",
]


def __getattr__(name: str) -> Any:
    """Imports what is asked for only now: `mirai-ds --help` shall not wait for PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module 'mirai_ds' has no attribute {name!r}")
    return getattr(import_module("mirai_ds.library"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
