"""Bits per dimension of pictures: the same figures however a run is cut, killed and gone on with."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ddim import samplers
from ddim.data.pixels import BIN, to_float
from ddim.errors import DdimError, DdimWarning
from ddim.evaluation.likelihood import log_density
from ddim.evaluation.likelihood_run import Request, bound_request, measure, ode_request, token_request
from ddim.model.model import Model
from ddim.objective import categorical_elbo, elbo
from models import CATEGORICAL, contents, ddim, process, save_tiny, stripes, tiny_model, tiny_set, write_pictures

PICTURES = stripes(11)
NAMES = [f"{i}.png" for i in range(11)]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model(micro_batch=4)


@pytest.fixture(scope="module", params=["bound", "ode"])
def request_of(request: pytest.FixtureRequest, model: Model) -> Request:
    if request.param == "bound":
        return bound_request(model, model.plan(5, "linear", eta=1.0))
    return ode_request(model, steps=2)


def run(model: Model, request: Request, folder: Path, pictures: np.ndarray = PICTURES) -> dict:
    for _ in measure(model, pictures, NAMES[: len(pictures)], request, folder, "tiny"):
        pass
    return json.loads((folder / "likelihood.json").read_text())


def values(folder: Path) -> list[float]:
    with open(folder / "values.csv", newline="") as file:
        return [float(row["bits_per_dim"]) for row in csv.DictReader(file)]


def test_the_figures_are_the_sums_of_the_terms(model: Model, tmp_path: Path) -> None:
    request = bound_request(model, model.plan(5, "linear", eta=1.0), seed=3)
    made = run(model, request, tmp_path / "out")
    noise = model.noise(range(11), 3)
    x0 = to_float(PICTURES)
    expected = torch.stack([*elbo.terms(model.denoise, request.plan, x0, noise.row, request.last_sigma or 0, BIN)])
    expected = expected / (64 * math.log(2))
    np.testing.assert_allclose(values(tmp_path / "out"), expected.sum(0).detach(), rtol=1e-4)
    assert made["bits_per_dim"] == pytest.approx(np.mean(values(tmp_path / "out")), rel=1e-12)
    assert made["standard_error"] == pytest.approx(np.std(values(tmp_path / "out"), ddof=1) / 11**0.5, rel=1e-9)
    parts = [made["prior"], *(step["bits_per_dim"] for step in made["steps"])]
    assert sum(parts) == pytest.approx(made["bits_per_dim"], rel=1e-9)
    np.testing.assert_allclose(parts, expected.mean(1).detach(), rtol=1e-3, atol=1e-9)
    assert made["last_sigma"] == request.plan.rows[-2].sigma


def test_the_ode_figure_is_the_density_with_the_last_step(model: Model, tmp_path: Path) -> None:
    """-log p(x_1) + log q(x_1 | x_0) - log P(x_0 | x_1), in bits, with the probes and draws of each picture."""
    request = ode_request(model, steps=4, probes=2, seed=5)
    made = run(model, request, tmp_path / "out", PICTURES[:4])
    noise, first = model.noise(range(4), 5), model.schedule.level(1)
    x0, eps = to_float(PICTURES[:4]), noise.start()
    x = first.signal * x0 + first.noise * eps
    probes = torch.stack([noise.row(k).sign().flatten(1) for k in range(2)])
    nats = -log_density(model.denoise, request.plan, x, probes)
    nats = nats + torch.distributions.Normal(0.0, first.noise).log_prob(first.noise * eps.double()).flatten(1).sum(1)
    nats = nats + elbo.last_term(x0, model.denoise(x, first).x0, request.last_sigma or 0, BIN).detach()
    np.testing.assert_allclose(values(tmp_path / "out"), nats / (64 * math.log(2)), rtol=1e-4)
    assert made["solver_error_max"] >= made["solver_error_mean"] > 0


def test_more_steps_and_the_error_is_less(model: Model, tmp_path: Path) -> None:
    some = PICTURES[:4]
    errors = [run(model, ode_request(model, steps=n), tmp_path / str(n), some)["solver_error_mean"] for n in (8, 32)]
    assert errors[1] < errors[0] / 8


DAMAGED = (
    '{"first": 4, "bits": [1.0, 2',
    '{"first": 4, "bits": 5, "error": [], "terms": []}\n',
    '{"first": 8, "bits": [1.0, 2.0, 3.0], "error": [], "terms": []}\n',
    "\x00\ufffd\n",
)


def test_interrupted_anywhere_it_ends_the_same(model: Model, request_of: Request, tmp_path: Path) -> None:
    run(model, request_of, tmp_path / "whole")
    for cut in (0, 1, 2, 3):
        folder = tmp_path / f"cut{cut}"
        steps = measure(model, PICTURES, NAMES, request_of, folder, "tiny")
        for _ in range(cut + 1):
            next(steps)
        steps.close()
        with open(folder / "blocks.jsonl", "a") as file:  # as a kill in the middle of a line would leave it
            file.write(DAMAGED[cut])
        with pytest.warns(DdimWarning):
            run(model, request_of, folder)
        assert contents(folder) == contents(tmp_path / "whole")


def test_a_picture_does_not_depend_on_its_neighbours(model: Model, request_of: Request, tmp_path: Path) -> None:
    run(model, request_of, tmp_path / "all")
    run(model, request_of, tmp_path / "some", PICTURES[:6])
    assert values(tmp_path / "some") == values(tmp_path / "all")[:6]


def test_another_request_is_refused(model: Model, tmp_path: Path) -> None:
    request = bound_request(model, model.plan(5, "linear", eta=1.0))
    run(model, request, tmp_path)
    before = contents(tmp_path)
    others = [
        (bound_request(model, model.plan(4, "linear", eta=1.0)), PICTURES),
        (bound_request(model, model.plan(5, "linear", eta=1.0), seed=1), PICTURES),
        (bound_request(model, model.plan(5, "linear", eta=1.0), last_sigma=0.5), PICTURES),
        (ode_request(model, steps=2), PICTURES),
        (request, PICTURES[::-1]),
        (request, PICTURES[:5]),
    ]
    for other, pictures in others:
        with pytest.raises(DdimError):
            run(model, other, tmp_path, pictures)
    assert contents(tmp_path) == before


def test_what_has_no_figure_is_refused(model: Model) -> None:
    for made, message in (
        (lambda: bound_request(model, model.plan(5)), r"^the step from t = 1000 to 477: "),
        (lambda: bound_request(model, model.plan(1, eta=1.0)), r"^plan: "),
        (lambda: bound_request(model, samplers.ddim(model.schedule.levels([5, 0])), -1.0), r"^sigma_1"),
        (lambda: ode_request(model, last_sigma=0.0), r"^sigma_1"),
        (lambda: ode_request(model, seed=-1), "seed -1: "),
        (lambda: bound_request(model, model.plan(5, eta=1.0), seed=-1), "seed -1: "),
        (lambda: ode_request(model, steps=3), r"^steps"),
        (lambda: ode_request(model, steps=0), r"^steps"),
        (lambda: ode_request(model, probes=0), r"^probes 0: "),
    ):
        with pytest.raises(DdimError, match=message):
            made()


def test_without_signal_at_the_top_the_ode_has_no_start(tmp_path: Path) -> None:
    base = tiny_model()
    schedule = base.config.schedule.model_copy(update={"zero_terminal_snr": True})
    zero = Model(base.network, base.config.model_copy(update={"schedule": schedule}), dtype="float32")
    with pytest.raises(DdimError, match=r"^the ODE: "):
        ode_request(zero)
    made = run(zero, bound_request(zero, zero.plan(5, eta=1.0)), tmp_path)
    assert made["prior"] == 0
    assert math.isfinite(made["bits_per_dim"])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("likelihood")
    write_pictures(root / "pictures", 40)
    return save_tiny(root / "tiny"), root / "pictures"


@pytest.mark.parametrize("words", [("--steps", 6), ("--method", "ode", "--steps", 2)], ids=["bound", "ode"])
def test_the_command(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture, words: tuple) -> None:
    assert ddim("likelihood", *files, *words, "--limit", 3, "--out", tmp_path / "out") == 0
    told = capsys.readouterr().out
    made = json.loads((tmp_path / "out" / "likelihood.json").read_text())
    assert f"{made['bits_per_dim']:.4f} bits/dim +- {made['standard_error']:.4f}" in told
    assert "dequantisation: discretised Gaussian" in told
    assert (tmp_path / "out" / "terms.png").exists() == (made["method"] == "bound")
    assert len(values(tmp_path / "out")) == made["pictures"] == 3
    before = contents(tmp_path / "out")
    assert ddim("likelihood", *files, *words, "--limit", 3, "--out", tmp_path / "out") == 0
    assert contents(tmp_path / "out") == before


def test_killed_it_goes_on(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A real process, ended by SIGKILL between two blocks."""
    words = ("likelihood", *files, "--steps", 50)
    assert ddim(*words, "--out", tmp_path / "whole") == 0
    command, env = process(*words, "--out", tmp_path / "killed")
    running = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL)
    blocks = tmp_path / "killed" / "blocks.jsonl"
    deadline = time.monotonic() + 120
    while running.poll() is None and not (blocks.exists() and blocks.read_bytes()):
        assert time.monotonic() < deadline
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(0.005)
    running.kill()
    running.wait()
    assert running.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "likelihood.json").exists()
    assert ddim(*words, "--out", tmp_path / "killed") == 0
    one, two = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    for name in ("values.csv", "likelihood.json", "terms.png"):
        assert one[name] == two[name], name


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (("--eta", 0), "the step from t = 1000 to 999"),
        (("--seed", -1), "seed -1: "),
        (("--method", "ode", "--last-sigma", "nan"), "sigma_1 nan"),
        (("--eta", 1, "--sigma", "hat"), "--eta and --sigma"),
        (("--probes", 2), "--probes and --method bound"),
        (("--method", "ode", "--eta", 1), "--eta and --method ode"),
        (
            ("--method", "ode", "--dequantize", "uniform", "--last-sigma", 0.1),
            "--last-sigma and --method ode --dequantize uniform",
        ),
        (("--method", "ode", "--steps", 5), "steps 5"),
        (
            (
                "--method",
                "exact",
            ),
            "--method",
        ),
        (("--last-sigma", "inf"), "sigma_1 inf"),
        (("--limit", 0), "--limit 0"),
    ],
)
def test_bad_input_is_one_line(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture, words: tuple, wrong: str
) -> None:
    assert ddim("likelihood", *files, "--out", tmp_path / "out", *words) == 2
    told = capsys.readouterr()
    assert told.out == ""
    [line] = told.err.splitlines()
    assert line.startswith("error: ")
    assert wrong in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", CATEGORICAL)
@pytest.mark.parametrize("settings", [{"sampler": "markov"}, {"eta": 0.2}], ids=str)
def test_the_figures_of_categories_are_the_sums_of_their_terms(kind: str, settings: dict, tmp_path: Path) -> None:
    model = tiny_model(kind=kind, micro_batch=4)
    plan = model.plan(5, "linear", **settings)
    data = tiny_set(kind).batch(range(7))
    for _ in measure(model, data, NAMES[:7], token_request(model, plan, seed=3), tmp_path, "tiny"):
        pass
    noise, x0 = model.noise(range(7), 3), model.kind.read(data)
    expected = torch.stack([*categorical_elbo.terms(model.denoise, plan, x0, noise.row)]) / (
        x0[0].numel() * math.log(2)
    )
    np.testing.assert_allclose(values(tmp_path), expected.sum(0).detach(), rtol=1e-4)
    made = json.loads((tmp_path / "likelihood.json").read_text())
    assert made["bits_per_dim"] == pytest.approx(np.mean(values(tmp_path)), rel=1e-12)
    assert made["dequantisation"] is made["last_sigma"] is None


@pytest.mark.parametrize(("steps", "draws"), [(50, 2), (50, 7), (50, 50), (10, 3)])
def test_some_rows_drawn_stand_for_all(steps: int, draws: int) -> None:
    """Each row is had as often as it counts: over many micro-batches the mean is that of all rows."""
    model = tiny_model(kind="text")
    request = token_request(model, model.plan(steps, "linear"), draws=draws)
    assert request.nfe == draws
    shares = np.zeros(steps)
    for first in range(0, 8 * 4000, 8):
        rows = request.rows(first)
        assert len(rows) == draws
        assert rows[-1] == (steps - 1, 1)
        assert sum(weight for _, weight in rows) == steps
        assert rows == request.rows(first)
        for k, weight in rows:
            shares[k] += weight / 4000
    np.testing.assert_allclose(shares, 1, atol=6 * np.sqrt(steps / draws / 4000) + 1e-12)


def test_draws_are_part_of_what_a_run_is(tmp_path: Path) -> None:
    model = tiny_model(kind="text", micro_batch=4)
    data = tiny_set("text").batch(range(7))

    def bits(draws: int, folder: str) -> float:
        request = token_request(model, model.plan(40, "linear", sampler="markov"), draws=draws)
        for _ in measure(model, data, NAMES[:7], request, tmp_path / folder, "tiny"):
            pass
        return float(json.loads((tmp_path / folder / "likelihood.json").read_text())["bits_per_dim"])

    assert bits(10, "some") == pytest.approx(bits(0, "all"), rel=0.25)
    with pytest.raises(DdimError, match="some: "):
        bits(20, "some")
    for draws in (1, 41):
        with pytest.raises(DdimError, match=f"draws {draws}: "):
            bits(draws, "none")


def test_the_command_measures_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "model", kind="text")
    (tmp_path / "text.txt").write_text(" abdeno" * 60)
    ask = ("likelihood", tmp_path / "model", tmp_path / "text.txt", "--split", "train", "--limit", 3, "--device", "cpu")
    assert ddim(*ask, "--steps", 6, "--out", tmp_path / "bits") == 0
    told = capsys.readouterr().out
    assert "bits/token" in told
    assert "3 texts, markov(linear, S=6)" in told
    assert ddim(*ask, "--steps", 6, "--eta", 0.2, "--out", tmp_path / "j") == 0
    assert "0.2" in capsys.readouterr().err
    assert ddim(*ask, "--method", "ode", "--out", tmp_path / "ode") == 2
    assert ddim(*ask, "--sigma", "hat", "--out", tmp_path / "ode") == 2
    assert ddim(*ask, "--temperature", 1, "--out", tmp_path / "ode") == 2
    assert not (tmp_path / "ode").exists()
