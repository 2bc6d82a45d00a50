"""What others import: trained models to draw from and look into, and the alignment for networks of their own."""

from mirai_ds.library.alignment import Aligned, ForesightAlignment
from mirai_ds.library.image_model import ImageModel, Samples

__all__ = ["Aligned", "ForesightAlignment", "ImageModel", "Samples"]
