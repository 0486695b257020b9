"""The configuration of a user's network in a run of `ddim.fit`: data only, from which no code is imported."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ddim.names import Predicts
from ddim.nn.unet import UNetConfig
from ddim.process.schedule import Schedule


class NetworkConfig(BaseModel):
    """The `config.json` of a user's network.

    Args:
        format: Always "ddim-network".
        version: The format's version.
        schedule: The schedule's name.
        log_snr: The log-SNR at t = 1..T.
        predicts: What the network predicts.
        shape: Shape of one sample.
        network: The import path of the network's class, "package.module:Class", for people; it is never imported.
        arguments: The arguments that the class was constructed with, if they were passed to `ddim.fit`.
        unet: The configuration of the U-Net that `ddim.fit` built itself, or None.
        steps: The number of optimizer steps.
        seconds: The training time.
        software: The version of this library.
        sha256: The checksum of `model.safetensors`; empty before it is saved.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")
    format: Literal["ddim-network"] = "ddim-network"
    version: Literal[1] = 1
    schedule: str
    log_snr: tuple[float, ...] = Field(min_length=1)
    predicts: Predicts
    shape: tuple[int, ...]
    network: str = ""
    arguments: dict[str, Any] | None = None
    unet: UNetConfig | None = None
    steps: int = 0
    seconds: float = 0.0
    software: str = ""
    sha256: str = ""

    def build_schedule(self) -> Schedule:
        """The noise schedule."""
        return Schedule(np.array(self.log_snr), self.schedule)
