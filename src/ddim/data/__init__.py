"""Pictures for training and evaluation: what they become (`ImagePolicy`), where they come from (`load`).

It imports `_io`, `process` and what is below; nothing of plans or networks.
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
