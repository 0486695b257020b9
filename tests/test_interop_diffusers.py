"""Import and export of diffusers pipeline folders, compared with diffusers on random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import nn

from bench import randn
from ddim.errors import DdimError
from ddim.model import checkpoint, importers
from ddim.model.load import load
from ddim.model.model import Model
from ddim.nn.unet import UNetConfig
from models import ddim, new_network, save_tiny, tiny_config

# What these models' own configurations say, the ones of 256x256 with a quarter of the size, and narrower.
CIFAR10: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
LARGE = CIFAR10 | {
    "sample_size": 64,
    "block_out_channels": (32, 32, 64, 64, 128, 128),
    "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
}
TRAINED: dict[str, Any] = {
    key: LARGE[key] for key in ("sample_size", "block_out_channels", "down_block_types", "up_block_types")
}
CONFIGS = {"ddpm-cifar10-32": CIFAR10, "ddpm-*-256": LARGE, "train_unconditional": TRAINED}
SMALL = CIFAR10 | {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
}
SMALL |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1}


def unet(seed: int = 0, **config: Any) -> UNet2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = UNet2DModel(**({"layers_per_block": 2} | config)).eval()
        for module in network.modules():
            if isinstance(module, nn.GroupNorm):  # else scale 1 and shift 0 would hide a mix-up
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, 0.0, 0.3)
    return network


def save(folder: Path, network: UNet2DModel, **scheduler: Any) -> Path:
    DDPMPipeline(network, DDPMScheduler(**scheduler)).save_pretrained(folder)
    return folder


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.01
    assert float((actual - expected).norm() / expected.norm()) < 1e-5


def compare(folder: Path, network: UNet2DModel, side: int, count: int = 2) -> None:
    model = load(folder, "cpu", dtype="float32")
    x, t = randn(count, 3, side, side, dtype=torch.float32), torch.tensor([1.0, 777.0])[:count]
    with torch.no_grad():
        close(model.network(x, t), network(x, (t - 1).long()).sample)


@pytest.mark.parametrize("name", CONFIGS)
def test_same_output_in_each_configuration(name: str, tmp_path: Path) -> None:
    network = unet(**CONFIGS[name])
    compare(save(tmp_path / "model", network), network, CONFIGS[name]["sample_size"])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_same_output_at_full_size(name: str, tmp_path: Path) -> None:
    """The full networks with 36 and 114 M parameters; the large ones at 64x64, because they are convolutional."""
    large = {"sample_size": 256, "block_out_channels": (128, 128, 256, 256, 512, 512)}
    full = {"block_out_channels": (128, 256, 256, 256)} if name == "ddpm-cifar10-32" else large
    network = unet(**(CONFIGS[name] | full))
    compare(save(tmp_path / "model", network), network, 32 if name == "ddpm-cifar10-32" else 64, 1)


def flat_and_old(folder: Path, network: UNet2DModel) -> None:
    """The format of the first repositories: one folder, a pickle, and the old names of attention."""
    save(folder, network)
    state = network.state_dict()
    renames = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    for new, old in renames.items():
        state = {key.replace(new, old): value for key, value in state.items()}
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    (folder / "unet/config.json").rename(folder / "config.json")
    (folder / "scheduler/scheduler_config.json").rename(folder / "scheduler_config.json")
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    for inner in ("unet", "scheduler"):
        (folder / inner).rmdir()


def test_an_old_flat_folder_with_a_pickle(tmp_path: Path) -> None:
    network = unet(**SMALL)
    flat_and_old(tmp_path / "model", network)
    compare(tmp_path / "model", network, 16)


def test_an_old_configuration_lacks_keys(tmp_path: Path) -> None:
    network = unet(**TRAINED)
    folder = save(tmp_path / "model", network)
    config = json.loads((folder / "unet/config.json").read_text())
    keys = (
        "_class_name",
        "sample_size",
        "block_out_channels",
        "down_block_types",
        "up_block_types",
        "layers_per_block",
    )
    (folder / "unet/config.json").write_text(json.dumps({key: config[key] for key in keys}))
    compare(folder, network, 64)


def test_half_precision_weights_and_learned_variance(tmp_path: Path) -> None:
    network = unet(**(SMALL | {"out_channels": 6}))
    DDPMPipeline(network.half(), DDPMScheduler()).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", "cpu", dtype="float32")
    assert any("float16" in note for note in model.notes)
    x, t = randn(2, 3, 16, 16, dtype=torch.float32), torch.tensor([5.0, 500.0])
    with torch.no_grad():
        close(model.network(x, t), network.float()(x, (t - 1).long()).sample)
    assert model.sample(1, sigma="learned", grid=[300, 700, 1000], clip_x0=False).shape == (1, 3, 16, 16)


SCHEDULERS: dict[str, dict[str, Any]] = {
    "linear": {},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 500},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    "sigmoid": {"beta_schedule": "sigmoid", "prediction_type": "sample"},
    "list": {"trained_betas": list(np.linspace(1e-3, 0.3, 40)), "num_train_timesteps": 40},
    "zero terminal SNR": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler_is_mapped(name: str, tmp_path: Path) -> None:
    settings = {"clip_sample": False, "timestep_spacing": "trailing", **SCHEDULERS[name]}
    folder = save(tmp_path / "model", unet(**SMALL), **settings)
    model = load(folder, "cpu")
    scheduler_ = DDPMScheduler(**settings)
    np.testing.assert_allclose(model.schedule.alpha_bar[1:], scheduler_.alphas_cumprod.numpy(), rtol=2e-4, atol=1e-7)
    assert model.config.origin is not None
    assert model.config.origin.settings["clip_sample"] is False
    kind = settings.get("prediction_type", "epsilon")
    assert {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}[kind] == model.config.predicts


@pytest.mark.filterwarnings("ignore::ddim.DdimWarning")
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_samples_equal_diffusers(spacing: str, tmp_path: Path) -> None:
    """For timesteps that diffusers places correctly, in float32."""
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing=spacing)
    network = unet(**SMALL)
    DDIMPipeline(network, scheduler).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", "cpu", dtype="float32")
    start = model.noise(2, seed=3).start()
    x = start
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    converted = model.sample(2, seed=3, sampler="ddim", grid=[int(t) + 1 for t in reversed(scheduler.timesteps)])
    assert float((converted - x).abs().max()) < 1e-4 * float(x.abs().max())


# And back.


def test_import_and_export_round_trip(tmp_path: Path) -> None:
    network = unet(**(SMALL | {"attention_head_dim": 16}))
    there = save(tmp_path / "there", network, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    assert ddim("convert", there, "--out", tmp_path / "converted") == 0
    assert ddim("convert", tmp_path / "converted", "--to", "diffusers", "--out", tmp_path / "back") == 0
    again = UNet2DModel.from_pretrained(tmp_path / "back" / "unet")
    assert again.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in again.state_dict().items())
    config = json.loads((tmp_path / "back/scheduler/scheduler_config.json").read_text())
    expected = {"beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1}
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize("schedule", [{"name": "cosine"}, {"name": "linear", "T": 300}, {"name": "quadratic", "T": 50}])
def test_an_exported_pipeline_gives_the_same_images(schedule: dict[str, Any], tmp_path: Path) -> None:
    shape = {"in_channels": 3, "channels": 32, "groups": 8, "multipliers": (1, 2)}
    config = tiny_config(predicts="v", schedule=schedule, **shape)
    model = Model(new_network(config.network), config, device="cpu", dtype="float32")
    model.save(tmp_path / "converted")
    assert ddim("convert", tmp_path / "converted", "--to", "diffusers", "--out", tmp_path / "exported") == 0
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "exported")
    pipeline.set_progress_bar_config(disable=True)
    exported = pipeline(1, torch.Generator().manual_seed(5), num_inference_steps=5, output_type="pt").images
    start = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    *_, last = model.run_blocks(model.plan(5, "leading"), start)
    torch.testing.assert_close((last / 2 + 0.5).clamp(0, 1), exported, atol=1e-4, rtol=0)


def test_networks_that_unet2d_cannot_represent_are_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, (changes, word) in enumerate(
        [({"patch": 2}, "out"), ({"classes": 3}, "labels"), ({"scale_shift": True}, "out")]
    ):
        folder = save_tiny(tmp_path / str(place), **changes)
        assert ddim("convert", folder, "--to", "diffusers", "--out", tmp_path / "out") == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert ddim("convert", "tinyshakespeare", "--to", "diffusers", "--out", tmp_path / "out") == 2
    assert "discrete data" in capsys.readouterr().err


def test_a_folder_with_other_content_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path / "converted")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("years")
    assert ddim("convert", folder, "--to", "diffusers", "--out", tmp_path / "precious") == 2
    assert "precious: " in capsys.readouterr().err
    assert (tmp_path / "precious/thesis.txt").read_text() == "years"


# What is refused.

REFUSED = {
    "time_embedding_type": "fourier",
    "resnet_time_scale_shift": "scale_shift",
    "num_class_embeds": 10,
    "act_fn": "gelu",
    "down_block_types": ["DownBlock2D", "SkipDownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "block_out_channels": [32, 48],
    "sample_size": None,
    "in_channels": 4,
    "_class_name": "UNet2DConditionModel",
}


@pytest.mark.parametrize("key", REFUSED)
def test_unsupported_networks_are_errors(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "model", unet(**SMALL))
    path = folder / "unet/config.json"
    changed = {"in_channels": {"out_channels": 4}}.get(key, {})
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: REFUSED[key]} | changed))
    assert ddim("convert", folder, "--out", tmp_path / "out") == 2
    output = capsys.readouterr().err
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change", [{"prediction_type": "flow"}, {"beta_schedule": "laplace"}, {"num_train_timesteps": 0}]
)
def test_unsupported_schedulers_are_errors(change: dict[str, Any], tmp_path: Path) -> None:
    folder = save(tmp_path / "model", unet(**SMALL))
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DdimError, match="scheduler_config"):
        importers.read(folder)


def test_damaged_folders(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", unet(**SMALL))
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DdimError, match=r"model/unet/diffusion_pytorch_model\.safetensors: "):
        importers.read(folder)
    weights.unlink()
    with pytest.raises(DdimError, match="model/unet: "):
        importers.read(folder)
    torch.save({"conv_in.weight": torch.zeros(3)}, folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(DdimError, match="model/unet: "):
        importers.read(folder)
    (folder / "scheduler/scheduler_config.json").unlink()
    with pytest.raises(DdimError, match="model: "):
        importers.read(folder)


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_never_runs_code(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", unet(**SMALL))
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": Evil(tmp_path / "ran")}, folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(DdimError, match=r"model/unet/diffusion_pytorch_model\.bin: "):
        importers.read(folder)
    assert not (tmp_path / "ran").exists()


def test_convert_prints_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "model", unet(**SMALL))
    assert ddim("convert", folder, "--out", tmp_path / "out", "--dtype", "bfloat16") == 0
    output = capsys.readouterr().out
    for word in ("U-Net, 32 channels", "linear betas, 0.0001 to 0.02", "predicts: eps", "clip_sample True", "float32"):
        assert word in output
    config, weights = checkpoint.read(tmp_path / "out")
    assert isinstance(config.network, UNetConfig)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert ddim("sample", tmp_path / "out", "-n", 1, "--steps", 2, "--out", tmp_path / "samples") == 0


def test_hints_that_the_source_determines_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    converted, exported = save_tiny(tmp_path / "converted"), save(tmp_path / "exported", unet(**SMALL))
    for words in (
        [converted, "--size", 32],
        [converted, "--from", "openai"],
        [exported, "--predicts", "v"],
        [exported, "--from", "openai"],
    ):
        assert ddim("convert", *words, "--out", tmp_path / "out") == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert ddim("convert", exported, "--size", "big", "--out", tmp_path / "out") == 2


@pytest.mark.parametrize("settings", [{"clip_sample": False, "timestep_spacing": "linspace"}, {"steps_offset": 1}])
def test_like_diffusers_equals_its_scheduler(settings: dict[str, Any], tmp_path: Path) -> None:
    """The command reproduces the pixels of the folder's scheduler, including its bugs."""
    from PIL import Image

    scheduler, network = DDIMScheduler(**settings), unet(**SMALL)
    DDIMPipeline(network, scheduler).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    words = ("--like", "diffusers", "--steps", 7, "-n", 1, "--precision", "float32", "--force")
    assert ddim("sample", tmp_path / "model", *words, "--out", out) == 0
    x = load(tmp_path / "model", "cpu").noise(1).start()
    scheduler.set_timesteps(7)
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t).sample, t, x).prev_sample
    expected = ((x[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5).numpy()
    assert np.abs(np.asarray(Image.open(out / "000000.png")) - expected).max() < 0.6


def test_other_commands_accept_a_diffusers_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "model", unet(**SMALL))
    assert ddim("info", folder) == 0
    output = capsys.readouterr().out
    assert "linear betas" in output
    assert load(folder, "cpu").fingerprint in output
    images = tmp_path / "images"
    assert ddim("sample", folder, "-n", 2, "--steps", 2, "--out", images) == 0
    assert ddim("calibrate", folder, images, "--times", 24, "--out", tmp_path / "calibrated") == 0
    config, weights = checkpoint.read(tmp_path / "calibrated")
    assert config.error is not None
    assert all(torch.equal(value, weights[key]) for key, value in importers.read(folder).weights.items())
