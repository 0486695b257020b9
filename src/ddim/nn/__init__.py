"""Networks: plain `torch.nn` modules, independent of plans and schedules.

This package imports only itself, `_io` and `errors`; `cpu/` contains optional float32 kernels.
"""

from ddim.nn.base import Network
from ddim.nn.ema import EMA
from ddim.nn.transformer import Transformer, TransformerConfig
from ddim.nn.unet import CategoricalUNet, UNet, UNetConfig

__all__ = [
    "EMA",
    "CategoricalUNet",
    "Network",
    "Transformer",
    "TransformerConfig",
    "UNet",
    "UNetConfig",
]
