"""What a program of one's own imports, as `import mirai_ds as m`: trained models to draw from and look into, and the
alignment for networks of one's own.

Every name here is one of `mirai_ds` too, which loads it at its first use.
"""

from mirai_ds.config import ForesightConfig, UserError
from mirai_ds.kernels.foresight_cosine import foresight_cosine
from mirai_ds.library.alignment import Aligned, ForesightAlignment
from mirai_ds.library.image_model import ImageModel, Samples

__all__ = [
    "Aligned",
    "ForesightAlignment",
    "ForesightConfig",
    "ImageModel",
    "Samples",
    "UserError",
    "foresight_cosine",
]
