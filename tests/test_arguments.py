"""Invalid arguments of the Python API raise a DdimError, never an exception of another library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ddim
from ddim.errors import DdimError
from ddim.process.schedule import from_betas
from models import tiny_model

SHAPE = (1, 8, 8)
ZEROS = torch.zeros(2, *SHAPE)
BAD_TENSORS: dict[str, Any] = {
    "nan": torch.full_like(ZEROS, torch.nan),
    "inf": torch.full_like(ZEROS, torch.inf),
    "list": ZEROS.tolist(),
    "none": None,
    "string": "x",
    "meta": torch.zeros(2, *SHAPE, device="meta"),
    "complex": ZEROS.to(torch.complex64),
    "int64": ZEROS.long(),
    "objects": np.array([None, "x"]),
    "shape": torch.zeros(2, 3, 8, 8),
    "a number": torch.tensor(1.0),
    "bytes on meta": torch.zeros(2, 8, 8, 1, dtype=torch.uint8, device="meta"),
    "bytes of another shape": np.zeros((8, 8), np.uint8),
}
METHODS = ("ddim", "fixed-point", "reversible", "lossless")


class Zero(nn.Module):
    """A network that predicts zeros of any shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * self.weight


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(classes=3, predicts="v")


@pytest.fixture(scope="module")
def wrapped() -> Any:
    return ddim.wrap(Zero().eval(), "linear", predicts="v")


@pytest.mark.parametrize("name", BAD_TENSORS)
@pytest.mark.parametrize("method", METHODS)
def test_invalid_images_and_latents_are_errors(name: str, method: str, model: Any) -> None:
    value = BAD_TENSORS[name]
    with pytest.raises(DdimError):
        model.encode(value, steps=2, method=method)
    with pytest.raises(DdimError):
        model.decode(value, steps=2, method=method)
    with pytest.raises(DdimError):
        model.sample(2, steps=2, origin=value, top=500)


@pytest.mark.parametrize("name", ["nan", "inf", "list", "none", "meta", "complex", "int64"])
def test_a_wrapped_network_validates_images_and_latents(name: str, wrapped: Any) -> None:
    with pytest.raises(DdimError):
        wrapped.encode(BAD_TENSORS[name], steps=2)
    with pytest.raises(DdimError):
        wrapped.decode(BAD_TENSORS[name], steps=2)


@pytest.mark.parametrize("method", METHODS)
def test_empty_batches_are_encoded_and_decoded(method: str, model: Any, wrapped: Any) -> None:
    for runner in (model, wrapped):
        latents = runner.encode(torch.zeros(0, *SHAPE), steps=2, method=method)
        assert latents.x.shape == (0, *SHAPE)
        assert runner.decode(latents).shape == (0, *SHAPE)
    assert model.sample(0, steps=2).shape == (0, *SHAPE)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 1e30, "x", 1j, True, 10**400])
def test_invalid_guidance_scale_is_an_error(scale: Any, model: Any) -> None:
    with pytest.raises(DdimError, match="guidance"):
        model.sample(1, steps=2, labels=1, guidance=scale)


def test_guidance_function_must_return_a_finite_number(model: Any) -> None:
    with pytest.raises(DdimError, match="guidance"):
        model.sample(1, steps=2, labels=1, guidance=lambda level: float("nan"))


HOOKS: dict[str, Callable[[Tensor, Any], Any]] = {
    "nan": lambda x0, level: x0 * torch.nan,
    "inf": lambda x0, level: x0 + torch.inf,
    "another shape": lambda x0, level: x0[:, :, :4],
    "one sample": lambda x0, level: x0[:1],
    "nothing": lambda x0, level: None,
    "an array": lambda x0, level: x0.numpy(),
}


@pytest.mark.parametrize("name", HOOKS)
def test_the_output_of_a_hook_is_validated(name: str, model: Any) -> None:
    with pytest.raises(DdimError, match="hook"):
        model.sample(2, steps=2, hook=HOOKS[name])


@pytest.mark.parametrize(
    "arguments",
    [
        {"n": 1.5},
        {"n": "2"},
        {"n": -1},
        {"n": 10**12},
        {"n": True},
        {"seed": 1.5},
        {"seed": -1},
        {"seed": 2**64},
        {"seed": "x"},
        {"start": 1.5},
        {"start": -1},
        {"start": 2**64},
        {"labels": 1.5},
        {"labels": [0, 0.5]},
        {"labels": "01"},
        {"labels": [0, 1, 2]},
        {"labels": 3},
    ],
    ids=str,
)
def test_counts_seeds_and_labels_must_be_integers(arguments: dict[str, Any], model: Any) -> None:
    with pytest.raises(DdimError):
        model.sample(**({"n": 2, "steps": 1} | arguments))


def test_integers_of_numpy_and_torch_are_accepted(model: Any) -> None:
    expected = model.sample(2, steps=1, seed=3, start=1, labels=[0, 1])
    for labels in (np.array([0, 1]), torch.tensor([0, 1]), (np.int64(0), np.int32(1))):
        actual = model.sample(np.int64(2), steps=1, seed=np.uint8(3), start=np.int32(1), labels=labels)
        assert torch.equal(expected, actual)


@pytest.mark.parametrize(
    "betas",
    [[[0.1, 0.2], [0.1, 0.2]], 0.1, [], ["a"], [None], [0.1, float("nan")], [1j], np.zeros((0, 3))],
    ids=str,
)
def test_betas_must_be_a_list_of_numbers(betas: Any) -> None:
    with pytest.raises(DdimError):
        from_betas(betas)
    with pytest.raises(DdimError):
        ddim.wrap(Zero().eval(), betas, predicts="v")


def test_blends_and_slerps_need_latents_of_one_shape() -> None:
    with pytest.raises(DdimError):
        ddim.slerp(torch.zeros(2, 3), torch.zeros(2, 4), 0.5)
    with pytest.raises(DdimError):
        ddim.slerp(torch.zeros(2, 3), torch.full((2, 3), torch.nan), 0.5)
    with pytest.raises(DdimError):
        ddim.slerp([[0.0]], torch.zeros(1, 1), 0.5)  # type: ignore[arg-type]
    with pytest.raises(DdimError):
        ddim.blend(torch.zeros(0, 3), [])
    with pytest.raises(DdimError):
        ddim.blend(torch.full((2, 3), torch.inf), [1, 1])


NAMES = ("x" * 5000, "a/" + "y" * 300, "x" * 5000 + "/y", "a\0b", "", 7, None)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: str(name)[:9])
def test_invalid_model_name_is_an_error(name: Any) -> None:
    with pytest.raises(DdimError) as error:
        ddim.load(name)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("device", ["zzz", "meta", "cpu:x", "cuda:99", "", "mps", "x" * 5000], ids=lambda d: d[:9])
def test_unusable_device_is_an_error(device: str) -> None:
    with pytest.raises(DdimError, match="device") as error:
        ddim.load("mnist", device=device)
    assert len(str(error.value)) < 800
    with pytest.raises(DdimError, match="device"):
        ddim.wrap(Zero().eval(), "linear", predicts="v", device=device)
