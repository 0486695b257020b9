"""Checkpoints of the DDIM authors' and OpenAI's libraries, compared with networks of their names and arithmetic."""

from __future__ import annotations

import copy
from collections import OrderedDict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench import randn
from ddim.errors import DdimError
from ddim.model.importers import CheckpointHints, read
from ddim.model.load import load
from ddim.model.model import Model
from foreign_nets import OfficialNet, OpenAINet, filled
from models import ddim

SIZE = (16, 16)
TIMES = torch.tensor([0, 777])


@cache
def official(seed: int = 0, colours: int = 3, levels: tuple[int, ...] = (1, 2), blocks: int = 1, at: Any = (1,)) -> Any:
    return filled(OfficialNet(colours, 32, levels, blocks, at), seed)


@cache
def openai(seed: int = 0, levels: tuple[int, ...] = (1, 2), blocks: int = 1, **options: Any) -> Any:
    return filled(OpenAINet(3, 32, levels, blocks, **({"attends": (1,)} | options)), seed)


def saved(folder: Path, state: Any, name: str = "model.pt") -> Path:
    torch.save(state, folder / name)
    return folder / name


def differ(path: Path, hints: CheckpointHints, network: nn.Module, times: Tensor = TIMES) -> float:
    """The relative difference of the imported network at t = 1 and 778 from the original one at `times`."""
    model = load(path, "cpu", hints=hints, dtype="float32")
    x = randn(2, *model.shape, dtype=torch.float32)
    with torch.no_grad():
        actual, expected = model.network(x, TIMES + 1.0), network(x, times)
    assert expected.std() > 0.01
    return float((actual - expected).norm() / expected.norm())


def renamed(network: nn.Module, prefix: str) -> dict[str, Tensor]:
    return OrderedDict((prefix + key, tensor) for key, tensor in network.state_dict().items())


SHAPES: dict[str, dict[str, Any]] = {
    "two levels": {},
    "grey, two blocks, attention at two levels": {"colours": 1, "levels": (1, 2, 2), "blocks": 2, "at": (0, 2)},
    "one level, no attention": {"levels": (1,), "at": ()},
    "levels of equal channels": {"levels": (1, 1, 2), "at": (1,)},
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_network_of_the_authors_code_computes_the_same(name: str, tmp_path: Path) -> None:
    network = official(**SHAPES[name])
    path = saved(tmp_path, network.state_dict())
    assert differ(path, CheckpointHints(size=SIZE), network) < 1e-5
    assert differ(path, CheckpointHints(size=(16, 8)), network) < 1e-5


def test_configuration_of_the_authors_network(tmp_path: Path) -> None:
    imported = read(
        saved(tmp_path, official(levels=(1, 2, 2), blocks=2, at=(0, 2)).state_dict()), CheckpointHints(size=SIZE)
    )
    network = imported.config.network
    assert (network.channels, network.multipliers, network.blocks, network.attention) == (32, (1, 2, 2), 2, (16, 4))
    assert imported.config.schedule.build().T == 1000
    assert imported.config.schedule.build().alpha_bar[1] == pytest.approx(1 - 1e-4, rel=1e-12)
    assert (imported.config.predicts, imported.config.origin.format, imported.config.data.shape) == (
        "eps",
        "official",
        (16, 16, 3),
    )
    assert [note for note in imported.notes if note.startswith("schedule:") and "assumed" in note]
    assert [note for note in imported.notes if note.startswith("predicts: eps (assumed")]


def test_the_average_of_a_training_file_is_the_default(tmp_path: Path) -> None:
    trained, averaged = official(1), official(2)
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    states = [renamed(trained, "module."), optimizer, 7, 1000]
    path = saved(tmp_path, [*states, dict(averaged.named_parameters())])
    assert differ(path, CheckpointHints(size=SIZE), averaged) < 1e-5
    assert differ(path, CheckpointHints(size=SIZE, ema=False), trained) < 1e-5
    assert "weights: averaged (EMA)" in read(path, CheckpointHints(size=SIZE)).notes
    assert [note for note in read(path, CheckpointHints(size=SIZE, ema=False)).notes if "raw; the averaged" in note]
    alone = saved(tmp_path, states, "alone.pth")
    assert differ(alone, CheckpointHints(size=SIZE), trained) < 1e-5
    assert [note for note in read(alone, CheckpointHints(size=SIZE)).notes if "the only ones" in note]


def test_the_authors_quad_schedule(tmp_path: Path) -> None:
    imported = read(saved(tmp_path, official().state_dict()), CheckpointHints(size=SIZE, schedule="quad", T=500))
    betas = np.linspace(1e-4**0.5, 0.02**0.5, 500) ** 2
    assert np.allclose(imported.config.schedule.build().alpha_bar[1:], np.cumprod(1 - betas), rtol=1e-9)
    assert not [note for note in imported.notes if note.startswith("schedule:") and "assumed" in note]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"heads": 1},
    "heads": {"heads": 4, "scale_shift": True, "learned": True},
    "head channels": {"head_channels": 16, "attends": (0, 1), "blocks": 2},
    "new order": {"heads": 2, "order": "new", "scale_shift": True},
    "blocks that resample": {"head_channels": 16, "updown": True, "scale_shift": True, "levels": (1, 1, 2)},
    "all of guided-diffusion": {"head_channels": 8, "order": "new", "updown": True, "learned": True, "blocks": 2},
    "no attention but in the middle": {"heads": 2, "attends": (), "levels": (1, 2, 2)},
    "one level": {"heads": 1, "levels": (1,), "attends": (0,), "blocks": 2},
}


def hints_of(options: dict[str, Any], **changes: Any) -> CheckpointHints:
    hints = {key: options[key] for key in ("heads", "head_channels") if key in options}
    return CheckpointHints(size=SIZE, **(hints | {"attention": options.get("order")} | changes))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_network_of_openais_computes_the_same(name: str, tmp_path: Path) -> None:
    network = openai(**OPTIONS[name])
    path = saved(tmp_path, network.state_dict())
    assert differ(path, hints_of(OPTIONS[name]), network) < 1e-5
    learned = read(path, hints_of(OPTIONS[name])).config.network.learned_variance
    assert learned == OPTIONS[name].get("learned", False)


def test_the_order_of_queries_and_keys_and_the_number_of_heads_matter(tmp_path: Path) -> None:
    network = openai(heads=4)
    path = saved(tmp_path, network.state_dict())
    assert differ(path, CheckpointHints(size=SIZE, heads=4), network) < 1e-5  # legacy is the default
    assert differ(path, CheckpointHints(size=SIZE, heads=4, attention="new"), network) > 1e-3
    assert differ(path, CheckpointHints(size=SIZE, heads=2), network) > 1e-3


def test_times_are_rescaled_as_improved_diffusion_does(tmp_path: Path) -> None:
    plain, guided = openai(heads=1), openai(heads=1, updown=True)
    of_plain, of_guided = saved(tmp_path, plain.state_dict()), saved(tmp_path, guided.state_dict(), "guided.pt")
    hints = CheckpointHints(size=SIZE, heads=1, T=4000)
    assert differ(of_plain, hints, plain, TIMES / 4) < 1e-5
    assert differ(of_guided, hints, guided) < 1e-5
    assert differ(of_plain, CheckpointHints(size=SIZE, heads=1, T=4000, rescale=False), plain) < 1e-5
    assert differ(of_guided, CheckpointHints(size=SIZE, heads=1, T=4000, rescale=True), guided, TIMES / 4) < 1e-5
    of_heads = saved(tmp_path, openai(head_channels=32).state_dict(), "heads.pt")  # which improved-diffusion has not
    assert read(of_heads, CheckpointHints(size=SIZE, head_channels=32, T=4000)).config.network.time_scale == 1
    assert [note for note in read(of_plain, hints).notes if "1000/4000" in note and "assumed" in note]


def test_openais_linear_and_cosine_betas(tmp_path: Path) -> None:
    path = saved(tmp_path, openai(heads=1).state_dict())
    linear = read(path, CheckpointHints(size=SIZE, heads=1, T=4000)).config.schedule.build().alpha_bar
    assert np.allclose(linear[1:], np.cumprod(1 - np.linspace(0.25e-4, 0.005, 4000)), rtol=1e-9)
    cosine = read(path, CheckpointHints(size=SIZE, heads=1, T=100, schedule="cosine")).config.schedule.build().alpha_bar
    curve = np.cos((np.arange(101) / 100 + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    assert np.allclose(cosine[1:], np.cumprod(1 - betas), rtol=1e-9)


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    network = copy.deepcopy(openai(heads=1)).half()
    path = saved(tmp_path, network.state_dict())
    assert differ(path, CheckpointHints(size=SIZE, heads=1), network.float()) < 1e-5
    imported = read(path, CheckpointHints(size=SIZE, heads=1))
    assert {tensor.dtype for tensor in imported.weights.values()} == {torch.float32}
    assert [note for note in imported.notes if "stored as float16" in note]


def test_every_form_of_file_gives_the_same_model(tmp_path: Path) -> None:
    network = official()
    state = network.state_dict()
    paths = [saved(tmp_path, state, name) for name in ("a.ckpt", "b.pth", "c.pt", "d.bin")]
    paths += [saved(tmp_path, wrapped, f"{at}.pt") for at, wrapped in enumerate(({"state_dict": state}, [state]))]
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "e.safetensors")
    first, *others = (
        read(path, CheckpointHints(size=SIZE)) for path in [*paths, tmp_path / "old.pth", tmp_path / "e.safetensors"]
    )
    for other in others:
        assert other.config == first.config
        assert all(torch.equal(other.weights[key], tensor) for key, tensor in first.weights.items())


def test_an_imported_model_samples_and_can_be_saved(tmp_path: Path) -> None:
    path = saved(tmp_path, openai(heads=2, learned=True).state_dict())
    model = load(path, "cpu", hints=CheckpointHints(size=SIZE, heads=2), dtype="float32")
    assert isinstance(model, Model)
    images = model.sample(2, grid=[100, 400, 1000], seed=1, sigma="learned", sampler="ddim", clip_x0=False)
    assert images.shape == (2, 3, 16, 16)
    assert torch.isfinite(images).all()
    model.save(tmp_path / "ours")
    again = load(tmp_path / "ours", "cpu", dtype="float32")
    assert torch.equal(
        again.sample(2, grid=[100, 400, 1000], seed=1, sigma="learned", sampler="ddim", clip_x0=False), images
    )
    assert again.config.origin == model.config.origin


def test_the_command_converts_and_prints_what_it_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = official()
    path = saved(tmp_path, network.state_dict())
    assert ddim("convert", path, "--size", "16", "--out", tmp_path / "ours") == 0
    assert "assumed" in capsys.readouterr().out
    model = load(tmp_path / "ours", "cpu", dtype="float32")
    x = randn(2, 3, 16, 16, dtype=torch.float32)
    assert torch.allclose(model.network(x, TIMES + 1.0), network(x, TIMES), atol=1e-4)
    assert ddim("convert", path, "--size", "15", "--out", tmp_path / "other") == 2
    assert capsys.readouterr().err.strip().count("\n") == 0
    assert not (tmp_path / "other").exists()


def without(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key not in names}


def changed(network: nn.Module, **tensors: Tensor) -> dict[str, Tensor]:
    return network.state_dict() | {key.replace("__", "."): tensor for key, tensor in tensors.items()}


# What is in the file, what is hinted, and words of the one line that comes of it.
REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no size": (lambda: official().state_dict(), {"size": None}, "--size 32"),
    "a size it cannot have": (lambda: official().state_dict(), {"size": (15, 15)}, r"model\.pt: .*\b15x15\b"),
    "a name is missing": (
        lambda: without(official().state_dict(), "up.1.block.0.norm2.bias"),
        {},
        r"model\.pt: .*\bup\.1\.block\.0\.norm2\.bias\b",
    ),
    "a name too many": (lambda: changed(official(), logvar=torch.zeros(1000)), {}, r"model\.pt: "),
    "a wrong shape": (
        lambda: changed(official(), norm_out__bias=torch.zeros(33)),
        {},
        r"model\.pt: .*\bnorm_out\.bias\b",
    ),
    "a wrong query": (
        lambda: changed(official(), mid__attn_1__q__weight=torch.zeros(64, 63, 1, 1)),
        {},
        r"model\.pt: .*\bmid\.attn_1\.q\.weight\b",
    ),
    "too few rows of time": (
        lambda: changed(official(), mid__block_1__temb_proj__weight=torch.zeros(63, 128)),
        {},
        r"model\.pt: ",
    ),
    "a skip of 3x3": (
        lambda: without(
            changed(official(), down__1__block__0__conv_shortcut__weight=torch.zeros(64, 32, 3, 3)),
            "down.1.block.0.nin_shortcut.weight",
        ),
        {},
        r"model\.pt: .*\b32\b",
    ),
    "pooling instead of convolutions": (
        lambda: {key: tensor for key, tensor in official().state_dict().items() if "sample" not in key},
        {},
        "resamp_with_conv",
    ),
    "latents": (lambda: official(colours=4).state_dict(), {}, r"model\.pt: "),
    "heads where there is one": (lambda: official().state_dict(), {"heads": 4}, r"^--heads: "),
    "an unknown schedule": (lambda: official().state_dict(), {"schedule": "jsd"}, "name"),
    "an unknown prediction": (lambda: official().state_dict(), {"predicts": "score"}, r"model\.pt: .*\bx0\b"),
    "labels": (lambda: openai(heads=1, classes=10).state_dict(), {"heads": 1}, r"model\.pt: "),
    "no heads": (lambda: openai(heads=4).state_dict(), {}, "--heads 4.*--head-channels 64"),
    "heads in two ways": (lambda: openai(heads=4).state_dict(), {"heads": 4, "head_channels": 16}, r"model\.pt: "),
    "heads that do not divide": (lambda: openai(heads=4).state_dict(), {"heads": 5}, r"model\.pt: "),
    "heads of nothing": (lambda: openai(heads=4).state_dict(), {"head_channels": 0}, "--head-channels 0"),
    "an unknown order": (lambda: openai(heads=4).state_dict(), {"heads": 4, "attention": "old"}, r"model\.pt: "),
    "a picture to enlarge": (
        lambda: changed(openai(heads=1), input_blocks__0__0__weight=torch.zeros(32, 6, 3, 3)),
        {"heads": 1},
        r"model\.pt: ",
    ),
    "half of the first channels": (
        lambda: changed(openai(heads=1), time_embed__0__weight=torch.zeros(256, 64)),
        {"heads": 1},
        r"model\.pt: ",
    ),
    "no convolutions to resample": (
        lambda: {k: t for k, t in openai(heads=1).state_dict().items() if ".op." not in k and ".conv." not in k},
        {"heads": 1},
        "conv_resample",
    ),
    "no code's": (
        lambda: nn.Linear(2, 2).state_dict(),
        {},
        r"model\.pt: ",
    ),
    "no state dict": (lambda: {"epoch": 3, "net": {"x": 1}}, {}, r"model\.pt: "),
    "a tensor alone": (lambda: torch.zeros(3), {}, r"model\.pt: "),
    "an empty list": (list, {}, r"model\.pt: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_networks_are_one_line_errors(name: str, tmp_path: Path) -> None:
    state, hints, words = REFUSED[name]
    with pytest.raises(DdimError, match=words) as error:
        read(saved(tmp_path, state()), CheckpointHints(**({"size": SIZE} | hints)))
    assert "\n" not in str(error.value)


def test_a_library_may_be_named(tmp_path: Path) -> None:
    path = saved(tmp_path, official().state_dict())
    assert read(path, CheckpointHints(size=SIZE), "official").notes[0] == "library: official, as requested"
    with pytest.raises(DdimError, match=r"model\.pt: .*\binput_blocks\.0\.0\.weight\b"):
        read(path, CheckpointHints(size=SIZE, heads=1), "openai")
    with pytest.raises(DdimError, match=r"^--from stylegan: "):
        read(path, CheckpointHints(size=SIZE), "stylegan")
