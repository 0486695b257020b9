"""Which precision is chosen, by the units of the device: one rule for sampling, another one for training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ddim.model.precision import Precision, fast_dtype
from ddim.nn.cpu import units
from ddim.nn.cpu.units import Units, sampling_precision, training_dtype, units_of, units_of_cpu
from ddim.train.trainer import autocast_dtype
from models import tiny_model

AMX = "flags : fpu avx512f avx512_bf16 amx_bf16 amx_tile amx_int8"
AVX512_BF16 = "flags : fpu avx512f avx512_bf16"
PLAIN = "flags : fpu avx2 fma"
# flags, torch's report of AVX512_BF16 and AMX: sampling precision (without and with a compiler), training dtype
MACHINES: dict[str, tuple[str, bool, bool, str, str, torch.dtype]] = {
    "amx": (AMX, True, True, "bfloat16", "bfloat16", torch.bfloat16),
    "amx not for use": (AMX, True, False, "float32", "float32-fast", torch.bfloat16),
    "amx for int8 alone": (AVX512_BF16 + " amx_tile amx_int8", True, True, "float32", "float32-fast", torch.bfloat16),
    "avx512_bf16": (AVX512_BF16, True, False, "float32", "float32-fast", torch.bfloat16),
    "neither": (PLAIN, False, False, "float32", "float32-fast", torch.float32),
    "unknown": ("", False, False, "float32", "float32-fast", torch.float32),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_two_rules(machine: str) -> None:
    flags, avx512_bf16, amx_tile, without, fast, training = MACHINES[machine]
    there = units_of_cpu(flags, avx512_bf16, amx_tile)
    assert sampling_precision(there, lambda: "")[0] == fast
    name, why = sampling_precision(there, lambda: "no compiler")
    assert name == without
    assert ("no compiler" in why) == (name == "float32")
    assert sampling_precision(there, lambda: "", small=True)[0] == "float32-fast"
    assert sampling_precision(there, lambda: "no compiler", small=True)[0] == without
    assert training_dtype(there) == training


@pytest.mark.parametrize("machine", MACHINES)
def test_a_model_on_such_a_machine(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags, avx512_bf16, amx_tile, _, fast, training = MACHINES[machine]
    reported = {"_is_avx512_bf16_supported": avx512_bf16, "_is_amx_tile_supported": amx_tile}
    monkeypatch.setattr(units, "cpu_flags", lambda: flags)
    monkeypatch.setattr(units, "_torch_reports", reported.__getitem__)
    monkeypatch.setattr(Precision, "_unavailable", lambda self: "")
    compute = tiny_model(dtype="auto").compute
    assert compute.name == "float32-fast"  # the network is small
    assert str(compute).startswith("float32-fast on cpu (this device ")
    monkeypatch.setattr("ddim.model.precision.SMALL", 0)
    compute = tiny_model(dtype="auto").compute
    assert compute.name == fast
    assert str(compute).startswith(f"{fast} on cpu (this device has ")
    assert fast_dtype("cpu") == training
    assert (autocast_dtype("auto", torch.device("cpu")) or torch.float32) == training


def test_the_compiler_is_not_checked_if_irrelevant() -> None:
    def missing() -> str:
        raise AssertionError("asked")

    assert sampling_precision(Units(matrix=True, vector=False), missing)[0] == "bfloat16"


@pytest.mark.parametrize("there", [True, False])
def test_a_gpu(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool) -> bool:
        return there or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert units_of("cuda") == Units(matrix=there, vector=there)
    assert (fast_dtype("cuda") == torch.bfloat16) == there
    assert units_of("meta") == Units(matrix=False, vector=False)


def test_a_system_without_cpu_information(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*inputs: Any, **settings: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(units.Path, "read_text", nowhere)
    assert units.cpu_flags() == ""
