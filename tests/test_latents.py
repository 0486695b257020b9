"""Latents: slerp, paths and grids of latents, reconstruction, and the latents file."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from ddim._io.safetensors import read_tensors, write_tensors
from ddim.data.pixels import to_float
from ddim.errors import DdimError
from ddim.plan.plan import Plan
from ddim.process.parameterization import Prediction
from ddim.process.schedule import Level, linear
from ddim.samplers import ddim
from ddim.sampling.latents import (
    Latents,
    blend,
    read_latents,
    reconstruction_error,
    slerp,
    slerp_grid,
    slerp_path,
    write_latents,
)
from ddim.sampling.loop import run
from models import stripes, tiny_model


def gaussian(n: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@hypothesis.given(seed=st.integers(0, 10**6), a=st.floats(0, 1), d=st.integers(2, 40))
def test_slerp_is_the_papers_formula(seed: int, a: float, d: int) -> None:
    """Eq. (67), in float64, between directions that are neither equal nor opposite."""
    z0, z1 = gaussian(2, d, seed=seed)
    cosine = float(z0 @ z1 / (z0.norm() * z1.norm()))
    hypothesis.assume(abs(cosine) < 0.99)
    theta = math.acos(cosine)
    expected = (math.sin((1 - a) * theta) * z0 + math.sin(a * theta) * z1) / math.sin(theta)
    torch.testing.assert_close(slerp(z0[None], z1[None], a)[0], expected, rtol=1e-12, atol=1e-12)


@hypothesis.given(seed=st.integers(0, 10**6), n=st.integers(1, 6))
def test_a_blend_keeps_the_distribution(seed: int, n: int) -> None:
    """sum w z / sqrt(sum w^2) is linear with weights of square sum 1: independent N(0, I) latents give N(0, I)."""
    weights = gaussian(n, seed=seed)
    coefficients = blend(torch.eye(n, dtype=torch.float64), weights)
    torch.testing.assert_close(coefficients, weights / weights.square().sum().sqrt(), rtol=1e-12, atol=1e-12)
    assert float(coefficients @ coefficients) == pytest.approx(1, rel=1e-12)
    latents = gaussian(n, 2, 3, seed=seed + 1)
    expected = sum(c * z for c, z in zip(coefficients, latents, strict=True))
    torch.testing.assert_close(blend(latents, weights), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(blend(latents, 7e-200 * weights), blend(latents, weights), rtol=1e-12, atol=1e-12)


def test_one_weight_is_that_latent() -> None:
    for dtype in (torch.float32, torch.float64):
        z = gaussian(3, 2, 2, dtype=dtype)
        for weight in (1.0, 0.3, 1e-300, 1e300):
            assert torch.equal(blend(z, [0, weight, 0]), z[1])
        assert torch.equal(blend(z, [[0, 0, 2.0], [-0.3, 0, 0]]), torch.stack([z[2], -z[0]]))
        assert blend(z, torch.eye(3)).dtype == dtype


@pytest.mark.parametrize("a", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_a_blend_of_orthogonal_latents_of_equal_length_is_slerp(a: float) -> None:
    z = 3 * torch.linalg.qr(gaussian(9, 2)).Q.T
    blended = blend(z, [math.cos(a * math.pi / 2), math.sin(a * math.pi / 2)])
    torch.testing.assert_close(blended, slerp(z[:1], z[1:], a)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", [[0, 0], [1], [1, 2, 3], [[1, 0], [0, 0]], [1, math.nan], [math.inf, 1], 1.0, []])
def test_invalid_weights_are_errors(weights: Any) -> None:
    with pytest.raises(DdimError, match="weights"):
        blend(gaussian(2, 4), weights)


HARD = {
    "equal": (1.0, 1.0, 0.0),
    "nearly equal": (1.0, 1.0, 1e-9),
    "opposite": (1.0, -1.0, 0.0),
    "nearly opposite": (1.0, -1.0, 1e-9),
    "opposite, another length": (1.0, -2.0, 1e-7),
    "zero and something": (0.0, 1.0, 0.0),
    "something and zero": (1.0, 0.0, 0.0),
    "zero and zero": (0.0, 0.0, 0.0),
    "tiny": (1e-30, 1e-30, 0.0),
    "huge": (1e30, -1e30, 0.0),
    "generic": (1.0, 0.3, 1.0),
}


def pair(name: str, d: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    scale0, scale1, turn = HARD[name]
    base, other = gaussian(1, d, seed=1), gaussian(1, d, seed=2)
    return (scale0 * base).to(dtype), (scale1 * base + turn * other).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [1, 2, 7, 64])
@pytest.mark.parametrize("name", HARD)
def test_slerp_is_exact_at_the_ends_and_finite_between(name: str, d: int, dtype: torch.dtype) -> None:
    z0, z1 = pair(name, d, dtype)
    assert torch.equal(slerp(z0, z1, 0.0), z0)
    assert torch.equal(slerp(z0, z1, 1.0), z1)
    between = slerp_path(z0[0], z1[0], 33)
    assert between.dtype == dtype
    assert torch.isfinite(between).all()
    longest = max(float(z0.norm()), float(z1.norm()))
    assert float(between.norm(dim=1).max()) <= 1.1 * longest


@pytest.mark.parametrize("d", [2, 7, 64])
@pytest.mark.parametrize("name", HARD)
def test_slerp_paths_are_continuous(name: str, d: int) -> None:
    z0, z1 = pair(name, d)
    frames = 201
    between = slerp_path(z0[0], z1[0], frames)
    longest = max(float(z0.norm()), float(z1.norm()), 1e-300)
    steps = (between[1:] - between[:-1]).norm(dim=1) / longest
    assert float(steps.max()) < 2 * (math.pi + 1) / (frames - 1)


@pytest.mark.parametrize("d", [2, 3, 64])
def test_slerp_of_close_directions_approaches_linear_interpolation(d: int) -> None:
    z0, other = gaussian(1, d, seed=3), gaussian(1, d, seed=4)
    for turn in (1e-3, 1e-5, 1e-7, 1e-9):
        z1 = z0 + turn * other
        straight = 0.7 * z0 + 0.3 * z1
        assert float((slerp(z0, z1, 0.3) - straight).norm()) < 10 * turn**2 + 1e-14


@hypothesis.given(seed=st.integers(0, 10**6), a=st.floats(0, 1), d=st.integers(2, 20))
def test_slerp_of_unit_vectors_has_unit_length(seed: int, a: float, d: int) -> None:
    z = torch.nn.functional.normalize(gaussian(3, d, seed=seed), dim=1)
    for z1 in (z[1:2], -z[:1], z[:1]):
        assert float(slerp(z[:1], z1, a).norm()) == pytest.approx(1, abs=1e-10)


@hypothesis.given(seed=st.integers(0, 10**6), a=st.floats(0, 1))
def test_slerp_is_symmetric(seed: int, a: float) -> None:
    z = gaussian(2, 5, seed=seed)
    torch.testing.assert_close(slerp(z[:1], z[1:], a), slerp(z[1:], z[:1], 1 - a), rtol=1e-9, atol=1e-9)


def test_slerp_is_computed_per_sample() -> None:
    """The angle is computed per sample, not over the batch."""
    z0, z1 = gaussian(4, 1, 3, 3, seed=5), gaussian(4, 1, 3, 3, seed=6)
    at = torch.tensor([0.1, 0.4, 0.5, 0.9], dtype=torch.float64)
    together = slerp(z0, z1, at)
    for i in range(4):
        torch.testing.assert_close(together[i : i + 1], slerp(z0[i : i + 1], z1[i : i + 1], float(at[i])))


def test_slerp_path_has_both_ends_and_equal_angles() -> None:
    z = torch.nn.functional.normalize(gaussian(2, 12, seed=7), dim=1)
    path = slerp_path(z[0], z[1], 9)
    assert path.shape == (9, 12)
    assert torch.equal(path[0], z[0])
    assert torch.equal(path[-1], z[1])
    cosines = (path[1:] * path[:-1]).sum(1)
    torch.testing.assert_close(cosines, cosines[:1].expand(8), rtol=1e-12, atol=1e-12)


def test_slerp_grid_has_the_corners_and_slerp_paths_at_its_edges() -> None:
    corners = gaussian(4, 1, 4, 4, seed=8)
    page = slerp_grid(corners, 3, 5).view(3, 5, 1, 4, 4)
    for (row, column), corner in zip(((0, 0), (0, -1), (-1, 0), (-1, -1)), corners, strict=True):
        assert torch.equal(page[row, column], corner)
    torch.testing.assert_close(page[0], slerp_path(corners[0], corners[1], 5))
    torch.testing.assert_close(page[:, 0], slerp_path(corners[0], corners[2], 3))
    torch.testing.assert_close(page[:, -1], slerp_path(corners[1], corners[3], 3))


def exact(x: Tensor, level: Level) -> Prediction:
    """The best prediction for data from N(0.5, 0.3^2)."""
    gain = 0.09 * level.signal / (0.09 * level.alpha_bar + level.variance)
    x0 = 0.5 + gain * (x - 0.5 * level.signal)
    eps = (x - x0 * level.signal) / level.noise if level.noise else torch.zeros_like(x)
    return Prediction(x0, eps)


def test_reconstruction_error_falls_with_the_number_of_steps() -> None:
    """The error falls with S, as 1 / S or faster, on data whose best predictor is known."""
    schedule, data = linear(), 0.5 + 0.3 * gaussian(64, 4, seed=9)
    errors = []
    for steps in (5, 10, 20, 50, 100, 500):
        times = [0.0, *(schedule.T * i / steps for i in range(1, steps + 1))]
        up = ddim(schedule.levels(times), clean_as=schedule.level(1))
        down = ddim(schedule.levels(times[::-1]))
        again = run(exact, down, run(exact, up, data))
        errors.append(float(reconstruction_error(data, again).mean()))
    assert all(later < earlier for earlier, later in itertools.pairwise(errors)), errors
    assert errors[-1] < 1e-2 * errors[0]


def test_a_model_reconstructs_better_with_more_steps() -> None:
    model = tiny_model()
    images = to_float(stripes(3))
    errors = [
        float(reconstruction_error(images, model.decode(model.encode(images, steps))).mean()) for steps in (5, 20, 80)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 4


def test_reconstruction_error_is_the_mean_square_in_0_1() -> None:
    images, again = torch.full((2, 1, 2, 2), -1.0), torch.full((2, 1, 2, 2), -1.0)
    again[1] = 1.0
    assert reconstruction_error(images, again).tolist() == [0.0, 1.0]


def plan() -> Plan:
    return tiny_model().plan(5)


def test_latents_file_round_trip(tmp_path: Path) -> None:
    latents = gaussian(3, 1, 8, 8, dtype=torch.float32)
    write_latents(tmp_path / "z.safetensors", Latents(latents, plan(), names=("a", "b", "ü"), model_sha256="abc"))
    file = read_latents(tmp_path / "z.safetensors")
    assert torch.equal(file.x, latents)
    assert file.names == ("a", "b", "ü")
    assert file.plan == plan()
    assert file.model_sha256 == "abc"
    assert [path.name for path in tmp_path.iterdir()] == ["z.safetensors"]


GOOD: dict[str, Any] = {"format": "ddim-latents", "version": 2, "names": ["a", "b"], "model_sha256": ""}


@pytest.mark.parametrize(
    ("tensors", "meta"),
    [
        ({"latents": torch.zeros(2, 1, 8, 8)}, {}),
        ({"latents": torch.zeros(2, 1, 8, 8)}, {**GOOD, "format": "ddim-model"}),
        ({"weights": torch.zeros(2, 1, 8, 8)}, GOOD),
        ({"latents": torch.zeros(3, 1, 8, 8)}, GOOD),
        ({"latents": torch.full((2, 1, 8, 8), torch.nan)}, GOOD),
        ({"latents": torch.zeros(2, 1, 8, 8)}, {**GOOD, "plan": "{}"}),
        ({"latents": torch.zeros(2, 1, 8, 8)}, {**GOOD, "plan": None}),
        ({"latents": torch.zeros(2, 1, 8, 8)}, {**GOOD, "names": None}),
    ],
)
def test_other_files_are_errors(tensors: dict[str, Tensor], meta: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "z.safetensors"
    write_tensors(path, tensors, {"plan": plan().to_json(), **meta} if meta else meta)
    with pytest.raises(DdimError, match=r"z\.safetensors"):
        read_latents(path)


def test_a_file_without_its_plan_is_an_error(tmp_path: Path) -> None:
    write_tensors(tmp_path / "z.safetensors", {"latents": torch.zeros(2, 1, 8, 8)}, GOOD)
    with pytest.raises(DdimError, match=r"z\.safetensors"):
        read_latents(tmp_path / "z.safetensors")


@pytest.mark.parametrize("data", [b"", b"text", np.zeros(100).tobytes()])
def test_invalid_safetensors_files_are_errors(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "z.safetensors"
    path.write_bytes(data)
    for read in (read_tensors, read_latents):
        with pytest.raises(DdimError, match=r"z\.safetensors: "):
            read(path)
    with pytest.raises(DdimError, match="nowhere: "):
        read_latents(tmp_path / "nowhere")


def test_latents_changed_on_disk_are_errors(tmp_path: Path) -> None:
    plan = tiny_model().plan(2)
    path = tmp_path / "latents.safetensors"
    write_latents(path, Latents(torch.ones(2, 1, 8, 8), plan, model_sha256="0" * 64))
    assert torch.equal(read_latents(path).x, torch.ones(2, 1, 8, 8))
    body = bytearray(path.read_bytes())
    body[-2] ^= 1
    path.write_bytes(body)
    with pytest.raises(DdimError, match=r"latents\.safetensors: "):
        read_latents(path)
