from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from bench import ALL_SAMPLERS, ALPHABETS, SAMPLERS, SCHEDULES, falling, levels_of
from ddim.errors import DdimError
from ddim.plan.base import BasePlan
from ddim.plan.categorical import CategoricalPlan, CategoricalRow
from ddim.plan.plan import Plan
from ddim.plan.row import Row
from ddim.process.schedule import Level
from ddim.samplers import ddim, discrete

LEVELS = falling(SCHEDULES["linear"], [100, 400, 700, 1000])
PLAN = ddim(LEVELS, eta=0.5, about="four")
TOKENS = discrete(LEVELS, ALPHABETS["uniform"], eta=0.5, about="four")
MASKED = discrete(LEVELS, ALPHABETS["mask"])
every_kind = pytest.mark.parametrize("sampler", ALL_SAMPLERS.values(), ids=ALL_SAMPLERS.keys())
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


def altered(k: int, **changes: Any) -> Plan:
    """`PLAN` with changes in row k."""
    return replace(PLAN, rows=tuple(replace(row, **changes) if i == k else row for i, row in enumerate(PLAN.rows)))


@every_kind
@pytest.mark.parametrize("schedule", ["linear", "linear+zero-terminal-snr"])
def test_json_round_trip_is_bit_exact(sampler: Callable[..., Any], schedule: str) -> None:
    plan = sampler(levels_of(SCHEDULES[schedule], "equal-angle", 7))
    assert plan.end.log_snr == math.inf
    text = plan.to_json()
    assert type(plan).from_json(text) == plan
    assert type(plan).from_json(text).to_json() == text
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_an_encoding_plan_stores_the_level_of_its_evaluation() -> None:
    plan = ddim(LEVELS[::-1], clean_as=SCHEDULES["linear"].level(1))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert (again.rows[0].at, again.rows[0].query.t) == (SCHEDULES["linear"].level(1), 1)
    assert again.rows[1].query == again.rows[1].now


def change(path: list[Any], value: Any) -> Callable[[dict[str, Any]], None]:
    def do(body: Any) -> None:
        for key in path[:-1]:
            body = body[key]
        body[path[-1]] = value

    return do


COMMON: list[tuple[Callable[[Any], Any], str]] = [
    (change(["color"], "red"), r"^my\.json: .*\bcolor\b"),
    (change(["rows", 0, "weight"], 1), r"^my\.json: .*\brows\.0\.weight\b"),
    (lambda body: body.pop("levels"), r"^my\.json: .*\blevels\b"),
    (change(["version"], 2), r"^my\.json: "),
    (change(["format"], "cake"), r"^my\.json: "),
    (change(["rows"], []), r"^plan: "),
    (change(["rows", 1, "now"], 99), r"^my\.json: "),
    (change(["rows", 1, "now"], -1), r"^my\.json: .*\brows\.1\.now\b"),
    (change(["levels", 0, 1], "warm"), r"levels\.0\.1"),
    (change(["levels", 0, 1], "nan"), r"levels\.0\.1"),
    (change(["levels", 0, 1], math.nan), r"levels\.0\.1"),
    (change(["levels", 0, 0], math.nan), r"levels\.0\.0"),
    (lambda body: body["rows"].reverse(), r"^plan row 1 \(t = 400 to 100\): "),
]
SPOILT: list[tuple[BasePlan[Any], Callable[[Any], Any], str]] = [
    *((plan, change_, wrong) for plan in (PLAN, TOKENS) for change_, wrong in COMMON),
    (PLAN, change(["rows", 1, "x0"], "much"), r"^my\.json: .*\brows\.1\.x0\b"),
    (PLAN, change(["rows", 2, "sigma"], -0.1), r"^plan row 2 \(t = 400 to 100\): .*\bsigma = -0\.1\b"),
    (
        PLAN,
        change(["rows", 2, "x0"], [PLAN.rows[2].x0[0] * (1 + 1e-6)]),
        r"^plan row 2 \(t = 400 to 100\): ",
    ),
    (PLAN, change(["kind"], "categorical"), r"^my\.json: "),
    (TOKENS, lambda body: body.pop("kind"), r"^my\.json: "),
    (TOKENS, change(["kind"], "graph"), r"^my\.json: .*\bkind\b"),
    (TOKENS, change(["kernel"], "corn"), r"^my\.json: .*\bkernel\b"),
    (TOKENS, change(["kernel"], "markov"), r"^plan row 0 \(t = 1000 to 700\): "),
    (TOKENS, change(["categories"], 1), r"^my\.json: .*\bcategories\b"),
    (TOKENS, change(["pi"], "even"), r"pi\b"),
    (TOKENS, change(["pi"], 3), r"^my\.json: "),
    (TOKENS, change(["pi"], [0.5, 0.5]), r"^my\.json: "),
    (TOKENS, change(["pi"], [0.5, 0.5, 0.5]), r"^plan: "),
    (TOKENS, change(["pi"], [1.5, -0.5, 0.0]), r"pi\b"),
    (TOKENS, change(["temperature"], 0), r"^temperature 0: "),
    (TOKENS, change(["temperature"], math.inf), "temperature"),
    (TOKENS, change(["top_p"], 1.5), r"^top-p 1\.5: "),
    (TOKENS, change(["rows", 1, "keep"], "much"), r"^my\.json: .*\brows\.1\.keep\b"),
    (TOKENS, change(["rows", 1, "keep"], -0.1), r"^my\.json: .*\brows\.1\.keep\b"),
    (TOKENS, change(["rows", 2, "to_x0"], TOKENS.rows[2].to_x0 * (1 + 1e-6)), r"^plan row 2 \(t = 400 to 100\): "),
    (MASKED, change(["pi"], -1), r"pi\b"),
    (MASKED, change(["rows", 1, "fresh"], 1.5), r"^plan row 1 \(t = 700 to 400\): .*\b0\.\.1\b"),
]


@pytest.mark.parametrize(("plan", "change_", "wrong"), SPOILT)
def test_invalid_plan_files_are_one_line_errors(plan: Any, change_: Callable[[Any], Any], wrong: str) -> None:
    body = json.loads(plan.to_json())
    change_(body)
    with pytest.raises(DdimError, match=wrong) as caught:
        type(plan).from_json(json.dumps(body), name="my.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [Plan, CategoricalPlan])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '"plan"'])
def test_invalid_plan_texts_are_errors_with_the_name(text: str, kind: Any) -> None:
    with pytest.raises(DdimError, match=r"^my\.json: ") as caught:
        kind.from_json(text, name="my.json")
    assert "\n" not in str(caught.value)


def nudged(row: Any, straight: bool) -> Iterator[dict[str, Any]]:
    """Changes of a row: each weight of at least 0.01 is increased by a relative 1e-6."""
    if isinstance(row, CategoricalRow):
        weights = {kind: getattr(row, kind) for kind in ("keep", "to_x0", "fresh")}
        yield from ({kind: weight * (1 + 1e-6)} for kind, weight in weights.items() if weight >= 0.01)
        return
    for kind in ("x", "x0", "eps") if straight else ("x", "x0"):
        for j, weight in enumerate(weights := getattr(row, kind)):
            if abs(weight) >= 0.01:
                yield {kind: (*weights[:j], weight * (1 + 1e-6), *weights[j + 1 :])}


@every_kind
def test_check_detects_relative_errors_of_1e_6_in_every_weight(sampler: Callable[..., Any]) -> None:
    plan = sampler(LEVELS)
    assert plan.check() is plan
    for k, row in enumerate(plan.rows):
        changes = list(nudged(row, getattr(plan, "straight", True)))
        assert changes
        for change in changes:
            rows = (*plan.rows[:k], replace(row, **change), *plan.rows[k + 1 :])
            with pytest.raises(DdimError, match=f"plan row {k} "):
                replace(plan, rows=rows).check()


@pytest.mark.parametrize(
    ("plan", "wrong"),
    [
        (altered(1, next=LEVELS[1]), r"^plan row 1 \(t = 700 to 700\): "),
        (altered(1, now=LEVELS[0]), r"^plan row 1 \(t = 1000 to 400\): "),
        (altered(1, sigma=LEVELS[2].noise * 1.01), r"^plan row 1 \(t = 700 to 400\): "),
        (altered(1, sigma=-1e-3), r"^plan row 1 \(t = 700 to 400\): .*\bsigma = -0\.001\b"),
        (altered(1, z=PLAN.rows[1].z * (1 + 1e-6)), r"^plan row 1 \(t = 700 to 400\): "),
        (altered(1, z=0.0), r"^plan row 1 \(t = 700 to 400\): "),
        (altered(3, z=0.1, sigma=0.1), r"^plan row 3 \(t = 100 to 0\): .*\b0\.\.0\b"),
        (altered(1, x0=(math.nan,)), r"^plan row 1 \(t = 700 to 400\): "),
        (altered(1, eps=(math.inf,)), r"^plan row 1 \(t = 700 to 400\): "),
        (altered(1, z=math.nan), r"^plan row 1 \(t = 700 to 400\): "),
        (altered(0, now=Level(1000, math.nan)), r"^plan row 0 \(t = 1000 to 700\): "),
        (altered(0, x0=(PLAN.rows[0].x0[0], 0.0)), r"^plan row 0 \(t = 1000 to 700\): "),
        (replace(PLAN, rows=()), r"^plan: "),
        (replace(PLAN, rows=PLAN.rows[::-1]), r"^plan row 1 \(t = 400 to 100\): "),
        (replace(PLAN, rows=(Row(LEVELS[0], LEVELS[1]),)), r"^plan row 0 \(t = 1000 to 700\): "),
    ],
)
def test_check_detects_planted_bugs(plan: Plan, wrong: str) -> None:
    with pytest.raises(DdimError, match=wrong):
        plan.check()


def test_a_plan_that_is_not_straight_must_preserve_the_signal() -> None:
    curved = replace(altered(1, eps=(0.9,)), straight=False)
    assert curved.check() is curved
    for changes, wrong in (
        ({"x0": (PLAN.rows[1].x0[0] * (1 + 1e-6),)}, r"^plan row 1 \(t = 700 to 400\): "),
        ({"eps": (math.nan,)}, r"^plan row 1 \(t = 700 to 400\): "),
        ({"sigma": 1.1, "z": 1.1}, r"^plan row 1 \(t = 700 to 400\): .*\bsigma = 1\.1\b"),
        ({"z": 0.0}, r"^plan row 1 \(t = 700 to 400\): "),
    ):
        with pytest.raises(DdimError, match=wrong):
            replace(altered(1, **changes), straight=False).check()


def test_straight_is_stored_only_if_false() -> None:
    """So older files without the key are read, and compare equal to new ones."""
    assert "straight" not in json.loads(PLAN.to_json())
    assert Plan.from_json(PLAN.to_json()).straight
    curved = replace(altered(1, eps=(0.9,)), straight=False)
    assert json.loads(curved.to_json())["straight"] is False
    assert Plan.from_json(curved.to_json()) == curved
    file = json.loads(PLAN.to_json()) | {"straight": True}
    assert Plan.from_json(json.dumps(file)) == PLAN


def test_a_row_may_stay_at_its_level() -> None:
    """Like the stages of a Runge-Kutta method: two network evaluations at one level."""
    first, last = LEVELS[1], LEVELS[2]
    length = last.signal * (last.ratio - first.ratio)
    euler = Row(first, last, x=(last.signal / first.signal,), eps=(length,))
    heun = Row(last, last, x=(0.0, last.signal / first.signal), eps=(length / 2, length / 2))
    plan = Plan("heun", (euler, heun)).check().check_schedule(SCHEDULES["linear"])
    assert Plan.from_json(plan.to_json()) == plan
    assert [line.split()[:2] for line in str(plan).splitlines()[2:]] == [["700", "400"], ["400", "400"]]
    with pytest.raises(DdimError, match=r"^plan row 1 \(t = 400 to 400\): "):
        replace(plan, rows=(euler, replace(heun, eps=(length / 2, 0.0)))).check()


def test_only_plans_without_the_marginals_may_add_more_noise_than_sigma() -> None:
    rows = altered(1, z=0.9).rows
    assert replace(PLAN, rows=rows, keeps_marginals=False).check()


@every_sampler
def test_the_printed_table_is_the_plan(sampler: Callable[..., Plan]) -> None:
    plan = sampler(levels_of(SCHEDULES["linear"], "equal-angle", 5))
    title, head, *lines = str(plan).splitlines()
    assert plan.name in title
    assert f"{plan.nfe} network evaluations" in title
    assert ("clipped" in title) == plan.clip_x0
    assert ("not exact on straight lines" in title) != plan.straight
    assert len(lines) == len(plan) >= 5
    assert len({len(line) for line in [head, *lines]}) == 1
    for row, line in zip(plan.rows, lines, strict=True):
        printed = [float(cell) for cell in line.split() if cell != "."]
        times = [float(f"{level.t:g}") for level in (row.now, row.next)]
        run = [*times, row.now.alpha_bar, row.next.alpha_bar, row.sigma, *row.x, *row.x0, *row.eps]
        assert printed == pytest.approx([*run, row.z] if row.z else run, abs=5e-7)


def test_properties_of_a_plan() -> None:
    assert (PLAN.start, PLAN.end) == (LEVELS[0], LEVELS[-1])
    assert (len(PLAN), PLAN.nfe, PLAN.memory) == (4, 4, 1)
    assert PLAN.stochastic
    assert not ddim(LEVELS).stochastic
    assert PLAN.name == "ddim(four, eta=0.5)"
