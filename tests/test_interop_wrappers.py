"""Weights saved with their wrappers' names: every reader of files takes them, or says what it found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ddim._io.safetensors import read_tensors
from ddim.cli._starting import initial_weights
from ddim.errors import DdimError, DdimWarning
from ddim.interop import diffusers_export
from ddim.model.importers import CheckpointHints, read
from foreign_lucid import LucidNet
from foreign_nets import OfficialNet, OpenAINet, filled
from models import new_network, tiny_config

State = dict[str, Tensor]
OFFICIAL = CheckpointHints(size=(16, 16))
CODES: dict[str, tuple[Callable[[], nn.Module], CheckpointHints]] = {
    "official": (lambda: OfficialNet(3, 32, (1, 2), 1, (1,)), OFFICIAL),
    "openai": (lambda: OpenAINet(3, 32, (1, 2), 1, attends=(1,)), CheckpointHints(size=(16, 16), heads=4)),
    "lucidrains": (lambda: LucidNet(16, multipliers=(1, 2)), CheckpointHints((8, 8), "cosine", predicts="v")),
}
PREFIXES = ("_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "model.", "model.module.net.")
AVERAGES = ("ema_model.", "ema.", "averaged_model.module.", "model_ema.", "ema_model._orig_mod.", "swa_model.module.")


def network(code: str, seed: int) -> State:
    return dict(filled(CODES[code][0](), seed).state_dict())


def under(prefix: str, state: State) -> State:
    return {prefix + key: tensor for key, tensor in state.items()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def weights(folder: Path, state: Any, code: str = "official", **told: Any) -> State:
    """Our weights of what a file holds."""
    torch.save(state, folder / "model.pt")
    hints = CODES[code][1]
    return read(folder / "model.pt", CheckpointHints(**{**hints.__dict__, **told})).weights


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_wrapped_network_is_the_network(code: str, prefix: str, tmp_path: Path) -> None:
    plain = network(code, 1)
    assert same(weights(tmp_path, under(prefix, plain), code), weights(tmp_path, plain, code))


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("trained", ["", "model.", "online_model.", "module._orig_mod."])
def test_the_average_is_told_from_the_trained(average: str, trained: str, tmp_path: Path) -> None:
    one, other = network("official", 1), network("official", 2)
    both = under(trained, one) | under(average, other) | {"step": torch.tensor(3)} if trained else {}
    both = both or under(average, other) | one
    assert same(weights(tmp_path, both), weights(tmp_path, other))
    assert same(weights(tmp_path, both, ema=False), weights(tmp_path, one))


def test_parts_compiled_one_by_one(tmp_path: Path) -> None:
    plain = network("official", 1)
    compiled = {key.replace(".block.0.", ".block.0._orig_mod."): tensor for key, tensor in plain.items()}
    assert compiled.keys() != plain.keys()
    assert same(weights(tmp_path, compiled), weights(tmp_path, plain))
    with pytest.raises(DdimError):
        weights(tmp_path, plain | compiled)


@pytest.mark.parametrize("key", ["model", "state_dict", "network", "unet"])
def test_states_inside_training_files(key: str, tmp_path: Path) -> None:
    one, other = network("official", 1), network("official", 2)
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    file = {key: under("module.", one), "optimizer": optimizer, "epoch": 3}
    assert same(weights(tmp_path, file), weights(tmp_path, one))
    for name, average in {
        "ema": other,
        "model_ema": under("module.", other),
        "ema_state_dict": other,
        "ema_helper": {"decay": 0.999, "shadow": other},
    }.items():
        assert same(weights(tmp_path, file | {name: average}), weights(tmp_path, other))
        assert same(weights(tmp_path, file | {name: average}, ema=False), weights(tmp_path, one))


def test_torchs_averaged_model_is_an_average(tmp_path: Path) -> None:
    layer = filled(CODES["official"][0](), 1)
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    expected = weights(tmp_path, dict(layer.state_dict()))
    assert same(weights(tmp_path, averaged.state_dict()), expected)
    assert any("averaged (EMA)" in note for note in read(tmp_path / "model.pt", OFFICIAL).notes)


def test_averaged_parameters_without_names(tmp_path: Path) -> None:
    one, other = network("official", 1), network("official", 2)
    file = {"model": under("module.", one), "ema": {"decay": 0.9, "shadow_params": [*other.values()]}}
    assert same(weights(tmp_path, file), weights(tmp_path, other))
    assert same(weights(tmp_path, file, ema=False), weights(tmp_path, one))
    file["ema"]["shadow_params"] = [*other.values()][1:]
    with pytest.raises(DdimError):
        weights(tmp_path, file)
    assert same(weights(tmp_path, file, ema=False), weights(tmp_path, one))


def test_averages_whose_names_lost_their_dots(tmp_path: Path) -> None:
    one, other = network("openai", 1), network("openai", 2)
    inner = {"diffusion_model" + key.replace(".", ""): tensor for key, tensor in other.items()}
    file = {"state_dict": under("model.diffusion_model.", one) | under("model_ema.", inner)}
    assert same(weights(tmp_path, file, "openai"), weights(tmp_path, other, "openai"))
    assert same(weights(tmp_path, file, "openai", ema=False), weights(tmp_path, one, "openai"))


def test_several_of_a_kind_are_refused_by_name(tmp_path: Path) -> None:
    file = {"ema_0.999": network("official", 1), "ema_0.9999": network("official", 2)}
    with pytest.raises(DdimError, match=r"ema_0\.9999"):
        weights(tmp_path, file)


def test_what_stands_beside_the_network_is_told(tmp_path: Path) -> None:
    weights(tmp_path, under("model.", network("official", 1)) | {"loss.weight": torch.ones(2)})
    assert any("loss.weight" in note for note in read(tmp_path / "model.pt", OFFICIAL).notes)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "ema_model.", "model."])
@pytest.mark.parametrize("binary", [True, False])
def test_a_diffusers_folder(prefix: str, binary: bool, tmp_path: Path) -> None:
    config = tiny_config(predicts="eps", channels=32, groups=32)
    diffusers_export.write(tmp_path / "f", config, dict(new_network(config.network).state_dict()))
    before = read(tmp_path / "f").weights
    file = tmp_path / "f" / "unet" / "diffusion_pytorch_model.safetensors"
    state = under(prefix, read_tensors(file)[0])
    file.unlink()
    torch.save(state, file.with_suffix(".bin")) if binary else save_file(state, file)
    made = read(tmp_path / "f")
    assert same(made.weights, before)
    assert any(prefix.split(".")[0] in note for note in made.notes) or "_orig_mod" in prefix


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "ema_model."])
def test_weights_that_a_training_begins_with(prefix: str, tmp_path: Path) -> None:
    config = tiny_config()
    plain = dict(new_network(config.network).state_dict())
    save_file(under(prefix, plain), tmp_path / "w.safetensors")
    if prefix == "_orig_mod.":
        made = initial_weights(str(tmp_path / "w.safetensors"), config)[1]
    else:
        with pytest.warns(DdimWarning):
            made = initial_weights(str(tmp_path / "w.safetensors"), config)[1]
    assert same(made, plain)


def test_names_of_no_known_network_are_said(tmp_path: Path) -> None:
    with pytest.raises(DdimError, match=r"encoder\.first"):
        weights(tmp_path, {"_orig_mod.encoder.first": torch.ones(2)})
