"""Inversion methods: reversed two-step plans, rows solved by fixed point, and the files and commands."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bench import GAUSSIAN, MIXTURE, SCHEDULES, equal_angles, levels_of, randn
from ddim import names, samplers
from ddim._io.safetensors import read_tensors, write_tensors
from ddim.data.pixels import to_float
from ddim.errors import DdimError, DdimWarning
from ddim.names import METHODS
from ddim.plan.plan import Plan
from ddim.process.parameterization import Prediction, predict
from ddim.process.schedule import Level
from ddim.sampling.fixed_point import invert_rows
from ddim.sampling.inversion import LATTICE, drop_first, encode, encoding, graded_timesteps, make_inversion, reverse
from ddim.sampling.latents import read_latents, write_latents
from ddim.sampling.loop import run, trajectory
from models import ddim, save_tiny, stripes, tiny_model, write_pictures

LINEAR = SCHEDULES["linear"]
FIRST = LINEAR.level(1)
TWO_STEP: dict[str, Callable[..., Plan]] = {
    "bdia": samplers.bdia,
    "bdia, gamma 1": lambda levels: samplers.bdia(levels, gamma=1),
    "bdia, gamma 0.8": lambda levels: samplers.bdia(levels, gamma=0.8),
    "o-belm": samplers.o_belm,
}


def smooth_network(x: Tensor, level: Level, /) -> Prediction:
    """An arbitrary smooth function of the state and the level as a network."""
    mix = randn(x.shape[1], x.shape[1], seed=1).to(x)
    return predict(torch.sin(x @ mix + level.angle), x, level, "v")


def states(plan: Plan, start: Tensor, *earlier: Tensor) -> list[Tensor]:
    """All states of a run, the start first."""
    return [start, *(step.x for step in trajectory(smooth_network, plan, start, earlier=earlier))]


@pytest.mark.parametrize("name", TWO_STEP)
def test_a_two_step_plan_is_inverted(name: str) -> None:
    """The algebraic inverse in float64, for an arbitrary network."""
    plan = TWO_STEP[name](levels_of(LINEAR, "equal-angle", 20))
    down = states(plan, randn(5, 4))
    back = reverse(plan)
    assert len(back) == len(plan) - 1
    assert (back.start, back.before) == (plan.rows[-1].now, (plan.end,))
    size = max(float(state.abs().max()) for state in down)
    up = states(back, down[-2], down[-1])
    for there, here in zip(up, down[-2::-1], strict=True):
        torch.testing.assert_close(there, here, rtol=0, atol=1e-10 * size)


@pytest.mark.parametrize("name", TWO_STEP)
def test_reversing_twice_gives_the_plan_from_its_second_state(name: str) -> None:
    plan = TWO_STEP[name](levels_of(LINEAR, "quadratic", 10))
    twice, once = reverse(reverse(plan)), drop_first(plan)
    assert (twice.before, len(twice)) == (once.before, len(once))
    for actual, other in zip(twice.rows, once.rows, strict=True):
        assert (actual.now, actual.next) == (other.now, other.next)
        assert (*actual.x, *actual.x0, *actual.eps) == pytest.approx((*other.x, *other.x0, *other.eps), rel=1e-12)
    assert Plan.from_json(reverse(plan).to_json()) == reverse(plan)


@pytest.mark.parametrize("name", TWO_STEP)
def test_encoding_and_decoding_return_the_image(name: str) -> None:
    """Encoding takes one evaluation per step and only the image; decoding needs the last two states."""
    plan = TWO_STEP[name](levels_of(LINEAR, "linear", 10))
    up, image = encoding(plan, FIRST), randn(5, 4, seed=2)
    assert (len(up), up.before, up.start.t, up.rows[0].query) == (len(plan), (), 0, FIRST)
    reached = states(up, image)
    size = max(float(state.abs().max()) for state in reached)
    again = run(smooth_network, drop_first(plan), reached[-2], earlier=[reached[-1]])
    torch.testing.assert_close(again, image, rtol=0, atol=1e-10 * size)


@pytest.mark.parametrize("schedule", ["cosine+zero-terminal-snr", "linear+zero-terminal-snr"])
def test_bdia_inverts_from_zero_signal(schedule: str) -> None:
    schedule_ = SCHEDULES[schedule]
    inversions = [
        make_inversion(name, levels_of(schedule_, "linear", 10), schedule_.level(1))
        for name in ("reversible", "lossless")
    ]
    for inversion in inversions:
        z, earlier, nfe = encode(smooth_network, inversion, randn(5, 4, seed=2).float())
        assert inversion.decode_plan.start.signal == 0
        assert nfe.tolist() == [10] * 5
        again = run(smooth_network, inversion.resume_plan, earlier, earlier=[z]).float()
        torch.testing.assert_close(again, randn(5, 4, seed=2).float(), rtol=0, atol=1e-4)


def test_bdia_is_the_formula_of_its_paper() -> None:
    """x_n = gamma (x_p - DDIM from i to p) + DDIM from i to n."""
    p, i, n = LINEAR.levels([900, 600, 200])
    plan = samplers.bdia([p, i, n], gamma=0.7)
    x_i, x_p = randn(3, 4), randn(3, 4, seed=1)
    [step] = trajectory(smooth_network, drop_first(plan), x_i, earlier=[x_p])
    there, here = (run(smooth_network, samplers.ddim([i, end]), x_i) for end in (p, n))
    torch.testing.assert_close(step.x, 0.7 * (x_p - there) + here, rtol=1e-12, atol=1e-12)
    assert plan.rows[0] == samplers.ddim([p, i]).rows[0]


def test_the_default_gamma_leaves_a_hundredth() -> None:
    for steps in (5, 20, 50):
        gammas = {row.x[1] for row in samplers.bdia(levels_of(LINEAR, "equal-angle", steps)).rows[1:]}
        [gamma] = gammas
        assert gamma**steps == pytest.approx(0.01)


def test_bdia_with_gamma_1_is_of_order_2_in_equal_rotations() -> None:
    """Against the closed-form flow of Gaussian data; plain DDIM is of order 1."""
    errors: dict[str, list[float]] = {"bdia": [], "ddim": []}
    for steps in (40, 80, 160, 320):
        levels = equal_angles(LINEAR, steps)
        x = randn(6, 4, seed=5)
        exact = GAUSSIAN.flow(x, levels[0], levels[-1])
        for name, plan in (("bdia", samplers.bdia(levels, gamma=1)), ("ddim", samplers.ddim(levels))):
            errors[name].append(float((run(GAUSSIAN.denoise, plan, x) - exact).square().mean().sqrt()))
    orders = {name: [math.log2(a / b) for a, b in itertools.pairwise(values)] for name, values in errors.items()}
    assert orders["bdia"] == pytest.approx([2, 2, 2], abs=0.3)
    assert orders["ddim"] == pytest.approx([1, 1, 1], abs=0.2)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_lossless_is_lossless(steps: int) -> None:
    """Encoding and decoding all 256 grey values is bit-exact, in float32 and in float64."""
    images = to_float(np.arange(256, dtype=np.uint8).reshape(64, 2, 2, 1)).flatten(1)
    assert torch.equal((images.double() / LATTICE).round() * LATTICE, images.double())
    inversion = make_inversion("lossless", levels_of(LINEAR, "equal-angle", steps), FIRST)
    z, earlier, _ = encode(smooth_network, inversion, images)
    again = run(smooth_network, inversion.resume_plan, earlier, earlier=[z])
    assert torch.equal(again, images.double())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lossless_inversion_of_a_model_is_bit_exact(dtype: str) -> None:
    """The result does not depend on padding or on other samples of the micro-batch."""
    model, images = tiny_model(dtype=dtype, micro_batch=2), stripes(5)
    latents = model.encode(images, steps=10, method="lossless")
    assert latents.x.shape == (5, 1, 8, 8)
    assert latents.x.dtype == torch.float64
    assert torch.equal(model.decode(latents), to_float(images))
    assert torch.equal(model.decode(latents[3:4]), to_float(images)[3:4])


@pytest.mark.parametrize(("method", "off"), [("reversible", 5e-5), ("fixed-point", 5e-5), ("lossless", 0)])
@pytest.mark.parametrize("grid", [None, "quadratic", [100.0, 400.0, 700.0, 1000.0]])
def test_a_model_reconstructs_images(method: str, off: float, grid: str | list[float] | None) -> None:
    model, images = tiny_model(), to_float(stripes(3))
    steps = None if isinstance(grid, list) else 12
    latents = model.encode(images, steps, grid=grid, method=method)
    again = model.decode(latents)
    assert again.dtype == torch.float32
    assert float((again - images).abs().max()) <= off
    assert len(model.encode(images[:0], steps, grid=grid, method=method)) == 0


def test_decoding_one_state_of_two_is_approximate_and_warns() -> None:
    model, images = tiny_model(), to_float(stripes(2))
    latents = model.encode(images, 20, method="reversible")
    with pytest.warns(DdimWarning):
        again = model.decode(latents.x, 20, method="reversible")
    assert float((again - images).square().mean().sqrt()) > 1e-3
    with pytest.raises(DdimError, match=r"^latents: "):
        model.decode(latents, 20)
    with pytest.raises(DdimError, match=r"^method 'magic': "):
        model.encode(images, 20, method="magic")


def test_ddim_target_evaluates_at_the_next_level() -> None:
    """xbar' = xbar + (v' - v) eps, with eps of the network at x and the next level."""
    levels = levels_of(LINEAR, "linear", 6)[::-1]
    x, levels_seen = randn(3, 4), []

    def spy(x: Tensor, level: Level, /) -> Prediction:
        levels_seen.append(level)
        return smooth_network(x, level)

    plan = samplers.ddim_target(levels)
    for step, (now, following) in zip(trajectory(spy, plan, x), itertools.pairwise(levels), strict=True):
        bar = x / now.signal + (following.ratio - now.ratio) * smooth_network(x, following).eps
        torch.testing.assert_close(step.x, following.signal * bar, rtol=1e-10, atol=1e-10)
        x = step.x
    assert levels_seen == list(levels[1:])


@pytest.mark.parametrize("data", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_fixed_point_inverts_each_row(data: object) -> None:
    """Each row maps the solution to its target, and the whole plan returns the data."""
    denoise = data.denoise  # type: ignore[attr-defined]
    plan = samplers.ddim(LINEAR.levels(graded_timesteps(LINEAR, 20, 1000)[::-1]))
    image = data.sample(16, 0) / 4  # type: ignore[attr-defined]
    target = image
    for solved in invert_rows(denoise, plan, image, tolerance=1e-12, limit=200):
        output = run(denoise, Plan("row", (solved.row,)), solved.x)
        residual = (output - target).square().mean(1).sqrt()
        torch.testing.assert_close(residual, solved.residual, rtol=1e-6, atol=1e-15)
        assert float(residual.max()) <= 1e-12
        assert 1 <= solved.nfe <= 200
        target = solved.x
    torch.testing.assert_close(run(denoise, plan, target), image, rtol=0, atol=1e-6)


def test_on_gaussian_data_the_solution_is_the_closed_form() -> None:
    plan = samplers.ddim(LINEAR.levels(graded_timesteps(LINEAR, 10, 1000)[::-1]))
    start = randn(8, 4)
    levels = [plan.start, *(row.next for row in plan.rows)]
    *_, last = invert_rows(GAUSSIAN.denoise, plan, GAUSSIAN.ddim_map(start, levels), tolerance=1e-13, limit=100)
    torch.testing.assert_close(last.x, start, rtol=0, atol=1e-8)


def test_fixed_point_does_not_depend_on_the_batch() -> None:
    plan = samplers.ddim(LINEAR.levels(graded_timesteps(LINEAR, 10, 1000)[::-1]))
    images = MIXTURE.sample(6, 0) / 4
    *_, together = invert_rows(MIXTURE.denoise, plan, images, tolerance=1e-10, limit=100)
    *_, alone = invert_rows(MIXTURE.denoise, plan, images[2:3], tolerance=1e-10, limit=100)
    torch.testing.assert_close(together.x[2:3], alone.x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 3, 20, 400, 999])
def test_graded_times(schedule: str, steps: int) -> None:
    times = graded_timesteps(SCHEDULES[schedule], steps, 1000)
    assert (times[0], times[-1], len(times)) == (1, 1000, steps + 1)
    assert all(later - earlier >= 1 and later == int(later) for earlier, later in itertools.pairwise(times))


def test_too_many_graded_times_are_an_error() -> None:
    with pytest.raises(DdimError, match=r"^steps 1000: .*\b1\.\.999\b"):
        graded_timesteps(LINEAR, 1000, 1000)


DOWN = levels_of(LINEAR, "linear", 4)


@pytest.mark.parametrize(
    ("call", "wrong"),
    [
        (lambda: reverse(samplers.ddim(DOWN)), r"^plan row 1 \(t = 750 to 500\): "),
        (lambda: reverse(samplers.ddim(DOWN, eta=1)), r"^plan row 1 \(t = 750 to 500\): "),
        (lambda: reverse(samplers.ddim(DOWN[-2:])), r"^plan: "),
        (lambda: samplers.bdia(DOWN, gamma=0), r"^gamma 0\.0: "),
        (lambda: samplers.bdia(DOWN, gamma=math.nan), r"^gamma nan: "),
        (lambda: samplers.bdia(DOWN, gamma=0.5, lattice=LATTICE), r"^gamma 0\.5: "),
        (lambda: samplers.bdia(DOWN[::-1]), r"^bdia: "),
        (lambda: samplers.o_belm(levels_of(SCHEDULES["cosine+zero-terminal-snr"], "linear", 4)), r"^level t = 1000: "),
        (lambda: samplers.ddim_target(DOWN), r"^levels: "),
        (lambda: make_inversion("reversible", DOWN[-2:], FIRST), r"^plan: "),
        (lambda: make_inversion("none", DOWN, FIRST), r"^method 'none': "),
        (lambda: [*invert_rows(smooth_network, samplers.ddim(DOWN), randn(2, 4))], r"^plan row 3 \(t = 250 to 0\): "),
        (
            lambda: [*invert_rows(smooth_network, samplers.ddim(DOWN[:-1], eta=1), randn(2, 4))],
            r"^plan row 0 \(t = 1000 to 750\): ",
        ),
        (
            lambda: [*invert_rows(smooth_network, samplers.ddim(DOWN[:-1], clip_x0=True), randn(2, 4))],
            r"^plan row 0 \(t = 1000 to 750\): ",
        ),
        (
            lambda: [*invert_rows(smooth_network, samplers.bdia(DOWN[:-1]), randn(2, 4))],
            r"^plan row 1 \(t = 750 to 500\): ",
        ),
    ],
)
def test_plans_that_cannot_be_inverted_are_errors(call: Callable[[], object], wrong: str) -> None:
    with pytest.raises(DdimError, match=wrong):
        call()


def test_a_row_without_a_solution_names_its_samples() -> None:
    """x_0 is always 0, so only the second image, which is 0, has a solution."""
    plan = samplers.ddim(LINEAR.levels([1000, 1]))
    images = torch.stack([torch.ones(4), torch.zeros(4), torch.full((4,), math.nan)])

    def flat(x: Tensor, level: Level, /) -> Prediction:
        return Prediction(torch.zeros_like(x), torch.tanh(x))

    with pytest.raises(DdimError) as caught:
        [*invert_rows(flat, plan, images, limit=15, index=torch.tensor([7, 8, 9]))]
    assert "samples 7, 9: plan row 0 (t = 1000 to 1): " in str(caught.value)
    assert str(caught.value).endswith("use more steps, or method reversible")
    assert "\n" not in str(caught.value)


def test_states_too_large_for_the_lattice_are_errors() -> None:
    def loud(x: Tensor, level: Level, /) -> Prediction:
        return predict(1e7 * torch.ones_like(x), x, level, "v")

    with pytest.raises(DdimError, match=r"^lossless: plan row 0: .*\b1\.04858e\+06\b"):
        encode(loud, make_inversion("lossless", DOWN, FIRST), randn(2, 4))


def test_names_of_inversion_methods_agree() -> None:
    assert names.METHODS == METHODS


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize("method", ["fixed-point", "reversible", "lossless"])
def test_encode_and_decode_commands_reconstruct_images(
    method: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write_pictures(tmp_path / "images", 3)
    latents = tmp_path / "z.safetensors"
    assert ddim("encode", tiny, *paths, "--method", method, "--steps", 12, "--out", latents) == 0
    assert f"3 latents, {method}, " in capsys.readouterr().out
    assert ddim("decode", tiny, latents, "--out", tmp_path / "out", "--force") == 0  # the network is a random one
    capsys.readouterr()
    for index in range(3):
        with Image.open(tmp_path / "out" / f"{index:06d}.png") as image:
            assert (np.asarray(image) == stripes(3)[index, :, :, 0]).all()
    file = read_latents(latents)
    assert (file.method, file.x.dtype) == (method, torch.float64 if method == "lossless" else torch.float32)
    assert (file.earlier is None) == (method == "fixed-point")
    # Requesting the same timesteps decodes as stored; other ones warn and start from x_T.
    assert ddim("decode", tiny, latents, "--out", tmp_path / "out", "--steps", 12, "--method", method) == 0
    assert "note" not in capsys.readouterr().err
    assert ddim("decode", tiny, latents, "--out", tmp_path / "other", "--steps", 9, "--force") == 0
    output = capsys.readouterr().err
    assert "z.safetensors" in output
    assert ("approximate" in output) == (method != "fixed-point")
    assert ddim("decode", tiny, latents, "--out", tmp_path / "wrong", "--method", "ddim") == 2
    assert "z.safetensors: " in capsys.readouterr().err


def test_other_conditions_are_warned_about(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_pictures(tmp_path / "images", 2)
    latents = tmp_path / "z.safetensors"
    assert ddim("encode", tiny, *paths, "--method", "lossless", "--steps", 5, "--out", latents) == 0
    file = read_latents(latents)
    assert not file.other_conditions(file.conditions)
    write_latents(latents, replace(file, conditions={**file.conditions, "threads": 64}))
    capsys.readouterr()
    assert ddim("decode", tiny, latents, "--out", tmp_path / "out") == 0
    assert "was encoded under other conditions (threads 64, now 1)" in capsys.readouterr().err


def test_a_file_of_version_1_is_read(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It stores the encoding plan and is decoded over the same timesteps in falling order."""
    model = tiny_model()
    up, latents = model.plan(5, "quadratic", encode=True), randn(2, 1, 8, 8, dtype=torch.float32)
    assert ddim("encode", tiny, *write_pictures(tmp_path / "p", 1), "--steps", 3, "--out", tmp_path / "new") == 0
    sha = read_latents(tmp_path / "new").model_sha256
    meta = {"format": "ddim-latents", "version": 1, "names": ["a", "b"], "plan": up.to_json(), "model_sha256": sha}
    write_tensors(tmp_path / "old", {"latents": latents}, meta)
    file = read_latents(tmp_path / "old")
    assert torch.equal(file.x, latents)
    assert file.plan == model.plan(5, "quadratic")
    assert (file.method, file.earlier, file.names) == ("ddim", None, ("a", "b"))
    capsys.readouterr()
    assert ddim("decode", tiny, tmp_path / "old", "--out", tmp_path / "out") == 0
    assert "note" not in capsys.readouterr().err


def test_a_file_without_its_second_states_is_an_error(tiny: Path, tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "images", 2)
    path = tmp_path / "z.safetensors"
    assert ddim("encode", tiny, *paths, "--method", "reversible", "--steps", 5, "--out", path) == 0
    tensors, meta = read_tensors(path)
    for broken in ({"latents": tensors["latents"]}, {**tensors, "earlier": tensors["earlier"][:1]}):
        write_tensors(path, broken, meta)
        with pytest.raises(DdimError, match=r"z\.safetensors: "):
            read_latents(path)
    write_tensors(path, tensors, {**meta, "version": 3})
    with pytest.raises(DdimError, match=r"z\.safetensors: "):
        read_latents(path)


def test_a_failed_inversion_is_a_one_line_error(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write_pictures(tmp_path / "images", 2)
    monkeypatch.setattr("ddim.sampling.fixed_point.RESIDUAL", 0.0)
    out = tmp_path / "z.safetensors"
    assert ddim("encode", tiny, *paths, "--method", "fixed-point", "--steps", 2, "--out", out) == 2
    output = capsys.readouterr().err.splitlines()
    assert [line for line in output if line.startswith("error: ")] == output[-1:]
    assert "samples 0, 1: plan row 1" in output[-1]
    assert not out.exists()
    words = ("reconstruct", tiny, *paths, "--steps", 2, "--method", "ddim,fixed-point", "--out", tmp_path / "table")
    assert ddim(*words) == 0
    assert "fixed-point, S = 2, is left out: samples 0, 1" in capsys.readouterr().err


def test_reconstruct_compares_methods(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write_pictures(tmp_path / "images", 3)
    words = ("reconstruct", tiny, *paths, "--steps", "6,12", "--out", tmp_path / "table", "--method")
    assert ddim(*words, ",".join(METHODS)) == 0
    output = capsys.readouterr().out
    rows = json.loads((tmp_path / "table/reconstruct.json").read_text())["rows"]
    assert [(row["method"], row["steps"]) for row in rows] == [*itertools.product(METHODS, (6, 12))]
    by = {(row["method"], row["steps"]): row for row in rows}
    assert by["lossless", 6]["max"] == by["lossless", 6]["mse"] == 0
    assert by["fixed-point", 12]["rms"] < 1e-5 < by["ddim", 12]["rms"]
    assert by["fixed-point", 12]["calls_per_step"] > 1 == by["reversible", 12]["calls_per_step"]
    assert all(row["rms"] == pytest.approx(2 * math.sqrt(row["mse"])) for row in rows)
    assert all(name in output for name in METHODS)
    assert ddim(*words, "ddim,magic") == 2


def test_latents_files_store_their_origin(tmp_path: Path) -> None:
    model = tiny_model()
    inversion = model.inversion("lossless", 4)
    [encoded] = model.encode_blocks(inversion, to_float(stripes(2)))
    write_latents(tmp_path / "z", model.latents(inversion, [encoded], ("a", "b")))
    again = read_latents(tmp_path / "z")
    assert again.earlier is not None
    assert encoded.earlier is not None
    assert torch.equal(again.x, encoded.latents)
    assert torch.equal(again.earlier, encoded.earlier)
    assert (again.plan, dict(again.conditions)) == (inversion.resume_plan, model.conditions)
