"""Networks: plain `torch.nn` modules that know nothing of plans.

It imports nothing of plans or schedules: itself, `_io` and `errors`; `cpu/` holds optional float32 kernels.
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
