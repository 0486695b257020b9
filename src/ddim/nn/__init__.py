"""Networks: plain `torch.nn` modules that know nothing of plans."""

from ddim.nn.ema import EMA
from ddim.nn.network import Network
from ddim.nn.transformer import Transformer, TransformerConfig
from ddim.nn.unet import CategoricalUNet, UNet, UNetConfig

__all__ = ["EMA", "CategoricalUNet", "Network", "Transformer", "TransformerConfig", "UNet", "UNetConfig"]
