"""Map the tensors of `ddim.nn.unet` to and from the state dicts of other libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ddim.errors import DdimError
from ddim.nn.lucidrains import LucidrainsConfig
from ddim.nn.unet import UNetConfig

Weights = dict[str, Tensor]
_PARAMETERS = ("weight", "bias")


@dataclass(frozen=True, slots=True)
class Place:
    """One part of a U-Net.

    Args:
        native: The name in this library's state dict.
        kind: The type of the part.
        half: "down" (encoder), "middle" or "up" (decoder).
        level: The level, counted in execution order: in the decoder 0 is the lowest resolution.
        inner: The position in the level.
        width: The number of output channels.
    """

    native: str
    kind: Literal["block", "attention", "resample"]
    half: Literal["down", "middle", "up"]
    level: int
    inner: int
    width: int


def places(config: UNetConfig) -> Iterator[Place]:
    """Every block, attention and resampling layer, in the order in which they run."""
    side = config.height // config.patch
    last = len(config.multipliers) - 1
    for level, multiplier in enumerate(config.multipliers):
        width = config.channels * multiplier
        for inner in range(config.blocks):
            at = level * config.blocks + inner
            yield Place(f"down_blocks.{at}", "block", "down", level, inner, width)
            if side >> level in config.attention:
                yield Place(f"down_attention.{at}", "attention", "down", level, inner, width)
        if level < last:
            yield Place(f"downs.{level}", "resample", "down", level, config.blocks, width)
    width = config.channels * config.multipliers[-1]
    yield Place("middle.0", "block", "middle", 0, 0, width)
    if config.middle_attention:
        yield Place("middle_attention", "attention", "middle", 0, 0, width)
    yield Place("middle.1", "block", "middle", 0, 1, width)
    for level, multiplier in enumerate(reversed(config.multipliers)):
        width = config.channels * multiplier
        for inner in range(config.blocks + 1):
            at = level * (config.blocks + 1) + inner
            yield Place(f"up_blocks.{at}", "block", "up", level, inner, width)
            if side >> (last - level) in config.attention:
                yield Place(f"up_attention.{at}", "attention", "up", level, inner, width)
        if level < last:
            yield Place(f"ups.{level}", "resample", "up", level, config.blocks + 1, width)


@dataclass(frozen=True)
class Names:
    """The tensor names of another library.

    Args:
        prefix: Function from a part to its name in the other library.
        single: Map from native to external names of single layers: time.0, time.2, conv_in, norm_out, conv_out.
        block: Map from native to external names of a block's layers: norm1, conv1, norm2, conv2, skip, and "time".
        attention: Map from native to external names of an attention's layers: norm, out, and q, k, v, or qkv.
        resample: Map from "down" and "up" to the name of the resampling convolution after the prefix.
        interleaved: Whether the rows of qkv are ordered by head, each with its q, k and v.
    """

    prefix: Callable[[Place], str]
    single: Mapping[str, str]
    block: Mapping[str, str]
    attention: Mapping[str, str]
    resample: Mapping[str, str] = field(default_factory=lambda: {"down": "conv", "up": "conv"})
    interleaved: bool = False

    def layers(self, config: UNetConfig) -> Iterator[tuple[str, str]]:
        """The native and the external name of every layer that is a single layer in both libraries."""
        yield from self.single.items()
        for place in places(config):
            prefix = self.prefix(place)
            if self._is_block(place, config):
                inner = [(native, external) for native, external in self.block.items() if native != "time"]
            elif place.kind == "attention":
                inner = [("norm", self.attention["norm"]), ("out", self.attention["out"])]
            else:
                inner = [("conv", self.resample[place.half])]
            for native, external in inner:
                yield f"{place.native}.{native}", f"{prefix}.{external}"

    def times(self, config: UNetConfig) -> list[str]:
        """The external names, in order, of the layers that are combined in the native `time_to_blocks`."""
        blocks = (place for place in places(config) if self._is_block(place, config))
        return [f"{self.prefix(place)}.{self.block['time']}" for place in blocks]

    def mixers(self, config: UNetConfig) -> Iterator[tuple[str, list[str], int]]:
        """The native name of each qkv layer, the external names of its parts, and its number of heads."""
        parts = [self.attention["qkv"]] if "qkv" in self.attention else [self.attention[letter] for letter in "qkv"]
        for place in places(config):
            if place.kind == "attention":
                names = [f"{self.prefix(place)}.{part}" for part in parts]
                yield f"{place.native}.qkv", names, config.heads_of(place.width)

    @staticmethod
    def _is_block(place: Place, config: UNetConfig) -> bool:
        return place.kind == "block" or (place.kind == "resample" and config.resample == "block")


def to_native(weights: Mapping[str, Tensor], config: UNetConfig, names: Names, subject: str) -> Weights:
    """Convert another library's state dict to this library's, in float32; every tensor of it must be used.

    Args:
        weights: The state dict.
        config: The network's configuration.
        names: The other library's names.
        subject: The subject of error messages.

    Raises:
        DdimError: Naming a tensor that is missing, unused, or of a wrong shape.
    """
    shapes = {key: value.shape for key, value in blank(config).items()}
    remaining = Remaining(dict(weights), subject)
    out: Weights = {}
    for parameter in _PARAMETERS:
        for native, name in names.layers(config):
            if f"{native}.{parameter}" in shapes:
                out[f"{native}.{parameter}"] = remaining.take(f"{name}.{parameter}", shapes[f"{native}.{parameter}"])
        for native, parts, heads in names.mixers(config):
            rows = remaining.join([f"{part}.{parameter}" for part in parts], shapes[f"{native}.{parameter}"])
            if names.interleaved:
                rows = rows.reshape(heads, 3, -1, *rows.shape[1:]).transpose(0, 1).flatten(0, 2)
            out[f"{native}.{parameter}"] = rows
        times = [f"{name}.{parameter}" for name in names.times(config)]
        out[f"time_to_blocks.{parameter}"] = remaining.join(times, shapes[f"time_to_blocks.{parameter}"])
    remaining.reject()
    return out


@dataclass(frozen=True)
class Remaining:
    """The tensors of a state dict that are not converted yet."""

    tensors: Weights
    subject: str

    def take(self, name: str, shape: torch.Size) -> Tensor:
        """Remove and return a tensor, reshaped to `shape`.

        Dimensions of size 1 may differ, because a 1x1 convolution may be a linear layer here.
        """
        tensor = self._pop(name)
        if [side for side in tensor.shape if side > 1] != [side for side in shape if side > 1]:
            problem = f"contains {name} of shape {list(tensor.shape)}, the network's is {list(shape)}"
            raise DdimError(self.subject, problem, "check the options of `ddim convert`")
        return tensor.reshape(shape)

    def join(self, names: list[str], shape: torch.Size) -> Tensor:
        """Remove several tensors and return their rows concatenated into one tensor of shape `shape`."""
        tensors = [self._pop(name) for name in names]
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.shape[1:].numel() != shape[1:].numel():
                problem = f"contains {name} of shape {list(tensor.shape)}, the network's is {['...', *shape[1:]]}"
                raise DdimError(self.subject, problem, "check the options of `ddim convert`")
        if sum(len(tensor) for tensor in tensors) != shape[0]:
            problem = f"contains {names[0]} and similar with {sum(map(len, tensors))} rows, the network has {shape[0]}"
            raise DdimError(self.subject, problem, "check the options of `ddim convert`")
        return torch.cat([tensor.reshape(len(tensor), *shape[1:]) for tensor in tensors])

    def reject(self) -> None:
        """Raise an error if any tensor remains."""
        if self.tensors:
            names = sorted(self.tensors)
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise DdimError(
                self.subject,
                f"contains tensors unknown to the network: {listed}",
                "check the options of `ddim convert`",
            )

    def _pop(self, name: str) -> Tensor:
        if name not in self.tensors:
            problem = f"contains no {name}"
            raise DdimError(self.subject, problem, "use a checkpoint of such a network, or check the options")
        return self.tensors.pop(name).float()


def from_native(weights: Mapping[str, Tensor], config: UNetConfig, names: Names) -> Weights:
    """Convert this library's state dict to another's, with q, k and v as separate linear layers.

    The inverse of `to_native` for such libraries.
    """
    out: Weights = {}
    for parameter in _PARAMETERS:
        for native, external in names.layers(config):
            if f"{native}.{parameter}" in weights:
                out[f"{external}.{parameter}"] = weights[f"{native}.{parameter}"]
        for native, parts, _ in names.mixers(config):
            out |= {
                f"{part}.{parameter}": rows
                for part, rows in zip(parts, weights[f"{native}.{parameter}"].chunk(3), strict=True)
            }
        widths = [len(weights[f"{place.native}.conv1.bias"]) for place in places(config) if place.kind == "block"]
        rows_of = torch.split(weights[f"time_to_blocks.{parameter}"], widths)
        out |= {f"{name}.{parameter}": rows for name, rows in zip(names.times(config), rows_of, strict=True)}
    return {key: tensor.contiguous() for key, tensor in out.items()}


def blank(config: UNetConfig | LucidrainsConfig) -> Weights:
    """The state dict of a new network, for its names and shapes."""
    from ddim.process import rng

    with rng.temporary_seed("cpu", 0):
        return dict(config.build().state_dict())
