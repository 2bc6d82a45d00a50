"""mirai_ds: DeepSpeed trainer for autoregressive image models with Mirai foresight alignment."""

from mirai_ds.version import __version__

__all__ = ["__version__"]
