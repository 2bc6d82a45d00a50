"""mirai_ds: DeepSpeed trainer for autoregressive image models with Mirai foresight alignment.

What a program of one's own imports is here, loaded at its first use: see docs/library.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mirai_ds.version import __version__

if TYPE_CHECKING:
    from mirai_ds.config import ForesightConfig, UserError
    from mirai_ds.kernels.foresight_cosine import foresight_cosine
    from mirai_ds.library import Aligned, ForesightAlignment, ImageModel, Samples

_PLACES = {
    "Aligned": "library",
    "ForesightAlignment": "library",
    "ForesightConfig": "config",
    "ImageModel": "library",
    "Samples": "library",
    "UserError": "config",
    "foresight_cosine": "kernels.foresight_cosine",
}

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
    if name not in _PLACES:
        raise AttributeError(f"module 'mirai_ds' has no attribute {name!r}")
    return getattr(import_module(f"mirai_ds.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
