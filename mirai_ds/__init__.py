"""mirai_ds: DeepSpeed trainer for autoregressive image models with Mirai foresight alignment."""

import os

from mirai_ds.version import __version__

__all__ = ["__version__"]

# Installed, `kernels` and `ds_configs` are inside this package; in a source tree they lie beside it, and a machine
# without a network can run from that as it is: python -m mirai_ds, python -m pytest.
_tree = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_tree, "kernels", "toolchain.py")):
    __path__.append(_tree)
