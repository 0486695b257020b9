"""Assigns GPU kernels to components by their names, and sums their times in a profile."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

COMPONENTS = ("convolution", "matmul", "attention", "group norm", "other elementwise", "memory copies")

# The first match decides. cuDNN's layout changes and Inductor's pure copies count as copies; attention comes before
# convolution and matmul, whose patterns also match its kernels.
_WORDS = (
    ("memory copies", r"memcpy|memset|copy|nchwtonhwc|nhwctonchw|converttensor|transpose"),
    ("attention", r"sdpa|flash|fmha|attention|softmax"),
    ("group norm", r"group_?norm|rowwisemoments|computefusedparams|gammabeta"),
    ("convolution", r"conv(?!ert)|fprop|dgrad|wgrad|winograd|implicit_gemm|cudnn"),
    ("matmul", r"gemm|gemv|nvjet|splitk|cublas|matmul|linear|(?:^|[:_])(?:add|b|baddb)?mm(?:$|_)"),
)
_MOVES = "_to_copy|cat|clone|copy|_unsafe_view|view|permute|transpose|constant_pad_nd"
_MOVED = re.compile(rf"triton_[a-z]+_fused(?:_(?:{_MOVES}))+(?:_\d+)?")


class Kernel(NamedTuple):
    """One run of a kernel."""

    name: str
    microseconds: float


def component(name: str) -> str:
    """The component that a kernel belongs to, one of `COMPONENTS`.

    Inductor's kernels are named triton_KIND_fused_OPERATORS_NUMBER. A template ("tem") is the product in its
    name. Otherwise a kernel with group norm counts as such, including what is fused into it (SiLU, time, residual), one
    that only moves data as a copy, and the rest, such as "convolution" for a bias added after cuDNN, as elementwise.
    """
    low = name.lower()
    if not low.startswith("triton_"):
        return next((part for part, words in _WORDS if re.search(words, low)), COMPONENTS[4])
    if low.startswith("triton_tem"):
        return next((part for part, words in _WORDS[1:] if re.search(words, low)), COMPONENTS[4])
    if "group_norm" in low:
        return "group norm"
    return "memory copies" if _MOVED.fullmatch(low) else "other elementwise"


def on_device(events: Iterable[Any]) -> list[Kernel]:
    """The kernels and copies in a torch.profiler's events, without the ranges that only mark them."""
    from torch.autograd import DeviceType

    return [
        Kernel(event.name, event.time_range.elapsed_us())
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]


def on_host(events: Iterable[Any]) -> list[Kernel]:
    """The operators in a CPU profile, each without those it calls; used by a trial in place of kernels."""
    return [Kernel(event.name, event.self_cpu_time_total) for event in events]


def summed(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Milliseconds of each component, in the order of `COMPONENTS`."""
    total = dict.fromkeys(COMPONENTS, 0.0)
    for kernel in kernels:
        total[component(kernel.name)] += kernel.microseconds / 1e3
    return total


def longest(kernels: Iterable[Kernel], count: int) -> list[tuple[str, int, float]]:
    """The kernels with the longest total times: name, runs, milliseconds."""
    total: dict[str, tuple[int, float]] = {}
    for kernel in kernels:
        runs, spent = total.get(kernel.name, (0, 0.0))
        total[kernel.name] = (runs + 1, spent + kernel.microseconds / 1e3)
    ranked = sorted(total.items(), key=lambda item: -item[1][1])[:count]
    return [(name, runs, spent) for name, (runs, spent) in ranked]
