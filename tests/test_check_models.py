"""Checks of networks and models, and the command `ddim check`: correct ones pass, planted bugs fail."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import SCHEDULES, falling
from ddim import check, exact, samplers
from ddim.check.denoisers import quiet_levels
from ddim.check.finding import Finding
from ddim.errors import DdimError
from ddim.model.config import Provenance
from ddim.model.model import Model
from ddim.names import Predicts
from ddim.nn.unet import UNet
from ddim.process.parameterization import Prediction, v_from_pair
from ddim.process.schedule import Level, Schedule
from models import ddim, recipe, save_tiny, stripes, tiny_model, write_pictures

LINEAR = SCHEDULES["linear"]
PLAN = samplers.ddim(falling(LINEAR, [100, 400, 700, 1000]), eta=0.5)
DATA = exact.GaussianData(torch.tensor([0.0, 0.5, -0.3, 0.1]), torch.tensor([0.8, 0.2, 0.1, 0.3]))


def failed(findings: Iterable[Finding]) -> set[str]:
    """The names of the failed checks; asserts that every check that passes or fails has a limit."""
    all_findings = list(findings)
    assert all(finding.limit for finding in all_findings if finding.result != "info")
    assert all(finding.passed for finding in all_findings if not finding.limit)
    return {finding.name for finding in all_findings if not finding.passed}


class Ideal(nn.Module):
    """The ideal network for Gaussian data."""

    def __init__(self, kind: Predicts, on: Schedule = LINEAR) -> None:
        super().__init__()
        self.kind, self.on = kind, on

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        assert t.shape == (len(x),)
        assert t.dtype == torch.float32
        level = self.on.level(float(t[0]) + 1)
        pair = DATA.denoise(x, level)
        return {"eps": pair.eps, "x0": pair.x0, "v": v_from_pair(pair.x0, pair.eps, level)}[self.kind]


KINDS: tuple[Predicts, ...] = ("eps", "x0", "v")
FOLLOWS, UNIT, PAIR = "error correlated with x", "mean square of eps on noise", "x - (signal x_0 + noise eps)"
TWICE, ALONE = "repeated evaluation, difference", "alone and in a batch, difference"


def network(module: Any, predicts: Predicts = "eps", on: Schedule = LINEAR, **settings: Any) -> set[str]:
    return failed(check.network(module, on, predicts, (4,), quick=True, **settings))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["linear", "cosine", "quadratic"])
def test_ideal_network_passes(kind: Predicts, name: str) -> None:
    schedule = SCHEDULES[name]
    assert not failed(check.network(Ideal(kind, schedule), schedule, kind, (4,)))
    assert not network(Ideal(kind, schedule), kind, schedule, x0=DATA.sample(600, seed=1))


@pytest.mark.parametrize("kind", ["x0", "v"])
def test_without_signal_at_T(kind: Predicts) -> None:
    schedule = SCHEDULES["linear+zero-terminal-snr"]
    assert not failed(check.network(Ideal(kind, schedule), schedule, kind, (4,)))
    assert network(Ideal("eps", schedule), "eps", schedule) == {"signal at T, for eps-prediction"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("predicts", KINDS)
def test_a_wrong_prediction_type_is_detected(kind: Predicts, predicts: Predicts) -> None:
    for settings in ({}, {"x0": DATA.sample(1024, seed=1)}):
        assert (kind == predicts) == (not network(Ideal(kind), predicts, **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_schedule_is_detected(kind: Predicts) -> None:
    assert network(Ideal(kind, SCHEDULES["cosine"]), kind, LINEAR, x0=DATA.sample(1024, seed=1))


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_time_conventions_are_detected(kind: Predicts) -> None:
    """Times in 0..1 instead of 0..T - 1, reversed times, and times from 1, which `time_offset` corrects."""
    inner, x0 = Ideal(kind), DATA.sample(1024, seed=1)
    assert FOLLOWS in network(lambda x, t: inner(x, t / 1000), kind, x0=x0)
    assert FOLLOWS in network(lambda x, t: inner(x, 999 - t), kind, x0=x0)

    def from_one(x: Tensor, t: Tensor) -> Tensor:
        assert 1 <= t.min() <= t.max() <= 1000
        return inner(x, t - 1)

    assert FOLLOWS in network(lambda x, t: inner(x, (t + 200).clamp(max=999)), kind, x0=x0)
    assert not network(from_one, kind, time_offset=1)


class With(nn.Module):
    """The ideal eps, modified by a function or a layer."""

    def __init__(self, after: Callable[[Tensor, Tensor, Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.inner, self.after = Ideal("eps"), after

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out = self.inner(x, t)
        return self.after(out) if isinstance(self.after, nn.Module) else self.after(out, x, t)


def partly_trained() -> With:
    """A network that was not trained at the times that only S = 20 uses."""
    coarse, fine = ({level.t for level in quiet_levels(LINEAR, "eps", steps)} for steps in (10, 20))
    return With(lambda out, x, t: -out if float(t[0]) + 1 in fine - coarse else out)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: With(lambda out, x, t: torch.zeros_like(out)), {UNIT, FOLLOWS}),
        (lambda: With(lambda out, x, t: -out), {FOLLOWS, "error in eps at t = 1000"}),
        (lambda: With(lambda out, x, t: out * 0.8), {UNIT, FOLLOWS}),
        (lambda: With(lambda out, x, t: out * torch.where(t == 0, math.nan, 1.0)[:, None]), {"non-finite predictions"}),
        (lambda: With(lambda out, x, t: out / 0), {"samples, non-finite numbers"}),
        (lambda: With(nn.BatchNorm1d(4, affine=False)), {ALONE}),
        (lambda: With(lambda out, x, t: out + 0.01 * x.mean(0)), {ALONE}),
        (lambda: With(nn.Dropout(0.05)), {TWICE}),
        (partly_trained, {"round trip, S = 20"}),
    ],
)
def test_a_defect_of_a_network_is_detected(make: Callable[[], nn.Module], expected: set[str]) -> None:
    with torch.random.fork_rng():  # what dropout draws with
        torch.manual_seed(0)
        assert expected <= network(make())


def test_x0_prediction_may_be_inaccurate_at_low_noise() -> None:
    """An error of 0.02 in x_0 is an error of 2 in eps where the noise is 0.01."""
    inner = Ideal("x0")
    failures = network(lambda x, t: inner(x, t) + 0.02 * torch.sin(40 * x), "x0", x0=DATA.sample(1024, seed=1))
    assert not [name for name in failures if name.startswith("error")]


def test_dropout_in_evaluation_mode_passes() -> None:
    assert not network(With(nn.Dropout(0.05)).eval())


def test_non_finite_samples_end_the_checks() -> None:
    *_, last = check.network(With(lambda out, x, t: out / 0), LINEAR, "eps", (4,))
    assert (last.name, last.passed) == ("samples, non-finite numbers", False)


def test_an_inconsistent_pair_is_detected() -> None:
    """For example if x_0 is clipped and eps is unchanged."""

    def clipped(x: Tensor, level: Level, /) -> Prediction:
        pair = DATA.denoise(x, level)
        return Prediction(pair.x0.clamp(-1, 1), pair.eps)

    assert failed(check.denoiser(clipped, LINEAR, (4,), x0=DATA.sample(1024, seed=1))) >= {PAIR}
    assert not failed(check.denoiser(DATA.denoise, LINEAR, (4,)))


def test_invalid_networks_and_data_are_errors() -> None:
    for module, wrong in (
        (lambda x, t: x[:, :2], r"^network: .*\(512, 4\)"),
        (lambda x, t: (x, t), r"^network: "),
    ):
        with pytest.raises(DdimError, match=wrong):
            network(module)
    for x0 in (torch.zeros(3, 5), torch.zeros(0, 4)):
        with pytest.raises(DdimError, match=r"^images: "):
            network(Ideal("eps"), x0=x0)


def test_global_rng_state_is_unchanged() -> None:
    before = torch.get_rng_state()
    network(Ideal("eps"))
    assert torch.equal(torch.get_rng_state(), before)


# --- models


def untrained(**changes: Any) -> Model:
    """v = 0 for every input, as in an untrained network: ideal for white data of unit variance."""
    config = tiny_model(**changes).config
    with torch.random.fork_rng():
        return Model(UNet(config.network), config, dtype="float32")


def test_an_ideal_model_passes() -> None:
    assert not failed(check.model(untrained(), quick=True))


def test_a_model_with_random_weights_fails() -> None:
    assert FOLLOWS in failed(check.model(tiny_model(), quick=True))


def test_a_model_that_needs_labels_is_evaluated_with_one() -> None:
    plain = untrained(classes=3)
    origin = Provenance(training=recipe(label_drop=0))
    model = Model(plain.network, plain.config.model_copy(update={"provenance": origin}), dtype="float32")
    findings = list(check.model(model, quick=True))
    assert not failed(findings)
    assert findings[0].name == "label"
    assert not failed(check.model(plain, quick=True))


def test_images_as_array_and_as_tensor() -> None:
    images = stripes(20)
    both = [list(check.model(untrained(), array, quick=True)) for array in (images, torch.from_numpy(images))]
    assert both[0] == both[1]
    with pytest.raises(DdimError, match=r"^images: .*\(20, 1, 4, 8\)"):
        list(check.model(untrained(), images[:, :4]))


def test_batch_dependent_bits_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    model = untrained()
    sample = model.sample
    monkeypatch.setattr(model, "sample", lambda n, **settings: sample(n, **settings) + 1e-6 * n)
    assert failed(check.model(model, quick=True)) == {"sample 2 alone, differing numbers"}


# --- the command


@pytest.fixture(scope="module")
def root_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("check")
    untrained().save(root / "good")
    save_tiny(root / "bad")
    write_pictures(root / "pictures", 70)
    (root / "good.json").write_text(PLAN.to_json())
    wrong = replace(PLAN.rows[1], x0=(0.4,))
    rows = (PLAN.rows[0], wrong, *PLAN.rows[2:])
    (root / "wrong.json").write_text(replace(PLAN, rows=rows).to_json())
    (root / "betas.json").write_text(json.dumps([0.1, 0.5, 0.999]))
    (root / "schedule.json").write_text('{"name": "linear", "T": 100}')
    (root / "words.json").write_text('["much", "more"]')
    (root / "number.json").write_text("3")
    (root / "cake.json").write_text('{"format": "cake"}')
    (root / "beta.json").write_text("[0.1, 1.5]")
    (root / "torn.json").write_text(PLAN.to_json()[:200])
    (root / "half.json").write_text('{"format": "ddim-plan"}')
    (root / "binary.json").write_bytes(bytes(range(128, 256)))
    (root / "empty").mkdir()
    return root


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ("cosine", 0, "schedule cosine, T = 1000"),
        ("linear+zero-terminal-snr", 0, "schedule linear+zero-terminal-snr"),
        ("scaled-linear", 1, "x_T against N(0, I)"),
        ("{0}/betas.json", 0, "schedule betas, T = 3"),
        ("{0}/schedule.json", 1, "schedule linear, T = 100"),
        ("{0}/good.json", 0, "plan good.json"),
        ("{0}/good.json --schedule {0}/good", 0, "levels of linear"),
        ("{0}/good.json --schedule cosine", 1, "levels of cosine"),
        ("{0}/good.json --schedule {0}/schedule.json", 1, "levels of linear"),
        ("{0}/wrong.json", 1, "row 1 (t = 700 to 400)"),
        ("{0}/good --quick", 0, "model good, predicts v, on its own samples"),
        ("{0}/bad --quick", 1, FOLLOWS),
        ("{0}/good --quick --data {0}/pictures", 1, "on pictures, 64 images"),
        ("{0}/good --quick --data {0}/pictures/1.png", 1, "on 1.png, 1 image"),
    ],
)
def test_the_command(root_folder: Path, capsys: pytest.CaptureFixture, words: str, code: int, expected: str) -> None:
    assert ddim("check", *words.format(root_folder).split()) == code
    out = capsys.readouterr().out
    assert expected in out
    assert any("FAIL" in line for line in out.splitlines()[:-1]) == bool(code)
    assert out.splitlines()[-1].count("FAIL") == 1


def test_json_output(root_folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert ddim("check", root_folder / "wrong.json", "--json") == 1
    output = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert output["passed"] is False
    by_name = {finding["name"]: finding for finding in output["findings"]}
    assert {name for name, finding in by_name.items() if finding["result"] == "FAIL"} == {
        "straight line, error in x_0",
        "marginals, error of the mean",
    }
    assert by_name["straight line, error in x_0"]["measured"] > 0.01
    assert ddim("check", root_folder / "betas.json", "--json") == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("mnisst", "mnisst"),
        ("{0}/nowhere.json", "nowhere.json"),
        ("nowhere.json", "nowhere.json"),
        ("{0}/empty", "empty"),
        ("{0}/torn.json", "torn.json"),
        ("{0}/half.json", "half.json"),
        ("{0}/binary.json", "binary.json: "),
        ("{0}/words.json", "words.json: "),
        ("{0}/number.json", "number.json"),
        ("{0}/cake.json", "cake.json"),
        ("{0}/good/config.json", "good/config.json"),
        ("{0}/beta.json", "beta_2 = 1.5"),
        ("{0}/pictures/0.png", "0.png: "),
        ("{0}/good.json --schedule {0}/good.json", "--schedule"),
        ("{0}/good.json --data {0}/pictures", "--data"),
        ("{0}/good.json --quick", "--quick"),
        ("cosine --schedule linear", "--schedule"),
        ("{0}/good --schedule linear", "--schedule"),
        ("{0}/good --limit 3", "--limit"),
        ("{0}/good --split test", "--split"),
        ("{0}/good --data {0}/pictures --limit 0", "--limit 0"),
        ("{0}/good --data {0}/nowhere", "nowhere"),
        ("{0}/good --device bogus", "--device bogus"),
    ],
)
def test_bad_input_is_a_one_line_error(
    root_folder: Path, capsys: pytest.CaptureFixture, words: str, wrong: str
) -> None:
    assert ddim("check", *words.format(root_folder).split()) == 2
    output = capsys.readouterr()
    assert output.out == ""
    [line] = output.err.splitlines()
    assert line.startswith("error: ")
    assert wrong in line


def test_the_bundled_model(capsys: pytest.CaptureFixture) -> None:
    assert ddim("check", "mnist", "--quick", "--device", "cpu") == 0
    assert "model mnist, predicts v, on its own samples" in capsys.readouterr().out
