"""Checkpoints of denoising-diffusion-pytorch, compared with a plain network of its names and arithmetic.

The plain network was compared with the package (2.3.4): the names are equal, the relative difference is 3e-6.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench import randn
from ddim.errors import DdimError
from ddim.model.importers import CheckpointHints, read
from ddim.model.load import load
from ddim.model.model import Model
from ddim.nn.lucidrains import LucidrainsConfig
from foreign_lucid import LucidNet
from foreign_nets import filled
from models import ddim, new_network

SIZE = (8, 8)
TIMES = torch.tensor([0, 77])
TOLD = CheckpointHints(size=SIZE, predicts="v", schedule="cosine")
OPTIONS: dict[str, dict[str, Any]] = {
    "as given": {},
    "grey, three levels": {"colours": 1, "multipliers": (1, 2, 3)},
    "one level": {"multipliers": (1,)},
    "another first width": {"first": 20},
    "attention of each level its own": {"full": (True, False), "heads": (2, 3), "each": (8, 4)},
    "linear everywhere": {"full": (False, False)},
}


@cache
def network(seed: int = 0, **options: Any) -> Any:
    return filled(LucidNet(16, **({"multipliers": (1, 2)} | options)), seed)


def saved(folder: Path, state: Any) -> Path:
    torch.save(state, folder / "model-1.pt")
    return folder / "model-1.pt"


def differ(path: Path, hints: CheckpointHints, original: nn.Module) -> float:
    model = load(path, "cpu", hints=hints, dtype="float32")
    x = randn(2, *model.shape, dtype=torch.float32)
    with torch.no_grad():
        actual, other = model.network(x, TIMES + 1.0), original(x, TIMES)
    assert other.std() > 0.01
    return float((actual - other).norm() / other.norm())


def sigmoid_betas(T: int) -> np.ndarray:
    """The default schedule: alpha_bar falls along a logistic curve from -3 to 3."""
    u = np.linspace(0, 1, T + 1)
    curve = 1 / (1 + np.exp(-(6 * u - 3)))
    alpha_bar = (curve[-1] - curve) / (curve[-1] - curve[0])
    return np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, 0.999)


def cosine_betas(T: int) -> np.ndarray:
    curve = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.clip(1 - curve[1:] / curve[:-1], 0, 0.999)


BETAS = {"sigmoid": sigmoid_betas, "cosine": cosine_betas}
BETAS["linear"] = lambda T: np.linspace(0.1 / T, 20 / T, T)
OBJECTIVES = {"eps": lambda snr: np.ones_like(snr), "x0": lambda snr: snr, "v": lambda snr: snr / (snr + 1)}


def diffusion(net: nn.Module, betas: np.ndarray, predicts: str = "v", capped: bool = False) -> dict[str, Tensor]:
    """The state dict of a GaussianDiffusion: its tables, and the network behind "model."."""
    alpha_bar = np.cumprod(1 - betas)
    snr = alpha_bar / (1 - alpha_bar)
    weight = OBJECTIVES[predicts](snr) * (np.minimum(snr, 5) / snr if capped else 1)
    tables = {"betas": betas, "alphas_cumprod": alpha_bar, "loss_weight": weight}
    return {key: torch.from_numpy(table).float() for key, table in tables.items()} | prefixed(
        "model.", net.state_dict()
    )


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in state.items()}


def training(trained: dict[str, Tensor], averaged: dict[str, Tensor]) -> dict[str, Any]:
    """The file that its Trainer writes."""
    ema = {"initted": torch.tensor(True), "step": torch.tensor(7)}
    ema |= prefixed("online_model.", trained) | prefixed("ema_model.", averaged)
    adam = {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
    return {"step": 7, "model": trained, "opt": adam, "ema": ema, "scaler": None, "version": "2.3.4"}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_network_computes_the_same(name: str, tmp_path: Path) -> None:
    original = network(**OPTIONS[name])
    path = saved(tmp_path, original.state_dict())
    assert differ(path, TOLD, original) < 1e-5
    assert differ(path, CheckpointHints(size=(8, 16), predicts="v", schedule="cosine"), original) < 1e-5


def test_the_network_in_half_precision_and_one_condition_for_all(tmp_path: Path) -> None:
    model = load(saved(tmp_path, network().state_dict()), "cpu", hints=TOLD, dtype="float32")
    x, t = randn(3, *model.shape, dtype=torch.float32), torch.tensor([5.0])
    with torch.no_grad():
        each = model.network(x, t.expand(3))
        assert torch.allclose(model.network.body(model.network.enter(x), model.network.condition(t)), each, atol=1e-5)
        imported = model.denoise(x, model.schedule.level(5)).eps
        low = load(tmp_path / "model-1.pt", "cpu", hints=TOLD, dtype="bfloat16").denoise(x, model.schedule.level(5)).eps
    assert float((low - imported).norm() / imported.norm()) < 0.05
    assert not torch.equal(low, imported)


@pytest.mark.parametrize("predicts", OBJECTIVES)
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("schedule", BETAS)
def test_schedule_and_objective_from_the_tables(schedule: str, capped: bool, predicts: str, tmp_path: Path) -> None:
    betas = BETAS[schedule](100)
    imported = read(saved(tmp_path, diffusion(network(), betas, predicts, capped)), CheckpointHints(size=SIZE))
    assert imported.config.predicts == predicts
    assert np.allclose(imported.config.schedule.build().alpha_bar[1:-1], np.cumprod(1 - betas)[:-1], rtol=1e-6)
    assert imported.config.schedule.name == (schedule if schedule != "sigmoid" else "betas")


def test_the_average_of_a_training_file_is_the_default(tmp_path: Path) -> None:
    betas = sigmoid_betas(100)
    trained, averaged = diffusion(network(1), betas), diffusion(network(2), betas)
    path = saved(tmp_path, training(trained, averaged))
    assert differ(path, CheckpointHints(size=SIZE), network(2)) < 1e-5
    assert differ(path, CheckpointHints(size=SIZE, ema=False), network(1)) < 1e-5
    assert read(path, CheckpointHints(size=SIZE)).notes[-1] == "weights: averaged (EMA)"
    alone = saved(tmp_path, training(trained, averaged)["ema"])
    assert differ(alone, CheckpointHints(size=SIZE), network(2)) < 1e-5
    assert differ(alone, CheckpointHints(size=SIZE, ema=False), network(1)) < 1e-5
    without_online = saved(tmp_path, prefixed("ema_model.", averaged) | {"step": torch.tensor(7)})
    assert differ(without_online, CheckpointHints(size=SIZE), network(2)) < 1e-5
    with pytest.raises(DdimError, match=r"model-1\.pt: "):
        read(without_online, CheckpointHints(size=SIZE, ema=False))
    assert differ(saved(tmp_path, prefixed("module.", trained)), CheckpointHints(size=SIZE), network(1)) < 1e-5


def test_the_sigmoid_schedule_is_that_of_the_library(tmp_path: Path) -> None:
    path = saved(tmp_path, network().state_dict())
    imported = read(path, CheckpointHints(size=SIZE, predicts="v", schedule="sigmoid", T=100))
    assert np.allclose(imported.config.schedule.build().alpha_bar[1:], np.cumprod(1 - sigmoid_betas(100)), rtol=1e-9)
    linear = read(path, CheckpointHints(size=SIZE, predicts="v", schedule="linear", T=250)).config.schedule.build()
    assert np.allclose(linear.alpha_bar[1:], np.cumprod(1 - BETAS["linear"](250)), rtol=1e-9)


def test_a_model_samples_and_is_saved_and_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path, diffusion(network(), sigmoid_betas(100)))
    model = load(path, "cpu", hints=CheckpointHints(size=SIZE), dtype="float32")
    assert isinstance(model, Model)
    images = model.sample(3, steps=4, seed=2)
    assert images.shape == (3, 3, 8, 8)
    assert torch.isfinite(images).all()
    assert ddim("convert", path, "--size", 8, "--out", tmp_path / "actual") == 0
    assert "predicts: v (pred_v" in capsys.readouterr().out
    again = load(tmp_path / "actual", "cpu", dtype="float32")
    assert torch.equal(again.sample(3, steps=4, seed=2), images)
    assert ddim("info", tmp_path / "actual") == 0
    assert "denoising-diffusion-pytorch" in capsys.readouterr().out


def test_a_batch_does_not_matter() -> None:
    imported = new_network(LucidrainsConfig(height=8, width=8, channels=16, first=16, multipliers=(1, 1, 1, 1)))
    x, t = randn(3, 3, 8, 8, dtype=torch.float32), torch.tensor([1.0, 40.0, 900.0])
    with torch.no_grad():
        assert torch.allclose(imported(x, t)[1:2], imported(x[1:2], t[1:2]), atol=1e-5)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"height": 12}, r"\b12x32\b"),
        ({"heads": (4, 4)}, r"\b2\b"),
        ({"memories": (4, 4, 4, 0)}, r"\b1\b"),
        ({"multipliers": (), "full": (), "heads": (), "head_channels": (), "memories": ()}, "."),
    ],
)
def test_invalid_configurations_are_errors(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LucidrainsConfig(**values)


def plain(**tensors: Tensor) -> dict[str, Tensor]:
    return network().state_dict() | {key.replace("__", "."): tensor for key, tensor in tensors.items()}


# What is in the file, what is hinted, and words of the one line that comes of it.
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no size": (plain, {"size": None}, "--size 32"),
    "a size it cannot have": (plain, {"size": (7, 7)}, r"model-1\.pt: .*\b7x7\b"),
    "no schedule": (plain, {"schedule": None}, r"model-1\.pt: .*--schedule\b"),
    "no objective": (plain, {"predicts": None}, "--predicts "),
    "heads": (plain, {"heads": 4}, r"^--heads: "),
    "a schedule beside the file's": (
        lambda: diffusion(network(), sigmoid_betas(100)),
        {},
        r"^--schedule cosine: ",
    ),
    "another objective than the file's": (
        lambda: diffusion(network(), sigmoid_betas(100), "x0"),
        {"schedule": None},
        r"^--predicts v: .*\bpred_x0\b",
    ),
    "self-conditioning": (lambda: plain(init_conv__weight=torch.zeros(16, 6, 7, 7)), {}, "self_condition"),
    "learned variance": (lambda: plain(final_conv__weight=torch.zeros(6, 16, 1, 1)), {}, r"model-1\.pt: "),
    "latents": (lambda: network(colours=4).state_dict(), {}, r"model-1\.pt: "),
    "frequencies of its own": (lambda: plain(time_mlp__0__weights=torch.zeros(8)), {}, "random_fourier_features"),
    "labels": (lambda: plain(classes_emb__weight=torch.zeros(10, 16)), {}, r"model-1\.pt: "),
    "an older version": (lambda: plain(downs__0__2__fn__norm__g=torch.zeros(1, 16, 1, 1)), {}, r"model-1\.pt: "),
    "a name too many": (lambda: plain(logvar=torch.zeros(3)), {}, r"model-1\.pt: "),
    "a wrong shape": (lambda: plain(mid_attn__to_out__weight=torch.zeros(32, 64, 1, 1)), {}, "mid_attn.to_out.weight"),
    "a name missing": (
        lambda: {key: tensor for key, tensor in plain().items() if key != "ups.0.0.mlp.1.bias"},
        {},
        r"model-1\.pt: .*\bups\.0\.0\.mlp\.1\.bias\b",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_networks_are_one_line_errors(name: str, tmp_path: Path) -> None:
    state, hints, words = REFUSED[name]
    values = {"size": SIZE, "predicts": "v", "schedule": "cosine"} | hints
    with pytest.raises(DdimError, match=words) as error:
        read(saved(tmp_path, state()), CheckpointHints(**values))
    assert "\n" not in str(error.value)
