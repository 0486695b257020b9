"""The GPU benchmark: a trial of its code on a CPU, what it skips, and how it interprets CUDA's results."""

from __future__ import annotations

import importlib
import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType

from ddim.errors import DdimError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def part(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


def tiny(deadline: Any, out: Path | None = None) -> Any:
    return part("gpu.bench").Bench("cpu", True, deadline, out)


@pytest.mark.slow
def test_a_trial_runs_every_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(part("peers"), "fast_dtype", lambda device: torch.bfloat16)  # as on a GPU
    out = tmp_path / "gpu.json"
    assert part("gpu.run").main(["--device", "cpu", "--tiny", "--out", str(out), "--commit", "abc"]) == 0
    results = json.loads(out.read_text())
    assert results["failed"] == []
    assert not [what for what in results["left out"] if "not planned" not in what]
    assert results["machine"]["commit"] == "abc"
    variants = {row["variant"] for row in results["network"]}
    assert {variant.name for variant in part("gpu.variants").ALL} < variants
    # All variants have the same weights: float32 agrees up to rounding, bfloat16 to three digits.
    difference = {row["variant"]: row["difference"] for row in results["network"]}
    assert difference["diffusers, default"] < 1e-5
    assert all(
        1e-5 < value < 0.05 for name, value in difference.items() if "float32" not in name and "default" not in name
    )
    for key, ending in (("sampling", "(img/s)"), ("training", "(img/s)"), ("loop", "(us/step)"), ("latency", "ms")):
        figures = [value for row in results[key] for name, value in row.items() if name.endswith(ending)]
        assert len(figures) >= 4, key
        assert min(figures) > 0, key
    assert all(1 <= row["rounds"] <= row["S"] and row["apart (RMS)"] < 0.1 for row in results["parallel"])
    for variant in ("ours, bf16", "ours, bf16 compiled", "diffusers, best"):
        shares = [row["share"] for row in results["components"] if row["variant"] == variant]
        assert sum(shares) == pytest.approx(1)
    printed = capsys.readouterr().out
    assert all(f"-- {about}" in printed for _, about in part("gpu.report").TABLES)


def test_speed_ups_are_ratios_of_the_rates() -> None:
    sampling, variants = part("gpu.sampling"), part("gpu.variants")
    bench = tiny(part("gpu.deadline").Deadline(60))
    cell = sampling.Cell(6, 50, 2, variants.ALL)
    sampling.Sampling(bench)._record(cell, {"ours, float32": [2.0, 2.0], "diffusers, default": [3.0, 5.0]})
    assert bench.rows["sampling"][0]["ours, float32 (img/s)"] == 3
    assert bench.rows["sampling"][0]["spread of diffusers, default"] == 0.5
    assert bench.rows["ratios"][0]["ours, float32 / diffusers, default"] == 2


def test_every_cell_is_planned_or_listed_as_unplanned() -> None:
    sampling, variants, sizes = part("gpu.sampling"), part("gpu.variants"), part("gpu.bench").Sizes()
    planned = sampling.cells(sizes.batches, sizes.steps)
    first = planned["first"]
    sizes_first = {(n, s) for n in (1, 512) for s in (10, 50)}
    for variants_of_group, group in ((variants.UNCOMPILED, first[:4]), (variants.AGAINST_BEST, first[4:])):
        assert {(cell.batch, cell.steps) for cell in group} == sizes_first
        assert {cell.variants for cell in group} == {variants_of_group}
    assert not any(variant.compiled for variant in variants.UNCOMPILED)
    assert [variant for variant in variants.AGAINST_BEST if variant.compiled] == [variants.BEST]
    planned_cells = {(c.batch, c.steps, v.name) for group in planned.values() for c in group for v in c.variants}
    unplanned = "\n".join(sampling.unplanned(planned, sizes.batches, sizes.steps))
    for n in sizes.batches:
        for s in sizes.steps:
            line = next((line for line in unplanned.splitlines() if line.startswith(f"batch {n}, S={s}:")), "")
            for variant in variants.ALL:
                listed = line.endswith(": all") or variant.name in line.split(": ")[-1].split("; ")
                assert listed != ((n, s, variant.name) in planned_cells)


def test_parts_that_do_not_fit_are_skipped_and_listed(tmp_path: Path) -> None:
    """The time limit expires after the first cell."""
    run, deadline = part("gpu.run"), part("gpu.deadline")
    out = tmp_path / "gpu.json"
    bench = tiny(None, out)
    bench.deadline = deadline.Deadline(100, clock=lambda: 1e6 if bench.rows.get("sampling") else 0.0)
    names = [task.name for task in run.tasks(bench)]
    run.run(bench)
    results = json.loads(out.read_text())
    [row] = results["sampling"]
    assert {name for name in row if name.endswith("(img/s)")} == {
        "ours, bf16 plan graph (img/s)",
        "ours, bf16 (img/s)",
        "diffusers, default (img/s)",
    }
    listed = results["left out"]
    for name in names[2:]:
        assert f"{name}: the time is over" in listed, name
    assert {"network", "loop", "training"}.isdisjoint(results)
    assert results["failed"] == []


def test_variants_that_compile_too_long_are_skipped() -> None:
    sampling, variants = part("gpu.sampling"), part("gpu.variants")
    bench = tiny(part("gpu.deadline").Deadline(100, clock=lambda: 0.0))
    bench.sizes = replace(bench.sizes, compiling=1e6)
    sampling.Sampling(bench).cell(sampling.Cell(2, 2, 1, (variants.OURS, variants.OURS_COMPILED, variants.BEST)))
    assert [name for name in bench.rows["sampling"][0] if name.endswith("(img/s)")] == ["ours, bf16 (img/s)"]
    listed = bench.deadline.left_out
    assert any(what.startswith("ours, bf16 compiled, batch 2 (setting up): would take") for what in listed)
    assert any(what.endswith("ours, bf16 compiled; diffusers, best: not set up at this batch size") for what in listed)


def test_variants_of_one_network_compile_it_once() -> None:
    sampling, variants = part("gpu.sampling"), part("gpu.variants")
    bench = tiny(part("gpu.deadline").Deadline(100))
    runs = sampling.Sampling(bench)
    for variant in (variants.OURS_COMPILED, variants.OURS_COMPILED_PLAN):
        assert runs.ready(variant, 2) is not None
    [model] = bench.models.values()
    one, other = (
        variants._model(variant, 2, bench) for variant in (variants.OURS_COMPILED, variants.OURS_COMPILED_PLAN)
    )
    assert one.denoise is other.denoise is model.denoise
    assert one.compute is not other.compute


def test_without_time_nothing_is_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--tiny", "--minutes", "0.001", "--out", str(out), "--only", "loop"]
    assert part("gpu.run").main(arguments) == 0
    results = json.loads(out.read_text())
    assert {"ceilings: the time is over", "loop: the time is over", "training: not requested"} <= {*results["left out"]}
    assert "ceilings" not in results
    assert "left out" in capsys.readouterr().out


def test_failed_parts_are_listed_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = part("gpu.run")

    def broken(bench: Any) -> None:
        raise RuntimeError("no such kernel\nand more")

    def full(bench: Any) -> None:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(run, "ceilings", broken)
    monkeypatch.setattr(run.loop, "measure", full)
    out = tmp_path / "gpu.json"
    assert run.main(["--device", "cpu", "--tiny", "--only", "loop", "--out", str(out)]) == 1
    results = json.loads(out.read_text())
    assert results["failed"] == ["ceilings: RuntimeError: no such kernel"]
    assert "loop: out of device memory" in results["left out"]


def test_the_results_are_written_when_the_time_limit_cuts_a_part_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = part("gpu.run")
    bench = tiny(part("gpu.deadline").Deadline(60), tmp_path / "gpu.json")
    bench.todo = ["training, batch 2"]
    ended: list[int] = []
    monkeypatch.setattr(run.os, "_exit", ended.append)
    run.cut_off(bench)
    assert ended == [1]
    [left] = json.loads((tmp_path / "gpu.json").read_text())["left out"]
    assert left.startswith("training, batch 2: cut off")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda:9"], "device cuda:9: "),
        (["--device", "mps"], "device 'mps'"),
        (["--device", "cpu", "--minutes", "0"], "--minutes 0"),
        (["--device", "cpu", "--out", "no/such/folder/gpu.json"], "no/such/folder: "),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert part("gpu.run").main(arguments) == 1
    output = capsys.readouterr().err
    assert output.startswith(f"error: {message}")
    assert output.count("\n") == 1


KERNELS = {
    "convolution": (
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1",
        "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x64_64x4_nhwc_align8>",
        "cudnn_generated_fort_native_sm80_convFwd_pointwise_pointwise",
        "void implicit_convolve_sgemm<float, float, 1024, 5, 5, 3, 3, 3, 1, false>",
        "void cudnn::winograd_nonfused::winogradForwardData4x4<float, float>",
        "triton_tem_fused_convolution_12",
    ),
    "matmul": (
        "nvjet_sm90_tst_256x144_64x4_1x2_h_bz_coopA_bias_TNT",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_128x64_64x3_tn_align8>",
        "ampere_sgemm_128x128_nt",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float>",
        "triton_tem_fused_addmm_3",
        "aten::addmm",
    ),
    "attention": (
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<256, 64, 64, 4>>",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>)",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ),
    "group norm": (
        "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::BFloat16>(long, float)",
        "void at::native::(anonymous namespace)::ComputeFusedParamsCUDAKernel<c10::BFloat16>(long, long)",
        "void at::native::elementwise_kernel<128, 4, at::native::GroupNormKernelImplInternal<float>::{lambda()#1}>",
        "triton_red_fused_native_group_norm_15",
        "triton_poi_fused_convolution_native_group_norm_silu_3",
    ),
    "other elementwise": (
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
        "void at::native::(anonymous namespace)::upsample_nearest2d_nhwc_out_frame<c10::BFloat16>",
        "triton_poi_fused_add_convolution_7",
        "triton_poi_fused_silu_2",
    ),
    "memory copies": (
        "Memcpy DtoD (Device -> Device)",
        "Memset (Device)",
        "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>, unsigned, 4, 64, 64>",
        "void cudnn::engines_precompiled::nchwToNhwcKernel<float, __half, float, false, true>",
        "triton_poi_fused__to_copy_cat_5",
        "triton_poi_fused_clone_11",
    ),
}


@pytest.mark.parametrize(("component", "name"), [(part, name) for part, names in KERNELS.items() for name in names])
def test_kernels_are_classified_by_name(component: str, name: str) -> None:
    assert part("gpu.kernels").component(name) == component


def test_kernel_times_are_summed_without_annotation_ranges() -> None:
    kernels = part("gpu.kernels")

    def event(name: str, spent: float, device: Any = DeviceType.CUDA, marks: bool = False) -> SimpleNamespace:
        time = SimpleNamespace(elapsed_us=lambda: spent)
        return SimpleNamespace(name=name, device_type=device, time_range=time, is_user_annotation=marks)

    events = [
        event("nvjet_a", 1500.0),
        event("nvjet_a", 500.0),
        event("Memset (Device)", 250.0),
        event("## Call CompiledFxGraph ##", 9000.0, marks=True),
        event("aten::mm", 9000.0, DeviceType.CPU),
    ]
    device_kernels = kernels.on_device(events)
    parts = kernels.summed(device_kernels)
    assert parts == {**dict.fromkeys(kernels.COMPONENTS, 0.0), "matmul": 2.0, "memory copies": 0.25}
    assert kernels.longest(device_kernels, 1) == [("nvjet_a", 2, 2.0)]


def test_device_times_are_read_from_events_after_synchronising(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fake CUDA events: a job takes 2 ms, a warm-up 100; reading an event before synchronising fails."""
    now, synchronised = [0.0], [False]

    class Event:
        def __init__(self, enable_timing: bool = False):
            self.timed, self.at = enable_timing, -1.0

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, end: Event) -> float:
            assert synchronised[0]
            assert self.timed
            assert end.timed
            return end.at - self.at

    calls: list[int] = []

    def job() -> None:
        calls.append(1)
        now[0] += 100.0 if len(calls) <= 3 else 2.0

    bench = tiny(part("gpu.deadline").Deadline(60))
    bench.cuda = True
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: synchronised.__setitem__(0, True))
    assert bench.seconds(job, runs=5, warm=3) == pytest.approx(0.002)
    assert len(calls) == 8


def test_nvidia_smi_is_only_queried(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = part("gpu.bench")
    commands: list[list[str]] = []

    def answer(command: list[str], **options: Any) -> SimpleNamespace:
        commands.append(command)
        return SimpleNamespace(stdout="NVIDIA H100, 580.1, 345 MHz, 2619 MHz, 1980 MHz, 30, 70 W\n")

    run = tiny(part("gpu.deadline").Deadline(60))
    run.cuda = True
    monkeypatch.setattr(bench.shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", answer)
    assert run.smi()["clocks.sm"] == "345 MHz"
    assert all(word.startswith(("--query-gpu=", "--format=")) for word in commands[0][1:])


def test_flops_of_a_convolution_match_the_formula() -> None:
    """Each of 6x5 outputs of 7 channels is a sum over 3 channels of 3x3 products: two operations each."""
    convolution = nn.Conv2d(3, 7, 3, padding=1, device="meta")
    counted = part("estimate").flops(convolution, torch.zeros(1, 3, 6, 5, device="meta"))
    assert counted == 2 * 6 * 5 * 7 * 3 * 3 * 3


def test_the_estimate_of_the_network_of_ho_et_al() -> None:
    """35.7 M parameters and 12.1 GFLOP without attention, whose two products are 2 N^2 C each for N positions."""
    results = part("estimate").estimate("cifar10", tflops=100, share=0.5, budget=60)
    assert results["parameters (M)"] == pytest.approx(35.7, abs=0.05)
    assert results["bf16 size (MB)"] == pytest.approx(2 * results["parameters (M)"])
    attention = 5 * 2 * 2 * 256**2 * 256 + 2 * 2 * 16**2 * 256  # two blocks down and three up at 16x16, the middle
    assert results["GFLOP an image, forward"] - attention / 1e9 == pytest.approx(12.1, abs=0.05)
    assert results["images/s"] * results["GFLOP an image, forward"] * 3e9 == pytest.approx(50e12)
    assert results["images seen in the budget"] == pytest.approx(60 * results["images/s"])
    assert results["steps in the budget"] == results["images seen in the budget"] // results["batch"]


def test_the_estimate_is_printed_and_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    estimate = part("estimate")
    assert estimate.main(["--preset", "mnist", "--budget", "2h"]) == 0
    assert "GFLOP an image, trained" in capsys.readouterr().out
    assert estimate.seconds("25min") == 25 * 60
    assert estimate.seconds("1.5h") == 5400
    for arguments in (["--preset", "nope"], ["--budget", "soon"], ["--share", "2"]):
        assert estimate.main(arguments) == 1
        output = capsys.readouterr().err
        assert output.startswith("error: ")
        assert output.count("\n") == 1
    with pytest.raises(DdimError):
        estimate.seconds("0min")
