"""The commands, from training to images, and their help texts."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image

from ddim._io.sheets import zoom
from ddim.cli.main import COMMANDS
from ddim.data.pixels import to_uint8
from ddim.model.load import load
from ddim.model.model import Model
from ddim.names import LOSS_WEIGHTS, SPACINGS, LossWeight
from ddim.plan.plan import Plan
from ddim.process.timesteps import NAMED
from ddim.sampling.guidance import cfg_plus_plus
from ddim.sampling.latents import read_latents
from models import contents, ddim, save_tiny, stripes, tiny_model, write_pictures

Run = Callable[..., str]


def pixels_of(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).tobytes()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """A function that runs a command, which must succeed, and returns its standard output."""

    def run_command(*arguments: object) -> str:
        capsys.readouterr()
        code = ddim(*arguments)
        captured = capsys.readouterr()
        assert code == 0, captured.err
        assert "Traceback" not in captured.err
        return captured.out

    return run_command


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps on the digits."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = ("--steps", 30, "--batch", 16, "--limit", 200, "--checkpoint-every", 20, "--preview-every", 30)
    assert ddim("train", "digits", "--out", folder, *options, "--log-every", 10, "--warmup", 5) == 0
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny")


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def sheet_size(columns: int, rows: int) -> tuple[int, int]:
    """The size of a sheet of 8x8 images."""
    factor = zoom(rows * 10, columns * 10)
    return columns * (8 * factor + 2) + 2, rows * (8 * factor + 2) + 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_text_has_an_example(command: str, run: Run) -> None:
    output = run(command, "--help")
    assert output.startswith(f"Usage: ddim {command}")
    assert "Example" in output
    assert f"ddim {command} " in output[20:]
    assert output == run(command, "-h")


def test_the_help_lists_every_command(run: Run) -> None:
    output = run("--help")
    for command, description in COMMANDS.items():
        assert command in output
        assert " ".join(description.split()[:3]) in output
    assert run("--version").startswith("ddim, version ")


def test_the_help_imports_neither_torch_nor_numpy() -> None:
    code = """
import sys
sys.modules["torch"] = sys.modules["numpy"] = None
from ddim.cli.main import main
main(["--help"])
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert "First steps" in process.stdout


def test_the_help_lists_all_spacings() -> None:
    assert set(SPACINGS) == set(NAMED)


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert ddim() == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "Usage: ddim" in captured.out
    assert "reconstruct" in captured.out


def test_presets_are_listed(run: Run) -> None:
    from ddim.train.presets import PRESETS

    output = run("train", "--list-presets").splitlines()
    assert [line.split()[0] for line in output] == list(PRESETS)


def test_train_writes_a_run_and_a_model(trained: Path) -> None:
    names = {name.split("/")[0] for name in contents(trained)}
    assert names == {"run.json", "metrics.jsonl", "model", "state", "previews", "tensorboard"}
    config = load(trained, "cpu").config
    assert config.provenance.data == "digits"
    assert config.provenance.steps == 30
    assert config.provenance.command.startswith(f"ddim train digits --out {trained} --steps 30 ")


def test_sample_writes_images_a_manifest_and_a_sheet(trained: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    arguments = ("sample", trained, "-n", 9, "--steps", 5, "--seed", 4, "--out", out)
    output = run(*arguments, "--sheet", tmp_path / "sheet.png")
    assert output.startswith("9 images, ipndm(auto: quadratic, S=5, order=3), 5 network evaluations each: ")
    assert sorted(contents(out)) == [*(f"{i:06d}.png" for i in range(9)), "SHA256SUMS", "manifest.json"]
    assert size(tmp_path / "sheet.png") == sheet_size(3, 3)
    expected = to_uint8(load(trained).sample(9, steps=5, seed=4))
    for index in range(9):
        with Image.open(out / f"{index:06d}.png") as image:
            assert (np.asarray(image) == expected[index, :, :, 0]).all()
    assert run(*arguments).startswith("9 images (9 ")


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--grid", "quadratic", "--eta", "0.5"], {"grid": "quadratic", "eta": 0.5}),
        (["--grid", "1,100,400,900,1000"], {"grid": [1, 100, 400, 900, 1000]}),
        (["--sigma", "hat"], {"sigma": "hat"}),
        (["--sigma", "hat", "--no-clip"], {"sigma": "hat", "clip_x0": False}),
        (["--sigma", "0.1,0.2,0.1,0.05,0"], {"sigma": [0.1, 0.2, 0.1, 0.05, 0]}),
        (["--clip"], {"clip_x0": True}),
    ],
)
def test_plan_options_equal_the_arguments_of_model_plan(
    options: list[str], settings: dict[str, Any], tiny: Path, run: Run
) -> None:
    output = run("plan", tiny, "--steps", 5, *options, "--json")
    assert Plan.from_json(output) == load(tiny, "cpu").plan(5, **settings)


@pytest.mark.parametrize(("options", "eta"), [([], 0.0), (["--eta", "1"], 1.0), (["--eta", "0.3", "--clip"], 0.3)])
def test_optimal_sigma_can_be_combined_with_eta(options: list[str], eta: float, tmp_path: Path, run: Run) -> None:
    model = tiny_model()
    table = {"error": tuple(1 / (1 + t / 9) for t in range(1, 1001))}
    Model(model.network, model.config.model_copy(update=table)).save(tmp_path / "model")
    arguments = ("--steps", 5, "--sigma", "optimal", *options)
    plan = Plan.from_json(run("plan", tmp_path / "model", *arguments, "--json"))
    assert plan == load(tmp_path / "model", "cpu").plan(5, eta=eta, sigma="optimal", clip_x0="--clip" in options)
    assert plan.about == f"equal-angle, S=5, sigma optimal, eta={eta:g}"
    assert [row.z > row.sigma for row in plan.rows] == [True] * 4 + [False]
    output = run("sample", tmp_path / "model", "-n", 2, *arguments, "--out", tmp_path / "out", "--force")
    assert output.startswith(f"2 images, ddim({plan.about}), 5 network evaluations each")


def test_the_options_list_all_loss_weights() -> None:
    assert set(LOSS_WEIGHTS) == set(get_args(LossWeight))


def test_sample_runs_the_plan_that_plan_prints(tiny: Path, tmp_path: Path, run: Run) -> None:
    arguments = ("--steps", 4, "--grid", "linear", "--eta", 0.3)
    output = run("plan", tiny, *arguments).splitlines()
    assert output[0] == "ddim(linear, S=4, eta=0.3): 4 network evaluations"
    assert output[1].split()[:3] == ["from", "to", "alpha_bar"]
    assert [line.split()[:2] for line in output[2:]] == [["1000", "750"], ["750", "500"], ["500", "250"], ["250", "0"]]
    (tmp_path / "plan.json").write_text(run("plan", tiny, *arguments, "--json"))
    run("sample", tiny, "-n", 3, *arguments, "--out", tmp_path / "direct")
    run("sample", tiny, "-n", 3, "--plan", tmp_path / "plan.json", "--out", tmp_path / "file")
    assert contents(tmp_path / "direct") == contents(tmp_path / "file")


def test_label_each_uses_all_labels_in_turn(tmp_path: Path, run: Run) -> None:
    """Sample i has the label i mod 3, whatever the first index, and its file records the label."""
    labelled = save_tiny(tmp_path / "labelled", classes=3)
    run("sample", labelled, "-n", 4, "--start", 2, "--steps", 3, "--label", "each", "--out", tmp_path / "out")
    expected = to_uint8(load(labelled).sample(4, steps=3, start=2, labels=[2, 0, 1, 2]))
    for index, pixels in zip(range(2, 6), expected, strict=True):
        with Image.open(tmp_path / f"out/{index:06d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), pixels[:, :, 0])
            assert image.text["label"] == str(index % 3)


def test_label_and_guidance_options_equal_the_arguments_of_sample(tmp_path: Path, run: Run) -> None:
    labelled = save_tiny(tmp_path / "labelled", classes=3)
    run("sample", labelled, "-n", 3, "--steps", 3, "--label", 2, "--guidance", 2.5, "--out", tmp_path / "out")
    expected = to_uint8(load(labelled).sample(3, steps=3, labels=2, guidance=2.5))
    for index in range(3):
        with Image.open(tmp_path / "out" / f"{index:06d}.png") as image:
            assert (np.asarray(image) == expected[index, :, :, 0]).all()


def test_cfg_plus_plus_option_equals_the_guidance_function(tmp_path: Path, run: Run) -> None:
    labelled, arguments = (
        save_tiny(tmp_path / "labelled", classes=3),
        ("--steps", 3, "--label", 2, "--cfg-plus-plus", 0.6),
    )
    run("sample", labelled, "-n", 2, *arguments, "--out", tmp_path / "out")
    model = load(labelled)
    plan = model.plan(3, sampler="ddim", clip_x0=False)
    scale = cfg_plus_plus(plan, 0.6)
    expected = to_uint8(model.sample(2, plan=plan, labels=2, guidance=scale))
    with Image.open(tmp_path / "out" / "000001.png") as image:
        assert (np.asarray(image) == expected[1, :, :, 0]).all()
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["guidance"] == [scale(row.now) for row in plan.rows]


def test_encode_and_decode_equal_the_model_methods(trained: Path, tmp_path: Path, run: Run) -> None:
    paths = write_pictures(tmp_path / "images", 3)
    latents = tmp_path / "latents.safetensors"
    assert run("encode", trained, *paths, "--steps", 40, "--out", latents).startswith("3 latents, ")
    file = read_latents(latents)
    assert file.x.shape == (3, 1, 8, 8)
    assert file.names == tuple(map(str, paths))
    assert torch.equal(file.x, load(trained, dtype="float32").encode(stripes(20)[:3], steps=40).x.cpu())
    arguments = (
        "decode",
        trained,
        latents,
        "--steps",
        40,
        "--out",
        tmp_path / "again",
        "--sheet",
        tmp_path / "sheet.png",
    )
    assert run(*arguments).startswith("3 images, ")
    assert sorted(contents(tmp_path / "again")) == [*(f"{i:06d}.png" for i in range(3)), "SHA256SUMS", "manifest.json"]
    expected = to_uint8(load(trained, dtype="float32").decode(file.x, steps=40))
    for index in range(3):
        with Image.open(tmp_path / "again" / f"{index:06d}.png") as image:
            assert image.text["latent"] == str(paths[index])  # type: ignore[attr-defined]
            assert (np.asarray(image) == expected[index, :, :, 0]).all()
    assert (tmp_path / "sheet.png").is_file()
    whole = contents(tmp_path / "again")
    (tmp_path / "again/000001.png").unlink()
    assert run(*arguments).startswith("3 images (2 ")
    assert contents(tmp_path / "again") == whole


def test_decode_uses_the_timesteps_of_the_latents_file(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = tmp_path / "latents.safetensors"
    paths = write_pictures(tmp_path / "images", 2)
    assert ddim("encode", tiny, *paths, "--steps", 6, "--grid", "quadratic", "--out", latents) == 0
    assert ddim("decode", tiny, latents, "--out", tmp_path / "plain") == 0
    assert "note" not in capsys.readouterr().err
    assert ddim("decode", tiny, latents, "--steps", 6, "--grid", "quadratic", "--out", tmp_path / "explicit") == 0
    plain, explicit = contents(tmp_path / "plain"), contents(tmp_path / "explicit")
    assert [pixels_of(plain[name]) for name in sorted(plain) if name.endswith("png")] == [
        pixels_of(explicit[name]) for name in sorted(explicit) if name.endswith("png")
    ]


def test_decode_warns_about_other_timesteps(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = write_pictures(tmp_path / "images", 1)
    assert ddim("encode", tiny, path, "--steps", 4, "--out", tmp_path / "z.safetensors") == 0
    capsys.readouterr()
    assert ddim("decode", tiny, tmp_path / "z.safetensors", "--steps", 5, "--out", tmp_path / "out") == 0
    assert "note: " in capsys.readouterr().err


@pytest.mark.parametrize("source", ["folder", "digits"])
def test_encode_takes_a_data_set(source: str, tiny: Path, tmp_path: Path, run: Run) -> None:
    write_pictures(tmp_path / "folder", 5)
    data = tmp_path / "folder" if source == "folder" else "digits"
    run("encode", tiny, data, "--limit", 4, "--steps", 2, "--out", tmp_path / "z.safetensors")
    file = read_latents(tmp_path / "z.safetensors")
    assert len(file) == len(file.names) == 4
    assert file.names[3] == ("3.png" if source == "folder" else "digits train[3]")


def test_reconstruct_prints_and_writes_the_errors(trained: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    arguments = ("reconstruct", trained, "digits", "--split", "test", "--limit", 10, "--steps", "5,40", "--out", out)
    output = run(*arguments)
    report = json.loads((out / "reconstruct.json").read_text())
    assert report["images"] == 10
    assert [row["steps"] for row in report["rows"]] == [5, 40]
    assert report["rows"][1]["mse"] < report["rows"][0]["mse"]
    assert f"{report['rows'][1]['mse']:.3e}" in output
    assert sorted(contents(out)) == ["reconstruct.json", "reconstruct.png"]
    run(*arguments)  # files of an earlier run of the command may be replaced


def test_interpolate_between_seeds(trained: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "strip.png"
    run("interpolate", trained, "--seeds", "3,14:2", "--frames", 5, "--steps", 4, "--out", out, "--dtype", "float32")
    assert size(out) == sheet_size(5, 1)
    strip = np.asarray(Image.open(out))
    model = load(trained, dtype="float32")
    side = (strip.shape[0] - 4) // 8
    for seed, index, column in ((3, 0, 0), (14, 2, 4)):
        end = to_uint8(model.sample(1, steps=4, seed=seed, start=index, sampler="ddim"))[0, :, :, 0]
        left = 2 + column * (8 * side + 2)
        shown = strip[2:-2:side, left : left + 8 * side : side].astype(int)
        assert np.abs(shown - end).max() <= 1  # the other samples of the micro-batch differ


def test_interpolate_between_images(trained: Path, tmp_path: Path, run: Run) -> None:
    one, two, *_ = write_pictures(tmp_path / "images", 2)
    run(
        "interpolate", trained, "--images", f"{one},{two}", "--frames", 3, "--steps", 4, "--out", tmp_path / "strip.png"
    )
    assert size(tmp_path / "strip.png") == sheet_size(3, 1)


def test_interpolate_between_four_corners(trained: Path, tmp_path: Path, run: Run) -> None:
    arguments = ("interpolate", trained, "--seeds", "1,2,3,4", "--corners", "--frames", 3, "--steps", 2)
    arguments = (*arguments, "--grid", "linear")
    assert run(*arguments, "--out", tmp_path / "sheet.png").startswith("9 images, ddim(linear")
    assert size(tmp_path / "sheet.png") == sheet_size(3, 3)


def test_interpolate_with_weights(trained: Path, tmp_path: Path, run: Run) -> None:
    arguments = (
        "interpolate",
        trained,
        "--seeds",
        "1,2:5,3",
        "--steps",
        3,
        "--weights",
        "0,1,0; 1,2,-1",
        "--weights",
        "1,0,0",
    )
    assert run(*arguments, "--out", tmp_path / "blends.png").startswith("3 images, ddim(")
    model = load(trained, dtype="float32")
    ends = torch.cat([model.noise([index], seed).start() for seed, index in ((1, 0), (2, 5), (3, 0))])
    weights = torch.tensor([[0, 1, 0], [1, 2, -1], [1, 0, 0]]).double()
    expected = to_uint8(
        model.decode((weights / weights.norm(dim=1, keepdim=True) @ ends.double().flatten(1)).reshape(3, 1, 8, 8), 3)
    )
    strip = np.asarray(Image.open(tmp_path / "blends.png")).astype(int)
    side = (strip.shape[0] - 4) // 8
    for column, pixels in enumerate(expected[:, :, :, 0]):
        left = 2 + column * (8 * side + 2)
        shown = strip[2:-2:side, left : left + 8 * side : side]
        assert np.abs(shown - pixels).max() <= 1


def test_info_prints_the_configuration_and_provenance(trained: Path, run: Run) -> None:
    output = " ".join(run("info", trained).split())
    for text in ("8x8, grey", "digits (train), 200 images", "30 steps", "linear, T = 1000", "(verified)"):
        assert text in output, text
    config = load(trained, "cpu").config
    assert config.sha256 in output
    assert json.loads(run("info", trained, "--json")) == json.loads(config.model_dump_json())


def test_training_with_labels_and_options(tmp_path: Path, run: Run) -> None:
    for label in ("cats", "dogs"):
        write_pictures(tmp_path / "images" / label, 3)
    arguments = ("--preset", "digits", "--labels", "--steps", 2, "--batch", 2, "--accumulate", 2, "--predicts", "eps")
    arguments += (
        "--size",
        16,
        "--channels",
        3,
        "--flip",
        "--loss-weight",
        "sigmoid",
        "--seed",
        3,
        "--precision",
        "float32",
    )
    run("train", tmp_path / "images", *arguments, "--preview-every", 0, "--out", tmp_path / "run")
    config = load(tmp_path / "run", "cpu").config
    assert (config.network.classes, config.predicts, config.data.shape) == (2, "eps", (16, 16, 3))
    recipe = config.provenance.training
    assert recipe is not None
    assert (recipe.flip, recipe.gamma, recipe.seed, recipe.accumulate) == (True, "sigmoid", 3, 2)
    output = run(
        "sample", tmp_path / "run", "-n", 2, "--steps", 2, "--grid", "linear", "--label", 1, "--out", tmp_path / "s"
    )
    assert output.startswith("2 images")


def test_skip_unreadable_leaves_out_unreadable_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pictures(tmp_path / "images", 3)
    (tmp_path / "images/x.png").write_text("not an image")
    arguments = ("--preset", "digits", "--steps", 1, "--batch", 2, "--preview-every", 0, "--skip-unreadable")
    assert ddim("train", tmp_path / "images", *arguments, "--out", tmp_path / "run") == 0
    assert "x.png" in next(line for line in capsys.readouterr().err.splitlines() if line.startswith("note: "))
    assert load(tmp_path / "run", "cpu").config.provenance.images == 3


def test_a_closed_output_pipe_prints_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "ddim", "--help"]
    process = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert process.returncode == 1
    assert process.stderr == b""
