"""Emulation of other libraries, compared with diffusers' scheduler and with the formulas of the other two."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from bench import SCHEDULES, randn
from ddim import names, samplers
from ddim.cli import _emulation
from ddim.errors import DdimError, DdimWarning
from ddim.interop import emulate
from ddim.model.load import load
from ddim.plan.base import Hooked
from ddim.plan.diff import clipping, differences
from ddim.plan.plan import Plan
from ddim.process.parameterization import Prediction, predict
from ddim.process.schedule import Level
from ddim.sampling.loop import trajectory
from models import contents, ddim, save_tiny

LINEAR = SCHEDULES["linear"]
SHAPE = (2, 3, 4, 4)
SPACINGS = ("leading", "trailing", "linspace")


class Fixed:
    """Fixed noise, one tensor per row."""

    def __init__(self, rows: list[Tensor]):
        self.rows = rows

    def row(self, k: int) -> Tensor:
        return self.rows[k]


def network(x: Tensor, t: float) -> Tensor:
    """A smooth network with times from 0, whose outputs are large enough for clipping to matter."""
    return torch.tanh(x.roll(1, -1)) * 1.2 + math.cos(t / 100) * 0.3


def states_of(plan: Plan, x: Tensor, noise: list[Tensor], predicts: Any = "eps") -> list[Tensor]:
    def denoise(x: Tensor, level: Level, /) -> Prediction:
        return predict(network(x, level.t - 1), x, level, predicts)

    fixed: Any = Fixed(noise)
    return [step.x for step in trajectory(denoise, plan, x, fixed)]


def noises(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [randn(*SHAPE, seed=k, dtype=dtype) for k in range(1, count + 1)]


def scheduler(steps: int, spacing: str = "leading", **settings: Any) -> Any:
    """diffusers' scheduler with a float64 table, so that only the formulas are compared."""
    result = DDIMScheduler(timestep_spacing=spacing, **settings)
    result.alphas_cumprod = torch.from_numpy(LINEAR.alpha_bar[1:])
    first = result.alphas_cumprod[0]
    result.final_alpha_cumprod = torch.ones_like(first) if result.config.set_alpha_to_one else first
    result.set_timesteps(steps)
    return result


def diffusers_run(scheduler_: Any, x: Tensor, noise: list[Tensor], eta: float, **settings: Any) -> list[Tensor]:
    states = []
    for k, t in enumerate(scheduler_.timesteps.tolist()):
        drawn = {"variance_noise": noise[k]} if eta else {}
        x = scheduler_.step(network(x, t), t, x, eta=eta, **drawn, **settings).prev_sample
        states.append(x)
    return states


def agree(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


DIFFUSERS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "no clipping": {"clip_sample": False},
    "to alpha_0": {"set_alpha_to_one": False, "clip_sample": False},
    "offset 1": {"steps_offset": 1},
}


@pytest.mark.parametrize(("steps", "eta"), [(7, 0.5), (13, 0.0), (50, 1.0)])
@pytest.mark.parametrize("settings", DIFFUSERS.values(), ids=DIFFUSERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_states_equal_diffusers(spacing: Any, settings: dict[str, Any], steps: int, eta: float) -> None:
    """The states after every row are equal in float64."""
    plan = emulate.plan("diffusers", LINEAR, steps, spacing=spacing, eta=eta, **settings)
    x, noise = randn(*SHAPE), noises(steps)
    agree(states_of(plan, x, noise), diffusers_run(scheduler(steps, spacing, **settings), x, noise, eta))


def test_steps_offset_ends_diffusers_above_clean_data() -> None:
    """S = 600: its last timestep is 1, from which it steps by 1000 // 600 to timestep 0, where it ends."""
    plan = emulate.plan("diffusers", LINEAR, 600, steps_offset=1)
    first = LINEAR.level(1)
    assert plan.mean_weights(599) == pytest.approx((first.signal, first.noise), rel=1e-12)
    x, noise = randn(*SHAPE), noises(1)
    agree(states_of(plan, x, noise), diffusers_run(scheduler(600, steps_offset=1), x, noise, 0.0))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("predicts", ["x0", "v"])
def test_diffusers_keeps_the_unclipped_eps_for_x0_and_v_prediction(predicts: str, eta: float) -> None:
    plan = emulate.plan("diffusers", LINEAR, 13, spacing="trailing", eta=eta)
    kind = {"x0": "sample", "v": "v_prediction"}[predicts]
    x, noise = randn(*SHAPE), noises(13)
    scheduler_ = scheduler(13, "trailing", prediction_type=kind)
    agree(states_of(plan, x, noise, predicts), diffusers_run(scheduler_, x, noise, eta))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_diffusers_with_use_clipped_model_output(eta: float) -> None:
    plan = emulate.plan("diffusers", LINEAR, 13, use_clipped_model_output=True, eta=eta)
    assert plan.clip_x0
    assert not plan.eps_kept
    x, noise = randn(*SHAPE), noises(13)
    agree(states_of(plan, x, noise), diffusers_run(scheduler(13), x, noise, eta, use_clipped_model_output=True))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_diffusers_with_its_float32_table(spacing: Any, clip: bool, eta: float) -> None:
    """One float32 step of the unmodified scheduler from every timestep, to 1e-5 of the size of its terms."""
    scheduler_ = DDIMScheduler(timestep_spacing=spacing, clip_sample=clip)
    scheduler_.set_timesteps(13)
    plan = emulate.plan("diffusers", LINEAR, 13, spacing=spacing, clip_sample=clip, eta=eta)
    assert [row.now.t - 1 for row in plan.rows] == scheduler_.timesteps.tolist()
    for k, row in enumerate(plan.rows):
        t = int(row.now.t) - 1
        x, z = randn(*SHAPE, seed=t, dtype=torch.float32), randn(*SHAPE, seed=t + 1, dtype=torch.float32)
        alone = replace(plan, rows=plan.rows[k : k + 1])
        [actual] = states_of(alone, x, [z])
        other = scheduler_.step(network(x, t), t, x, eta=eta, variance_noise=z if eta else None).prev_sample
        torch.testing.assert_close(actual, other, rtol=1e-5, atol=1e-5 if clip else 1e-5 / row.now.signal)


def authors_run(sequence: list[int], x: Tensor, noise: list[Tensor], eta: float) -> list[Tensor]:
    """A reimplementation of the authors' generalized_steps: the table starts with 1, the sequence is reversed."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    table = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    states = []
    for k, (t, before) in enumerate(zip(sequence[::-1], [*sequence[:-1][::-1], -1], strict=True)):
        a, a_next = table[t + 1], table[before + 1]
        eps = network(x, t)
        x0 = (x - eps * (1 - a).sqrt()) / a.sqrt()
        c1 = eta * ((1 - a / a_next) * (1 - a_next) / (1 - a)).sqrt()
        c2 = (1 - a_next - c1**2).sqrt()
        x = a_next.sqrt() * x0 + c1 * noise[k] + c2 * eps
        states.append(x)
    return states


def authors_noisy_run(sequence: list[int], x: Tensor, noise: list[Tensor]) -> list[Tensor]:
    """A reimplementation of the authors' ddpm_steps: posterior mean with clipped x_0, variance beta, 0 at time 0."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    table = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    states = []
    for k, (t, before) in enumerate(zip(sequence[::-1], [*sequence[:-1][::-1], -1], strict=True)):
        a, a_next = table[t + 1], table[before + 1]
        beta = 1 - a / a_next
        x0 = ((x - network(x, t) * (1 - a).sqrt()) / a.sqrt()).clamp(-1, 1)
        mean = (a_next.sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - a_next) * x) / (1 - a)
        x = mean + (beta.sqrt() * noise[k] if t else 0)
        states.append(x)
    return states


def sequence(skip_type: str, steps: int) -> list[int]:
    if skip_type == "uniform":
        return [*range(0, 1000, 1000 // steps)]
    return [int(t) for t in np.linspace(0, np.sqrt(800), steps) ** 2]


OFFICIAL = [("uniform", 7), ("uniform", 10), ("uniform", 30), ("quad", 10), ("quad", 100), ("quad", 1)]


@pytest.mark.filterwarnings("ignore::ddim.DdimWarning")
@pytest.mark.parametrize(("skip_type", "steps"), OFFICIAL)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, None])
def test_states_equal_the_authors_code(skip_type: str, steps: int, eta: float | None) -> None:
    settings = {"sample_type": "ddpm_noisy"} if eta is None else {"eta": eta}
    plan = emulate.plan("official", LINEAR, steps, skip_type=skip_type, **settings)
    times = sequence(skip_type, steps)
    x, noise = randn(*SHAPE), noises(len(times))
    other = authors_noisy_run(times, x, noise) if eta is None else authors_run(times, x, noise, eta)
    agree(states_of(plan, x, noise), other)


def test_the_authors_code_runs_more_steps_if_s_does_not_divide_t() -> None:
    with pytest.warns(DdimWarning, match=r"\b31\b"):
        plan = emulate.plan("official", LINEAR, 30)
    assert plan.nfe == 31
    assert [emulate.plan("official", LINEAR, steps).nfe for steps in (10, 50)] == [10, 50]


def openai_run(selected: list[int], x: Tensor, noise: list[Tensor], eta: float, clip: bool) -> list[Tensor]:
    """A reimplementation of ddim_sample, over respaced betas with the alpha_bar of the selected times."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    betas = [1 - alpha_bar[t] / before for t, before in zip(selected, [1.0, *alpha_bar[selected[:-1]]], strict=True)]
    table = np.cumprod(1 - np.array(betas))
    states = []
    for k, i in enumerate(range(len(selected) - 1, -1, -1)):
        a, a_prev = float(table[i]), float(table[i - 1]) if i else 1.0
        x0 = math.sqrt(1 / a) * x - math.sqrt(1 / a - 1) * network(x, selected[i])
        x0 = x0.clamp(-1, 1) if clip else x0
        eps = (math.sqrt(1 / a) * x - x0) / math.sqrt(1 / a - 1)
        sigma = eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)
        x = x0 * math.sqrt(a_prev) + math.sqrt(1 - a_prev - sigma**2) * eps
        x = x + (sigma * noise[k] if i else 0)
        states.append(x)
    return states


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    ("respacing", "selected"),
    [
        ("ddim", [*range(0, 1000, 100)]),
        ("ddim", [*range(0, 1000, 77)]),  # 13 entries: 77 is the first stride that has so many
        ("fractional", [0, 166, 333, 500, 666, 832, 999]),  # 999 / 6 = 166.5, a half going to the even neighbour
        ("fractional", [0]),
    ],
)
def test_states_equal_openais_code(respacing: str, selected: list[int], clip: bool, eta: float) -> None:
    plan = emulate.plan("openai", LINEAR, len(selected), respacing=respacing, clip_denoised=clip, eta=eta)
    assert [row.now.t - 1 for row in plan.rows[::-1]] == selected
    x, noise = randn(*SHAPE), noises(len(selected))
    agree(states_of(plan, x, noise), openai_run(selected, x, noise, eta, clip))


def test_openais_integer_strides() -> None:
    """The first stride with exactly S entries, or an error."""
    strides = {steps: emulate.plan("openai", LINEAR, steps).rows[0].now.t - 1 for steps in (50, 30, 1000)}
    assert strides == {50: 49 * 20, 30: 29 * 34, 1000: 999}
    for steps in (600, 1):
        with pytest.raises(DdimError, match=f"ddim{steps}: "):
            emulate.plan("openai", LINEAR, steps)


WRONG = {
    ("diffusers:spacing=linspace", 10): 9,
    ("diffusers:spacing=trailing", 13): 12,
    ("diffusers", 10): 0,
    ("diffusers:spacing=trailing", 10): 0,
    ("diffusers:set_alpha_to_one=false", 10): 1,
    ("diffusers:steps_offset=1", 50): 0,
    ("diffusers:steps_offset=1", 600): 1,
    ("official", 10): 0,
    ("openai", 10): 0,
    ("openai:respacing=fractional", 7): 0,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("emulate") / "model")


def output_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert ddim(*words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("eta", [None, 0.5])
@pytest.mark.parametrize(("name", "steps"), WRONG, ids=lambda value: str(value))
def test_diff_lists_exactly_the_differing_rows(
    name: str, steps: int, eta: float | None, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [] if eta is None else ["--eta", eta]
    emulated, reference, diff = output_of(
        capsys, "plan", tiny, "--like", name, "--steps", steps, "--diff", *options
    ).split("\n\n")
    assert emulated == str(_emulation.make_like(load(tiny, "cpu"), name, steps, eta, None, {})[0])
    assert reference.startswith(f"ddim(the same timesteps, S={steps}")
    first, *lines = diff.splitlines()
    assert first.startswith("compared: ")
    assert first.endswith("with " + reference.split(": ")[0] + ", rows of one time")
    clipped = "diffusers clips x0 and leaves eps as predicted, ddim clips x0 and recomputes eps"
    if name.startswith("diffusers"):
        assert lines.pop(0) == f"clipping differs: {clipped}"
    count, *table = lines
    assert count.startswith(f"rows that differ: {WRONG[name, steps]} of {steps}")
    numbers = [int(line.split()[0]) for line in table[1:]]
    if not name.startswith("diffusers"):
        assert not table
        return
    spacing = name.partition("spacing=")[2] or "leading"
    settings: dict[str, Any] = {"set_alpha_to_one": "to_one=false" not in name, "steps_offset": int("offset" in name)}
    times = scheduler(steps, spacing, **settings).timesteps.tolist()
    targets = [t - 1000 // steps for t in times]
    targets = [t if t >= 0 else -1 if settings["set_alpha_to_one"] else 0 for t in targets]
    assert numbers == [k for k, following in enumerate([*times[1:], -1]) if targets[k] != following]
    for line, k in zip(table[1:], numbers, strict=True):
        assert [float(cell) for cell in line.split()[1:4]] == [times[k] + 1, [*times[1:], -1][k] + 1, targets[k] + 1]


def test_diff_prints_the_differences_of_weights(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = output_of(
        capsys, "plan", tiny, "--like", "diffusers:spacing=linspace", "--steps", 10, "--diff", "--eta", 1
    )
    first = output.splitlines()[-9].split()
    now, meant, went = (LINEAR.level(t) for t in (1000, 889, 900))
    [right], [wrong] = (samplers.ddim([now, level], eta=1.0).rows for level in (meant, went))
    off = [wrong.x0[0] - right.x0[0], wrong.eps[0] - right.eps[0], wrong.z - right.z]
    assert first[:4] == ["0", "1000", "889", "900"]
    assert [float(cell) for cell in first[4:]] == pytest.approx(off, abs=6e-7)


def test_diff_lists_repeated_timesteps(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = output_of(capsys, "plan", tiny, "--like", "official:skip_type=quad", "--steps", 100, "--diff")
    times = sequence("quad", 100)
    twice = [k for k, (a, b) in enumerate(itertools.pairwise(times[::-1])) if a == b]
    assert len(twice) == 4
    count, _, *lines = output.split("compared: ")[1].splitlines()[1:]
    assert count.startswith("rows that differ: 4 of 100")
    assert [int(line.split()[0]) for line in lines] == twice
    assert all("only in official" in line for line in lines)


@pytest.mark.parametrize("grid", ["linear", "trailing", "200,500,1000"])
def test_diff_against_a_custom_grid(grid: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--like", "openai:respacing=fractional", "--grid", grid, "--diff")
    several = ("--steps", 5) if grid[0].isalpha() else ()
    emulated, reference, diff = output_of(capsys, "plan", tiny, *words, *several).split("\n\n")
    times: Any = grid if several else [float(t) for t in grid.split(",")]
    expected = load(tiny, "cpu").plan(5 if several else None, times, clip_x0=True)
    assert reference == str(expected)
    first, count, _, *lines = diff.splitlines()
    assert first.endswith(f"with {expected.name}, row after row")
    rows = max(len(expected), len(emulated.splitlines()) - 2)
    assert f"of {rows}, openai less ddim" in count
    assert len(lines) == int(count.split()[3])
    assert sum("only in openai" in line for line in lines) == rows - len(expected)


def test_differences_of_plans() -> None:
    plan = emulate.plan("diffusers", LINEAR, 13, spacing="trailing", eta=0.5)
    assert not differences(plan, plan)
    assert not clipping(plan, plan)
    row = replace(plan.rows[4], x0=(plan.rows[4].x0[0] + 1e-6,))
    [difference] = differences(plan, replace(plan, rows=(*plan.rows[:4], row, *plan.rows[5:])))
    assert (difference.first, difference.second) == (4, 4)
    assert difference.x0 == pytest.approx(-1e-6, rel=1e-6)
    assert (difference.eps, difference.z) == (0, 0)
    start = Level(999.5, plan.start.log_snr)
    moved = replace(plan, rows=(replace(plan.rows[0], now=start), *plan.rows[1:]))
    [difference] = differences(plan, moved)
    assert (difference.first, difference.second, difference.x0, difference.eps, difference.z) == (0, 0, 0, 0, 0)
    shorter, longer = replace(plan, rows=plan.rows[:-1]), plan
    assert [(difference_.first, difference_.second) for difference_ in differences(shorter, longer)] == [(None, 12)]
    assert [(difference_.first, difference_.second) for difference_ in differences(longer, shorter)] == [(12, None)]


EMULATED: dict[str, tuple[str, int, dict[str, Any]]] = {
    "diffusers": ("diffusers", 13, {"spacing": "trailing", "eta": 1.0}),
    "diffusers, no clipping": ("diffusers", 10, {"spacing": "linspace", "clip_sample": False}),
    "official": ("official", 10, {"eta": 0.5}),
    "official, quad": ("official", 100, {"skip_type": "quad"}),
    "official, sigma-hat": ("official", 10, {"sample_type": "ddpm_noisy"}),
    "openai": ("openai", 13, {"eta": 1.0}),
}
every_emulation = pytest.mark.parametrize(("name", "steps", "settings"), EMULATED.values(), ids=EMULATED)


@every_emulation
def test_emulated_plans_survive_serialization(name: str, steps: int, settings: dict[str, Any]) -> None:
    plan = emulate.plan(name, LINEAR, steps, **settings)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.check_schedule(LINEAR, to_clean=True) is plan
    title = str(plan).splitlines()[0]
    assert ("eps left as predicted" in title) == (name == "diffusers" and settings.get("clip_sample", True))
    assert "arithmetic of" in title
    assert "not checked on straight lines" in title
    plain = json.loads(samplers.ddim(LINEAR.levels([1000, 0])).to_json())
    assert not {"emulates", "eps_kept"} & plain.keys()


@every_emulation
def test_check_rejects_invalid_rows_of_emulated_plans(name: str, steps: int, settings: dict[str, Any]) -> None:
    plan = emulate.plan(name, LINEAR, steps, **settings)
    row = plan.rows[2]
    changes = {
        "does not start where": {"now": plan.rows[0].now},
        "not finite": {"x0": (math.nan,)},
        "sigma = -0.1": {"sigma": -0.1},
        r"sigma = 1\.1 is outside 0\.\.1": {"sigma": 1.1},
        "off by .* from a step to any level": {"x0": (row.x0[0] * (1 + 1e-6),)},
        "off by": {"eps": (-row.eps[0],)},
    }
    if plan.keeps_marginals:
        changes["adds noise"] = {"z": row.z + 1e-3}
    for change in changes.values():
        with pytest.raises(DdimError, match=r"^plan row 2 \(t ="):
            replace(plan, rows=(*plan.rows[:2], replace(row, **change), *plan.rows[3:])).check()


@pytest.mark.parametrize(
    ("spacing", "steps", "first"), [("linspace", 10, 0), ("trailing", 13, 0), ("leading", 10, None)]
)
def test_only_emulations_may_step_to_another_level(spacing: str, steps: int, first: int | None) -> None:
    plan = replace(emulate.plan("diffusers", LINEAR, steps, spacing=spacing), emulates="")
    if first is None:
        assert plan.check() is plan
        return
    with pytest.raises(DdimError, match=f"plan row {first} "):
        plan.check()


def test_a_hook_with_eps_kept_changes_only_x0() -> None:
    x, level = randn(*SHAPE), LINEAR.level(700)
    plain = predict(network(x, 699), x, level, "eps")
    hooked = Hooked(lambda *_: plain, lambda x0, _: x0.clamp(-1, 1), eps_kept=True)(x, level)
    assert torch.equal(hooked.x0, plain.x0.clamp(-1, 1))
    assert torch.equal(hooked.eps, plain.eps)
    assert not torch.equal(plain.x0, hooked.x0)
    with pytest.raises(DdimError, match=r"^plan: .*\bx0\b"):
        replace(samplers.ddim(LINEAR.levels([1000, 500, 0])), eps_kept=True).check()


@pytest.mark.parametrize(
    ("name", "steps", "settings", "wrong"),
    [
        ("nobody", 10, {}, r"^emulation 'nobody': "),
        ("diffusers", 10, {"skip_type": "quad"}, r"^diffusers skip_type: "),
        ("diffusers", 10, {"spacing": "even"}, r"^diffusers spacing 'even': "),
        ("official", 10, {"skip_type": "even"}, r"^official skip_type 'even': "),
        ("official", 10, {"sample_type": "even"}, r"^official sample_type 'even': "),
        ("official", 10, {"sample_type": "ddpm_noisy", "eta": 0.5}, r"^official ddpm_noisy: "),
        ("openai", 10, {"respacing": "even"}, r"^openai respacing 'even': "),
        ("diffusers", 0, {}, r"^diffusers: steps 0: "),
        ("official", 1001, {}, r"^official: steps 1001: "),
        ("openai", 2.5, {}, r"^openai: steps 2\.5: "),
        ("diffusers", 10, {"eta": 30.0}, r"^the step from t = 901 to 801: "),
        ("official", 10, {"eta": -1.0}, r"^eta -1\.0: "),
        ("diffusers", 1000, {"steps_offset": 1}, r"^diffusers leading, S = 1000: .*\b0\.\.999\b"),
        ("diffusers", 61, {"spacing": "trailing"}, r"^diffusers trailing, S = 61: .*\b0\.\.999\b"),
    ],
)
def test_invalid_emulations_are_errors(name: str, steps: Any, settings: dict[str, Any], wrong: str) -> None:
    with pytest.raises(DdimError, match=wrong) as caught:
        emulate.plan(name, LINEAR, steps, **settings)
    assert "\n" not in str(caught.value)


def test_diffusers_itself_indexes_outside_its_table() -> None:
    assert scheduler(1000, steps_offset=1).timesteps.max() == 1000
    assert scheduler(61, "trailing").timesteps.min() == -1


def test_sample_like_equals_sampling_the_emulated_plan(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--like", "diffusers:spacing=linspace,clip_sample=true", "--steps", 3, "--eta", 0.5)
    (tmp_path / "plan.json").write_text(output_of(capsys, "plan", tiny, *words, "--json"))
    output = output_of(capsys, "sample", tiny, "-n", 2, *words, "--out", tmp_path / "named")
    assert output.startswith("2 images, diffusers(linspace, S=3, eta=0.5), 3 network evaluations each")
    output_of(capsys, "sample", tiny, "-n", 2, "--plan", tmp_path / "plan.json", "--out", tmp_path / "file")
    output_of(capsys, "sample", tiny, "-n", 2, *words[:-2], "--out", tmp_path / "other")
    named, file, other = (contents(tmp_path / name) for name in ("named", "file", "other"))
    assert named == file
    assert named["000000.png"] != other["000000.png"]


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("plan MODEL --like nobody", "emulation 'nobody'"),
        ("plan MODEL --like diffusers --sampler heun", "--like and --sampler"),
        ("plan MODEL --like diffusers --grid linear", "--like and --grid"),
        ("plan MODEL --like diffusers --sigma hat", "--like and --sigma"),
        ("plan MODEL --like diffusers --encode", "--like and --encode"),
        ("plan MODEL --like diffusers --top-p 0.5 --diff", "--like and --top-p"),
        ("plan MODEL --like diffusers:spacing", "--like diffusers:spacing"),
        ("plan MODEL --like diffusers:color=red", "--like diffusers:color=red"),
        ("plan MODEL --like diffusers:spacing=even", "'even'"),
        ("plan MODEL --like diffusers:clip_sample=yes", "--like diffusers:clip_sample=yes"),
        ("plan MODEL --like diffusers:steps_offset=much", "--like diffusers:steps_offset=much"),
        ("plan MODEL --like openai:eta=much", "eta is not a number"),
        ("plan MODEL --like openai:eta=1 --eta 1", "openai:eta=1"),
        ("plan MODEL --like openai:clip_denoised=true --no-clip", "--like openai:clip_denoised=true"),
        ("plan MODEL --like official --clip", "official clip"),
        ("plan MODEL --diff", "--diff"),
        ("plan MODEL --like diffusers --diff --json", "--diff"),
        ("sample MODEL --out OUT --like diffusers --sampler heun", "--like and --sampler"),
        ("sample MODEL --out OUT --like diffusers --grid linear", "--like and --grid"),
        ("sample MODEL --out OUT --like diffusers --plan OUT/plan.json", "--plan and --like"),
        ("sample MODEL --out OUT --like diffusers --any-model", "--any-model"),
        ("plan TEXT --like diffusers", "--like"),
    ],
)
def test_conflicting_options_are_one_line_errors(
    words: str, wrong: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "TEXT" in words:
        save_tiny(tmp_path / "text", kind="text")
    paths = {"MODEL": tiny, "OUT": tmp_path / "out", "TEXT": tmp_path / "text"}
    for name, path in paths.items():
        words = words.replace(name, str(path))
    assert ddim(*words.split()) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert output.err.startswith("error: ")
    assert wrong in output.err
    assert not output.out


def test_names_of_emulations_agree() -> None:
    assert names.EMULATED == emulate.NAMES == tuple(emulate.LIBRARIES)
