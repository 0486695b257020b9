"""Datasets for training and evaluation: image preprocessing (`ImagePolicy`), loading (`load`), and text.

It imports `_io`, `process` and the layers below, and no plans or networks.
"""

from ddim.data.digits import digits_as_mnist
from ddim.data.image import list_images, open_image
from ddim.data.image_set import ImageSet
from ddim.data.parallel_decode import iter_scan, scan
from ddim.data.policy import ImagePolicy
from ddim.data.sources import iter_load, load

__all__ = [
    "ImagePolicy",
    "ImageSet",
    "digits_as_mnist",
    "iter_load",
    "iter_scan",
    "list_images",
    "load",
    "open_image",
    "scan",
]
