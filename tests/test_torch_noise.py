"""`--noise torch:SEED` and `ddim.Noise.torch`: the images of diffusers' pipelines with the same generator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

import ddim as package
from ddim.errors import DdimError
from ddim.model.load import load
from ddim.process.rng import Noise
from models import ddim, save_tiny

SHAPE = (3, 8, 8)
N, S = 5, 7
pytestmark = pytest.mark.filterwarnings("ignore::ddim.DdimWarning")


def pipeline(kind: Any, scheduler: Any) -> Any:
    shape: dict[str, Any] = {"sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = UNet2DModel(**shape, **blocks).eval()
    pipe = kind(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torch-noise") / "model"
    pipeline(DDIMPipeline, DDIMScheduler(timestep_spacing="linspace")).save_pretrained(folder)
    return folder


def images(folder: Path, n: int = N) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / f"{i:06}.png")) for i in range(n)])


def sample(model: Path, out: Path, *words: object, n: int = N) -> int:
    return ddim("sample", model, "-n", n, "--steps", S, "--like", "diffusers", "--force", "--out", out, *words)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("micro_batch", [2, 8])
def test_the_images_of_ddim_pipeline(eta: float, micro_batch: int, saved: Path, tmp_path: Path) -> None:
    """Of the whole batch, however it is split when sampling."""
    pipe = DDIMPipeline.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    drawn = torch.Generator().manual_seed(11)
    expected = np.stack(pipe(N, drawn, eta=eta, num_inference_steps=S, output_type="pil").images)
    words = ("--noise", "torch:11", "--eta", eta, "--micro-batch", micro_batch, "--precision", "float32")
    assert sample(saved, tmp_path / "out", *words) == 0
    actual = images(tmp_path / "out")
    assert np.abs(actual.astype(int) - expected).max() <= 1
    assert (actual == expected).mean() > 0.99
    assert expected.std() > 10


def test_the_images_of_ddpm_pipeline(tmp_path: Path) -> None:
    pipe = pipeline(DDPMPipeline, DDPMScheduler(variance_type="fixed_large"))
    pipe.save_pretrained(tmp_path / "model")
    expected = pipe(N, torch.Generator().manual_seed(2), num_inference_steps=S, output_type="np").images
    model = load(tmp_path / "model", "cpu", dtype="float32")
    plan = package.emulate.plan("diffusers-ddpm", model.schedule, S, variance_type="fixed_large")
    actual = package.to_uint8(model.sample(N, plan=plan, noise=Noise.torch(2)))
    assert np.abs(actual.astype(int) - (expected * 255).round()).max() <= 1


def test_the_draws_are_those_of_one_generator() -> None:
    noise, drawn = Noise.torch(7).of(N, SHAPE), torch.Generator().manual_seed(7)
    start, first, second = (torch.randn((N, *SHAPE), generator=drawn) for _ in range(3))
    assert torch.equal(noise.at([3, 1]).row(1), second[[3, 1]])  # in any order
    assert torch.equal(noise.start(), start)
    assert torch.equal(noise.at([4]).row(0), first[[4]])
    assert not torch.equal(Noise.torch(7).of(N + 1, SHAPE).row(0)[:N], first)


def test_sampling_from_python(saved: Path) -> None:
    model = load(saved, "cpu", micro_batch=2)
    plan = model.plan(S, "leading", sampler="ddim", eta=0.5)
    noise = Noise.torch(3).of(N, SHAPE)
    expected = package.loop.run(model.denoise, plan, noise)
    torch.testing.assert_close(model.sample(N, plan=plan, noise=Noise.torch(3)), expected, rtol=0, atol=1e-4)
    wrapped = package.wrap(lambda x, t: x * 0.1, schedule="linear", predicts="v", time="index")
    assert wrapped.sample(2, (4,), steps=3, noise=Noise.torch(3)).shape == (2, 4)
    for wrong, subject in (({"start": 1}, "start 1"), ({"seed": 4}, "seed 4")):
        with pytest.raises(DdimError, match=f"^noise torch:3 and {subject}: "):
            model.sample(N, plan=plan, noise=Noise.torch(3), **wrong)


def test_a_folder_is_resumed_with_the_same_noise_only(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, noisy = tmp_path / "out", ("--noise", "torch:1", "--eta", 1)
    assert sample(saved, out, *noisy) == 0
    before = images(out)
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["seed"], manifest["n"]) == ("torch:1", N)
    (out / "000003.png").unlink()
    assert sample(saved, out, *noisy) == 0
    assert np.array_equal(images(out), before)
    capsys.readouterr()
    for n, words in (
        (N + 1, noisy),
        (N - 1, noisy),
        (N, ("--noise", "torch:2", "--eta", 1)),
        (N, ("--eta", 1)),
        (N, ("--seed", 1, "--eta", 1)),
    ):
        assert sample(saved, out, *words, n=n) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {out}: ")
    philox = tmp_path / "philox"
    assert sample(saved, philox, "--eta", 1) == 0
    assert sample(saved, philox, *noisy) == 2
    assert np.array_equal(images(out), before)


@pytest.mark.parametrize(
    ("words", "subject"),
    [
        ("--noise torch:1 --start 2", "noise torch:1 and start 2"),
        ("--noise torch:1 --seed 2", "noise torch:1 and seed 2"),
        ("--noise torch", "--noise torch"),
        ("--noise numpy:1", "--noise numpy:1"),
        ("--noise torch:-1", "--noise torch:-1"),
        ("--noise torch:18446744073709551616", "seed 18446744073709551616"),
    ],
)
def test_conflicting_options(
    words: str, subject: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(saved, tmp_path / "out", *words.split()) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {subject}: ")
    assert not (tmp_path / "out").exists()


def test_discrete_data_have_no_such_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "text", kind="text")
    assert ddim("sample", tmp_path / "text", "-n", 1, "--noise", "torch:1", "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: noise torch:1: ")
