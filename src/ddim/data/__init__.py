"""Pictures for training and evaluation: what they become (`ImagePolicy`), where they come from (`load`)."""

from ddim.data.digits import digits_as_mnist
from ddim.data.gather import scan, scanning
from ddim.data.imageset import ImageSet
from ddim.data.pictures import list_pictures, open_picture
from ddim.data.policy import ImagePolicy
from ddim.data.sources import load, loading

__all__ = [
    "ImagePolicy",
    "ImageSet",
    "digits_as_mnist",
    "list_pictures",
    "load",
    "loading",
    "open_picture",
    "scan",
    "scanning",
]
