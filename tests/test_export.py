"""Exported programs equal the model for any number of samples and contain their metadata."""

from __future__ import annotations

import io
import json
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from ddim import samplers
from ddim.data.pixels import to_uint8
from ddim.errors import DdimError
from ddim.interop import export
from ddim.interop.export import onnx_file, write
from ddim.model.config import ModelConfig, parse
from ddim.model.denoisers import NetworkDenoiser
from ddim.plan.plan import Plan
from ddim.sampling.loop import run
from models import contents, ddim, load_tiny, process, save_tiny, tiny_model

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "onnx_sampling.py"
SMALL: dict[str, Any] = {"multipliers": (1,), "attention": (), "middle_attention": False}
STEPS = 10
some_sizes = pytest.mark.parametrize("n", [1, 3, 8])


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def answer(path: Path, *inputs: torch.Tensor) -> torch.Tensor:
    """The output of a file's program."""
    if path.suffix == ".pt2":
        result: torch.Tensor = torch.export.load(path).module()(*inputs)
        return result
    loaded = session(path)
    names = [each.name for each in loaded.get_inputs()]
    return torch.from_numpy(loaded.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})[0])


def metadata_of(path: Path) -> Mapping[str, str]:
    """The metadata of a file."""
    if path.suffix == ".onnx":
        metadata: Mapping[str, str] = session(path).get_modelmeta().custom_metadata_map
        return metadata
    extra = {"ddim.json": ""}
    torch.export.load(path, extra_files=extra)
    read: Mapping[str, str] = json.loads(extra["ddim.json"])
    return read


def heun(model: Any) -> Plan:
    """Three evaluations, two of them at t = 100, with x_0 clipped."""
    return replace(samplers.named("heun", model.levels([100, 1000]), model.schedule), clip_x0=True)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("small") / "small", channels=32, **SMALL)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_tiny(folder)


@pytest.fixture(scope="module")
def sampler(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The file and output of the command: a multistep sampler that clips x_0."""
    path = tmp_path_factory.mktemp("sampler") / "sampler.onnx"
    words = ("--what", "sampler", "--sampler", "unipc3", "--grid", "log-snr", "--steps", STEPS, "--clip")
    line, env = process("export", folder, "--out", path, *words)
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=True)
    return SimpleNamespace(path=path, out=done.stdout, err=done.stderr)


@pytest.fixture(scope="module")
def plan(model: Any) -> Plan:
    result: Plan = model.plan(STEPS, "log-snr", sampler="unipc3", clip_x0=True)
    assert result.memory > 1
    return result


@pytest.fixture(scope="module")
def program(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sampler as a program of torch."""
    path = tmp_path_factory.mktemp("program") / "sampler.pt2"
    exported = export.export(model, path, heun(model))
    assert exported.difference is not None
    assert exported.size == path.stat().st_size
    return path


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A network with labels, learned variance, attention and two resolutions."""
    model, path = tiny_model(classes=3, learned_variance=True), tmp_path_factory.mktemp("network") / "network.onnx"
    export.export(model, path, name="tiny")
    return SimpleNamespace(model=model, path=path)


@pytest.mark.slow
@some_sizes
def test_a_network_with_labels(network: Any, n: int) -> None:
    """A learned variance is dropped, t starts at 1, and the index after the last label means no label."""
    x, t, labels = network.model.noise(n, 1).start(), torch.linspace(1000, 1, n), torch.arange(3, 3 - n, -1) % 4
    output = network.model.network(x, t, labels)
    assert output.shape[1] == 2
    actual = answer(network.path, x, t, labels)
    assert_same(actual, output[:, :1])
    assert_same(actual[:1], network.model.network(x[:1], t[:1])[:, :1])


@pytest.mark.slow
def test_a_sampler_with_labels(tmp_path: Path) -> None:
    model, path = tiny_model(classes=3, learned_variance=True, predicts="x0", **SMALL), tmp_path / "sampler.onnx"
    plan = model.plan(2, [300, 1000])
    export.export(model, path, plan)
    for n in (1, 3, 8):
        x, labels = model.noise(n, 1).start(), torch.arange(3, 3 - n, -1) % 4
        actual = answer(path, x, labels)
        assert_same(actual, run(NetworkDenoiser(model.network, model.kind.hub, labels), plan, x))
        assert_same(actual[:1], model.sample(1, seed=1, plan=plan))
        assert n == 1 or (actual[1:2] - model.sample(1, seed=1, start=1, plan=plan)).abs().max() > 1e-3
    assert metadata_of(path)["input"].endswith("; labels int64 (N,), 0..2, or 3 for none")


@pytest.mark.slow
@some_sizes
def test_a_sampler_with_memory_and_clipping(model: Any, plan: Plan, sampler: Any, n: int) -> None:
    expected = model.sample(n, seed=3, plan=plan)
    assert expected.abs().max() < 1.5
    assert (expected - model.sample(n, seed=3, plan=replace(plan, clip_x0=False))).abs().max() > 1e-2
    assert_same(answer(sampler.path, model.noise(n, 3).start()), expected)


@some_sizes
def test_a_program_of_torch(model: Any, program: Path, n: int) -> None:
    plan = heun(model)
    assert plan.nfe > len({row.query.t for row in plan.rows})
    assert_same(answer(program, model.noise(n, 3).start()), model.sample(n, seed=3, plan=plan))


@pytest.mark.slow
def test_a_network_over_text(tmp_path: Path) -> None:
    model, path = tiny_model(kind="masked text"), tmp_path / "text.onnx"
    exported = export.export(model, path)
    assert exported.difference is not None
    assert exported.difference < 1e-4
    for n in (1, 3, 8):
        x, t = model.noise(n, 1).start(), torch.linspace(1, 1000, n)
        assert_same(answer(path, x, t), model.network(x, t))
    metadata = metadata_of(path)
    assert metadata["predicts"] == "logits"
    assert metadata["value_range"] == "ids 0..7"
    assert metadata["input"] == "x int64 (N, 12); t float32 (N,), 1..1000"
    assert metadata["output"] == "logits float32 (N, 12, 8)"


def test_a_sampler_contains_the_network_once(folder: Path, model: Any, sampler: Any, program: Path) -> None:
    """Ten steps weigh less than one and a half times the bare weights."""
    assert sampler.path.stat().st_size < 1.5 * (folder / "model.safetensors").stat().st_size
    loaded = onnx.load(sampler.path)
    onnx.checker.check_model(loaded, full_check=True)
    assert [each.op_type for each in loaded.graph.node].count("Network") == STEPS
    assert len(loaded.functions) == 1
    weights = [name for name in zipfile.ZipFile(program).namelist() if "/weights/weight_" in name]
    assert len(weights) == len(model.network.state_dict())


def test_inlined_functions_give_the_same_result(model: Any, sampler: Any) -> None:
    """For runtimes without functions: onnx's inliner replaces the calls by the network."""
    from onnx import inliner

    flat = inliner.inline_local_functions(onnx.load(sampler.path))
    assert not flat.functions
    x = model.noise(2).start()
    loaded = onnxruntime.InferenceSession(flat.SerializeToString(), providers=["CPUExecutionProvider"])
    assert_same(torch.from_numpy(loaded.run(None, {"x_T": x.numpy()})[0]), answer(sampler.path, x))


def test_metadata_of_files(model: Any, plan: Plan, network: Any, sampler: Any, program: Path) -> None:
    common = {"format": "ddim-export", "predicts": "v", "value_range": "[-1, 1]", "shape": "[1, 8, 8]"}
    one, many = {"classes": "3", "what": "network", "model": "tiny"}, {"classes": "0", "what": "sampler"}
    for path, source, specific in (
        (network.path, network.model, one | {"output": "v float32 (N, 1, 8, 8)"}),
        (sampler.path, model, many | {"model": "small", "output": "x_0 float32 (N, 1, 8, 8)"}),
        (program, model, many | {"model": "", "input": "x_T float32 (N, 1, 8, 8), standard normal"}),
    ):
        metadata = metadata_of(path)
        expected = {**common, **specific, "model_sha256": source.fingerprint, "needs_label": "false"}
        assert {key: metadata[key] for key in expected} == expected
        assert parse(ModelConfig, metadata["config"], "config").network == source.config.network
    assert Plan.from_json(metadata_of(sampler.path)["plan"]) == plan
    alpha_bar = json.loads(metadata_of(network.path)["alpha_bar"])
    np.testing.assert_allclose(alpha_bar, network.model.schedule.alpha_bar[1:], rtol=1e-12)


def test_files_contain_no_local_path_and_no_pickle(network: Any, sampler: Any, program: Path) -> None:
    for path in (network.path, sampler.path, program):
        assert str(ROOT).encode() not in path.read_bytes(), path
    with zipfile.ZipFile(program) as archive:
        for name in archive.namelist():
            assert not archive.read(name).startswith((b"\x80", b"PK")), name


def test_the_command_prints_the_result(sampler: Any) -> None:
    lines = sampler.out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(f"{sampler.path}: sampler unipc(log-snr, S=10")
    assert lines[1] == "input: x_T float32 (N, 1, 8, 8), standard normal"
    assert float(lines[3].removeprefix("verified: it differs from the model by at most ")) < 1e-4
    assert sampler.err == ""


def test_the_example_reproduces_the_samples_of_the_library(
    model: Any, plan: Plan, sampler: Any, tmp_path: Path
) -> None:
    code = "import runpy, sys; sys.modules['ddim'] = sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [str(EXAMPLE), str(sampler.path), "-n", "3", "--seed", "5", "--out", str(tmp_path), "--batch", "2"]
    subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    expected = model.sample(3, seed=5, plan=plan)
    written = contents(tmp_path)
    assert list(written) == ["000000.png", "000001.png", "000002.png"]
    for data, image in zip(written.values(), to_uint8(expected)[..., 0], strict=True):
        assert np.abs(np.asarray(Image.open(io.BytesIO(data))).astype(int) - image).max() <= 1
    example, loaded = runpy.run_path(str(EXAMPLE)), session(sampler.path)
    actual = example["sample"](loaded, loaded.get_modelmeta().custom_metadata_map, 5, range(3))
    torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=0, atol=1e-3)
    assert np.abs(example["to_bytes"](actual).astype(int) - to_uint8(expected)).max() <= 1


def error_of(*arguments: Any) -> str:
    with pytest.raises(DdimError) as caught:
        export.export(*arguments)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_plans_that_cannot_be_exported_are_errors(model: Any, network: Any, tmp_path: Path) -> None:
    path, text = tmp_path / "a.onnx", tiny_model(kind="text")
    assert "plan ddim(equal-angle, S=4, eta=0.5): " in error_of(model, path, model.plan(4, eta=0.5))
    assert "plan ddpm(equal-angle, S=4, sigma learned): " in error_of(
        network.model, path, network.model.plan(4, sigma="learned")
    )
    assert "lattice" in error_of(model, path, model.inversion("lossless", 4).decode_plan)
    assert "plan: " in error_of(model, path, model.inversion("reversible", 4).resume_plan)
    assert "t = 0" in error_of(model, path, model.plan(4, encode=True))
    assert "plan ddim(equal-angle, S=4, eta=0): " in error_of(
        model, path, replace(model.plan(4, sampler="ddim"), made_for="0" * 64)
    )
    assert "sampler: " in error_of(text, path, text.plan(4))
    assert "pt2" in error_of(model, tmp_path / "a.bin")
    assert not contents(tmp_path)


@pytest.fixture
def quick(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces tracing by the network that was exported before."""
    monkeypatch.setattr(write, "trace", lambda *_, **__: None)
    monkeypatch.setattr(onnx_file, "translate", lambda *_: onnx.load(network.path))


@pytest.mark.usefixtures("quick")
def test_an_older_file_is_not_replaced_by_a_wrong_one(
    network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, right = tmp_path / "a.onnx", onnx_file.run_onnx
    path.write_bytes(b"older")
    monkeypatch.setattr(onnx_file, "run_onnx", lambda *arguments: [each + 1 for each in right(*arguments) or []])
    assert "a.onnx: " in error_of(network.model, path)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"a.onnx": b"older"}
    monkeypatch.setattr(onnx_file, "run_onnx", right)
    export.export(network.model, path)
    assert [each.name for each in tmp_path.iterdir()] == ["a.onnx"]
    assert path.read_bytes() != b"older"


@pytest.mark.usefixtures("quick")
def test_a_missing_library_is_named(
    network: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network.model.save(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert ddim("export", tmp_path / "model", "--out", tmp_path / "a.onnx") == 0
    assert "not verified: onnxruntime is not installed; pip install 'ddim[interop]'" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert ddim("export", tmp_path / "model", "--out", tmp_path / "b.onnx") == 2
    assert capsys.readouterr().err == "error: ONNX: needs onnxscript; pip install 'ddim[interop]'\n"
    assert not (tmp_path / "b.onnx").exists()


@pytest.mark.parametrize(
    ("words", "expected_line"),
    [
        (("--steps", 5), "--steps"),
        (("--clip",), "--clip"),
        (("--what", "sampler", "--steps", 5, "--plan", "x.json"), "--plan and --steps"),
        (("--what", "sampler", "--plan", "x.json"), "x.json"),
        (("--what", "sampler", "--eta", 1), "adds noise, which a program cannot draw; "),
    ],
)
def test_conflicting_options_are_errors(
    words: tuple[Any, ...], expected_line: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ddim("export", folder, "--out", tmp_path / "a.onnx", *words) == 2
    line = capsys.readouterr().err
    assert expected_line in line
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert not contents(tmp_path)


def test_a_plan_file_can_be_exported(
    folder: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, calls = model.plan(3, [1, 300, 1000]), []

    def exporting(*arguments: Any) -> Any:
        calls.append(arguments)
        yield "nothing"
        return export.Exported(arguments[1], 5, write.describe(*arguments[:1], *arguments[2:]), None)

    (tmp_path / "plan.json").write_text(plan.to_json())
    monkeypatch.setattr(export, "iter_export", exporting)
    words = ("--out", tmp_path / "a.pt2", "--what", "sampler", "--plan", tmp_path / "plan.json")
    assert ddim("export", folder, *words) == 0
    assert calls[0][1:] == (tmp_path / "a.pt2", plan, "small")
    assert plan.name in capsys.readouterr().out
