"""Networks: plain `torch.nn` modules that know nothing of plans."""

from ddim.nn.ema import EMA
from ddim.nn.unet import UNet, UNetConfig

__all__ = ["EMA", "UNet", "UNetConfig"]
