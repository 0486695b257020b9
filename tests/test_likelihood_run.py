"""Bits per dimension of images and text: values, bit-exact resume, and the command `likelihood`."""

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

IMAGES = stripes(11)
NAMES = [f"{i}.png" for i in range(11)]


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model(micro_batch=4)


@pytest.fixture(scope="module", params=["bound", "ode"])
def request_of(request: pytest.FixtureRequest, model: Model) -> Request:
    if request.param == "bound":
        return bound_request(model, model.plan(5, "linear", eta=1.0))
    return ode_request(model, steps=2)


def run(model: Model, request: Request, folder: Path, images: np.ndarray = IMAGES) -> dict:
    for _ in measure(model, images, NAMES[: len(images)], request, folder, "tiny"):
        pass
    return json.loads((folder / "likelihood.json").read_text())


def values(folder: Path) -> list[float]:
    with open(folder / "values.csv", newline="") as file:
        return [float(row["bits_per_dim"]) for row in csv.DictReader(file)]


def test_bits_are_the_sums_of_the_terms(model: Model, tmp_path: Path) -> None:
    request = bound_request(model, model.plan(5, "linear", eta=1.0), seed=3)
    result = run(model, request, tmp_path / "out")
    noise = model.noise(range(11), 3)
    x0 = to_float(IMAGES)
    expected = torch.stack([*elbo.terms(model.denoise, request.plan, x0, noise.row, request.last_sigma or 0, BIN)])
    expected = expected / (64 * math.log(2))
    np.testing.assert_allclose(values(tmp_path / "out"), expected.sum(0).detach(), rtol=1e-4)
    assert result["bits_per_dim"] == pytest.approx(np.mean(values(tmp_path / "out")), rel=1e-12)
    assert result["standard_error"] == pytest.approx(np.std(values(tmp_path / "out"), ddof=1) / 11**0.5, rel=1e-9)
    parts = [result["prior"], *(step["bits_per_dim"] for step in result["steps"])]
    assert sum(parts) == pytest.approx(result["bits_per_dim"], rel=1e-9)
    np.testing.assert_allclose(parts, expected.mean(1).detach(), rtol=1e-3, atol=1e-9)
    assert result["last_sigma"] == request.plan.rows[-2].sigma


def test_the_ode_likelihood_combines_the_density_and_the_last_step(model: Model, tmp_path: Path) -> None:
    """-log p(x_1) + log q(x_1 | x_0) - log P(x_0 | x_1), in bits, with the probes and noise of each image."""
    request = ode_request(model, steps=4, probes=2, seed=5)
    result = run(model, request, tmp_path / "out", IMAGES[:4])
    noise, first = model.noise(range(4), 5), model.schedule.level(1)
    x0, eps = to_float(IMAGES[:4]), noise.start()
    x = first.signal * x0 + first.noise * eps
    probes = torch.stack([noise.row(k).sign().flatten(1) for k in range(2)])
    nats = -log_density(model.denoise, request.plan, x, probes)
    nats = nats + torch.distributions.Normal(0.0, first.noise).log_prob(first.noise * eps.double()).flatten(1).sum(1)
    nats = nats + elbo.last_term(x0, model.denoise(x, first).x0, request.last_sigma or 0, BIN).detach()
    np.testing.assert_allclose(values(tmp_path / "out"), nats / (64 * math.log(2)), rtol=1e-4)
    assert result["solver_error_max"] >= result["solver_error_mean"] > 0


@pytest.mark.slow
def test_the_solver_error_decreases_with_more_steps(model: Model, tmp_path: Path) -> None:
    images = IMAGES[:4]
    errors = [run(model, ode_request(model, steps=n), tmp_path / str(n), images)["solver_error_mean"] for n in (8, 32)]
    assert errors[1] < errors[0] / 8


DAMAGED = (
    '{"first": 4, "bits": [1.0, 2',
    '{"first": 4, "bits": 5, "error": [], "terms": []}\n',
    '{"first": 8, "bits": [1.0, 2.0, 3.0], "error": [], "terms": []}\n',
    "\x00\ufffd\n",
)


def test_resume_after_a_stop_is_bit_exact(model: Model, request_of: Request, tmp_path: Path) -> None:
    run(model, request_of, tmp_path / "whole")
    for cut in (0, 1, 2, 3):
        folder = tmp_path / f"cut{cut}"
        steps = measure(model, IMAGES, NAMES, request_of, folder, "tiny")
        for _ in range(cut + 1):
            next(steps)
        steps.close()
        with open(folder / "blocks.jsonl", "a") as file:  # as after a kill in the middle of a line
            file.write(DAMAGED[cut])
        with pytest.warns(DdimWarning):
            run(model, request_of, folder)
        assert contents(folder) == contents(tmp_path / "whole")


def test_an_image_does_not_depend_on_the_others(model: Model, request_of: Request, tmp_path: Path) -> None:
    run(model, request_of, tmp_path / "all")
    run(model, request_of, tmp_path / "first", IMAGES[:6])
    assert values(tmp_path / "first") == values(tmp_path / "all")[:6]


def test_another_request_in_the_same_folder_is_an_error(model: Model, tmp_path: Path) -> None:
    request = bound_request(model, model.plan(5, "linear", eta=1.0))
    run(model, request, tmp_path)
    before = contents(tmp_path)
    others = [
        (bound_request(model, model.plan(4, "linear", eta=1.0)), IMAGES),
        (bound_request(model, model.plan(5, "linear", eta=1.0), seed=1), IMAGES),
        (bound_request(model, model.plan(5, "linear", eta=1.0), last_sigma=0.5), IMAGES),
        (ode_request(model, steps=2), IMAGES),
        (request, IMAGES[::-1]),
        (request, IMAGES[:5]),
    ]
    for other, images in others:
        with pytest.raises(DdimError):
            run(model, other, tmp_path, images)
    assert contents(tmp_path) == before


def test_invalid_requests_are_errors(model: Model) -> None:
    for create, message in (
        (lambda: bound_request(model, model.plan(5, sampler="ddim")), r"^the step from t = 1000 to 477: "),
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
            create()


def test_without_signal_at_T_the_ode_is_an_error(tmp_path: Path) -> None:
    base = tiny_model()
    schedule = base.config.schedule.model_copy(update={"zero_terminal_snr": True})
    zero = Model(base.network, base.config.model_copy(update={"schedule": schedule}), dtype="float32")
    with pytest.raises(DdimError, match=r"^the ODE: "):
        ode_request(zero)
    result = run(zero, bound_request(zero, zero.plan(5, eta=1.0)), tmp_path)
    assert result["prior"] == 0
    assert math.isfinite(result["bits_per_dim"])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("likelihood")
    write_pictures(root / "images", 40)
    return save_tiny(root / "tiny"), root / "images"


@pytest.mark.parametrize("words", [("--steps", 6), ("--method", "ode", "--steps", 2)], ids=["bound", "ode"])
def test_the_command_prints_and_resumes(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture, words: tuple
) -> None:
    assert ddim("likelihood", *files, *words, "--limit", 3, "--out", tmp_path / "out") == 0
    output = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "likelihood.json").read_text())
    assert f"{result['bits_per_dim']:.4f} bits/dim +- {result['standard_error']:.4f}" in output
    assert "dequantisation: discretised Gaussian" in output
    assert (tmp_path / "out" / "terms.png").exists() == (result["method"] == "bound")
    assert len(values(tmp_path / "out")) == result["pictures"] == 3
    before = contents(tmp_path / "out")
    assert ddim("likelihood", *files, *words, "--limit", 3, "--out", tmp_path / "out") == 0
    assert contents(tmp_path / "out") == before


@pytest.mark.slow
def test_resume_after_a_kill(files: tuple[Path, Path], tmp_path: Path) -> None:
    """A real process, ended by SIGKILL between two micro-batches."""
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
    ("words", "message"),
    [
        (("--eta", 0), "--eta 0"),
        (("--seed", -1), "seed -1: "),
        (("--method", "ode", "--last-sigma", "nan"), "--last-sigma nan"),
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
        (("--last-sigma", "inf"), "--last-sigma inf"),
        (("--limit", 0), "--limit 0"),
    ],
)
def test_errors_are_one_line(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture, words: tuple, message: str
) -> None:
    assert ddim("likelihood", *files, "--out", tmp_path / "out", *words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    [line] = output.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", CATEGORICAL)
@pytest.mark.parametrize("settings", [{"sampler": "markov"}, {"eta": 0.2}], ids=str)
def test_bits_of_discrete_data_are_the_sums_of_the_terms(kind: str, settings: dict, tmp_path: Path) -> None:
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
    result = json.loads((tmp_path / "likelihood.json").read_text())
    assert result["bits_per_dim"] == pytest.approx(np.mean(values(tmp_path)), rel=1e-12)
    assert result["dequantisation"] is result["last_sigma"] is None


@pytest.mark.parametrize(("steps", "draws"), [(50, 2), (50, 7), (50, 50), (10, 3)])
def test_random_rows_are_an_unbiased_estimate(steps: int, draws: int) -> None:
    """Over many micro-batches the weights of each row have mean 1."""
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


def test_draws_are_part_of_the_request(tmp_path: Path) -> None:
    model = tiny_model(kind="text", micro_batch=4)
    data = tiny_set("text").batch(range(7))

    def bits(draws: int, folder: str) -> float:
        request = token_request(model, model.plan(40, "linear", sampler="markov"), draws=draws)
        for _ in measure(model, data, NAMES[:7], request, tmp_path / folder, "tiny"):
            pass
        return float(json.loads((tmp_path / folder / "likelihood.json").read_text())["bits_per_dim"])

    assert bits(10, "drawn") == pytest.approx(bits(0, "all"), rel=0.25)
    with pytest.raises(DdimError, match="drawn: "):
        bits(20, "drawn")
    for draws in (1, 41):
        with pytest.raises(DdimError, match=f"draws {draws}: "):
            bits(draws, "none")


def test_the_command_measures_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "model", kind="text")
    (tmp_path / "text.txt").write_text(" abdeno" * 60)
    likelihood = (
        "likelihood",
        tmp_path / "model",
        tmp_path / "text.txt",
        "--split",
        "train",
        "--limit",
        3,
        "--device",
        "cpu",
    )
    assert ddim(*likelihood, "--steps", 6, "--out", tmp_path / "bits") == 0
    output = capsys.readouterr().out
    assert "bits/token" in output
    assert "3 texts, markov(linear, S=6)" in output
    assert ddim(*likelihood, "--steps", 6, "--eta", 0.2, "--out", tmp_path / "j") == 0
    assert "0.2" in capsys.readouterr().err
    assert ddim(*likelihood, "--method", "ode", "--out", tmp_path / "ode") == 2
    assert ddim(*likelihood, "--sigma", "hat", "--out", tmp_path / "ode") == 2
    assert ddim(*likelihood, "--temperature", 1, "--out", tmp_path / "ode") == 2
    assert not (tmp_path / "ode").exists()
