"""Training is a function of the recipe and the state: a resumed run is bit-exact."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from ddim.errors import DdimError, DdimWarning
from ddim.model.modality import modality_of
from ddim.objective.mse import Objective
from ddim.process.schedule import linear
from ddim.train.trainer import TimestepError, Trainer
from models import COUNT, KINDS, new_network, recipe, stripes, tiny_config, tiny_network, tiny_set

every_kind = pytest.mark.parametrize("kind", KINDS)


def trainer(
    labelled: bool = False,
    network: dict[str, Any] | None = None,
    schedule: dict[str, Any] | None = None,
    kind: str = "pictures",
    **changes: Any,
) -> Trainer:
    config = tiny_config(kind, classes=3 if labelled else 0, schedule=schedule or {}, **(network or {}))
    modality = modality_of(config)
    if len(config.network.shape) == 1:
        changes["flip"] = False
    return Trainer(
        new_network(config.network),
        modality.loss("simple" if config.categorical else "v", torch.device("cpu")),
        tiny_set(kind).batch,
        COUNT,
        recipe(**changes),
        np.arange(COUNT) % 3 if labelled else None,
        3 if labelled else 0,
        modality.read,
    )


def train(trainer: Trainer, to: int) -> dict[str, torch.Tensor]:
    """The state after step `to`."""
    if trainer.step < to:
        for update in trainer.updates():
            if update.step == to:
                break
    return {key: value.clone() for key, value in trainer.state().items()}


def assert_same(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert state.keys() == other.keys()
    differ = [key for key in state if not torch.equal(state[key], other[key])]
    assert differ == []


EVERYTHING: dict[str, Any] = {
    "labelled": True,
    "network": {"dropout": 0.3},
    "flip": True,
    "label_drop": 0.3,
    "accumulate": 2,
    "decay": "cosine",
    "steps": 7,
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "stop"), [("pictures", 1), *((kind, 4) for kind in KINDS)])
def test_resuming_from_a_state_is_bit_exact(kind: str, stop: int, precision: str) -> None:
    def new() -> Trainer:
        return trainer(**EVERYTHING, kind=kind, precision=precision)

    straight, state, fresh = train(new(), 7), train(new(), stop), new()
    fresh.load_state(state)
    assert fresh.step == stop
    times, means = fresh.errors.means()
    np.testing.assert_array_equal(times - 1, state["errors.counts"].nonzero()[:, 0])
    np.testing.assert_array_equal(means, (state["errors.sums"] / state["errors.counts"])[times - 1])
    assert state["errors.counts"].sum() > 0
    assert_same(train(fresh, 7), straight)


@every_kind
def test_the_state_contains_everything_that_changes(kind: str) -> None:
    tested = trainer(**EVERYTHING, kind=kind)
    before, after = train(tested, 1), train(tested, 2)
    parameters = sum(1 for _ in tested.network.parameters())
    for part in ("network.", "ema.", "optimizer."):
        assert sum(key.startswith(part) for key in after) >= parameters
    moved = {key.split(".")[0] for key in after if not torch.equal(before[key], after[key])}
    assert moved == {"network", "ema", "optimizer", "step", "errors"}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (kind, change)
        for kind in ("pictures", "levels", "text")
        for change in ({"flip": False}, {"label_drop": 0.9}, {"seed": 1}, {"network": {"dropout": 0.0}})
        if (kind, *change) != ("text", "flip")
    ],
)
def test_each_source_of_randomness_matters(kind: str, change: dict[str, Any]) -> None:
    plain, other = (train(trainer(**(EVERYTHING | settings), kind=kind), 3) for settings in ({}, change))
    assert any(not torch.equal(plain[key], other[key]) for key in plain if key.startswith("network."))


@every_kind
def test_accumulated_micro_batches_equal_the_batch(kind: str) -> None:
    whole, parts = trainer(kind=kind), trainer(kind=kind, accumulate=4)
    first, second = next(whole.updates()), next(parts.updates())
    torch.testing.assert_close(first.loss, second.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(first.grad_norm, second.grad_norm, rtol=1e-4, atol=0)


def recorded(tested: Trainer, to: int) -> list[dict[int, list[float]]]:
    """Train, and record the errors that are added to the table: per step, timestep to errors."""
    steps: list[dict[int, list[float]]] = []
    real = tested._loss

    def spy(x0: torch.Tensor, t: torch.Tensor, *rest: Any) -> Any:
        loss, errors = real(x0, t, *rest)
        while len(steps) <= tested.step:
            steps.append({})
        for time, error in zip(t.tolist(), errors.tolist(), strict=True):
            steps[tested.step].setdefault(time, []).append(error)
        return loss, errors

    tested._loss = spy  # type: ignore[method-assign]
    train(tested, to)
    return steps


@pytest.mark.parametrize(("kind", "ema"), [("pictures", 0.0), ("pictures", 0.2), *((kind, 0.9) for kind in KINDS)])
def test_the_error_table_is_an_average_with_the_decay_of_the_ema(kind: str, ema: float) -> None:
    tested = trainer(kind=kind, ema=ema, batch=20, accumulate=4, schedule={"T": 12})
    steps = recorded(tested, 9)
    sums, counts = np.zeros(13), np.zeros(13)
    for n, step in enumerate(steps):
        decay = min(ema, (1 + n) / (10 + n))
        sums, counts = sums * decay, counts * decay
        for time, errors in step.items():
            sums[time] += (1 - decay) * sum(errors)
            counts[time] += (1 - decay) * len(errors)
    times, means = tested.errors.means()
    (drawn,) = np.nonzero(counts)
    assert list(times) == list(drawn)
    np.testing.assert_allclose(means, sums[drawn] / counts[drawn], rtol=1e-12)
    assert 0 < len(drawn) <= 12
    assert sum(len(errors) for step in steps for errors in step.values()) == 180


def test_the_error_table_is_the_squared_error_of_eps() -> None:
    """A network that always predicts v = 0 has eps_theta = noise x_t and the error abar eps - signal noise x_0."""
    tested = trainer(batch=20, ema=0.0, schedule={"T": 4, "beta_start": 0.2, "beta_end": 0.8}, lr=1e-9)
    for parameter in tested.network.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    train(tested, 1)
    times, means = tested.errors.means()
    power = (torch.from_numpy(stripes(COUNT)).double() / 127.5 - 1).square().mean().item()
    for time, mean in zip(times, means, strict=True):
        abar = tested.objective.schedule.alpha_bar[time]
        expected = abar * abar + abar * (1 - abar) * power
        assert mean == pytest.approx(expected, rel=0.25)  # 5 images of 64 pixels each


def test_timesteps_not_drawn_for_long_are_dropped() -> None:
    table = TimestepError(3, torch.device("cpu"))
    assert [len(part) for part in table.means()] == [0, 0]
    table.add(torch.tensor([1, 1, 3]), torch.tensor([1.0, 2.0, 4.0]), 0.5)
    times, means = table.means()
    assert (times.tolist(), means.tolist()) == ([1, 3], [1.5, 4.0])
    for _ in range(60):
        table.add(torch.tensor([3]), torch.tensor([6.0]), 0.5)
    times, means = table.means()
    assert (times.tolist(), means.tolist()) == ([3], [pytest.approx(6.0)])


@every_kind
def test_accumulated_micro_batches_give_the_same_error_table(kind: str) -> None:
    whole, parts = trainer(kind=kind), trainer(kind=kind, accumulate=4)
    train(whole, 2)
    train(parts, 2)
    np.testing.assert_array_equal(whole.errors.means()[0], parts.errors.means()[0])
    np.testing.assert_allclose(whole.errors.means()[1], parts.errors.means()[1], rtol=1e-4)


def test_a_state_without_error_table_is_loaded_with_a_warning() -> None:
    state = train(trainer(), 3)
    old = {key: value for key, value in state.items() if not key.startswith("errors.")}
    assert len(old) == len(state) - 2
    tested = trainer()
    with pytest.warns(DdimWarning, match=r"\b3\b"):
        tested.load_state(old)
    assert len(tested.errors.means()[0]) == 0
    straight, resumed = train(trainer(), 5), train(tested, 5)
    differ = {key.split(".")[0] for key in straight if not torch.equal(straight[key], resumed[key])}
    assert differ == {"errors"}


@every_kind
def test_global_generators_are_not_used(kind: str) -> None:
    torch.manual_seed(11)
    torch_before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    train(trainer(**EVERYTHING, kind=kind), 3)
    assert torch.equal(torch.random.get_rng_state(), torch_before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


@every_kind
def test_results_do_not_depend_on_the_global_generator(kind: str) -> None:
    expected = train(trainer(**EVERYTHING, kind=kind), 2)
    torch.manual_seed(99)
    torch.rand(5)
    assert_same(train(trainer(**EVERYTHING, kind=kind), 2), expected)


@pytest.mark.parametrize("batch", [3, 8, 20, 33])
def test_every_epoch_is_a_permutation_and_batches_span_epochs(batch: int) -> None:
    tested = trainer(batch=batch, steps=1000)
    steps = -(-3 * COUNT // batch)
    seen = np.concatenate([tested.loader.indices(step) for step in range(steps)])
    epochs = [seen[first : first + COUNT] for first in range(0, len(seen) - COUNT + 1, COUNT)]
    assert len(epochs) >= 3
    for epoch in epochs:
        assert sorted(epoch) == list(range(COUNT))
    assert any((first != second).any() for first, second in itertools.pairwise(epochs))


def test_the_data_order_depends_only_on_the_step() -> None:
    sequential, random_access = trainer(batch=7, steps=1000), trainer(batch=7, steps=1000)
    orders = [sequential.loader.indices(step) for step in range(30)]
    for step in (29, 3, 17):
        assert (random_access.loader.indices(step) == orders[step]).all()


def test_images_are_read_in_the_data_order() -> None:
    tested, requests = trainer(batch=7, steps=6), []
    images = stripes(COUNT)
    tested.loader.images = lambda indices: (requests.append(indices), images[indices])[1]
    train(tested, 6)
    expected = [list(tested.loader.indices(step)) for step in range(7)]
    assert [list(indices) for indices in requests] in (expected, expected[:6])  # the next batch is prefetched


@pytest.mark.parametrize("decay", ["none", "linear", "cosine"])
def test_the_learning_rate_warms_up_stays_and_decays(decay: str) -> None:
    tested = trainer(steps=1000, warmup=100, decay=decay, decay_fraction=0.25, lr=3e-3)
    rates = np.array([tested.lr(step) for step in range(1000)])
    assert 0 < rates[0] <= 3e-3 / 50
    assert (np.diff(rates[:100]) > 0).all()
    assert np.allclose(rates[100:749], 3e-3)
    if decay == "none":
        assert np.allclose(rates[750:], 3e-3)
    else:
        assert (np.diff(rates[751:]) < 0).all()
        assert 0 < rates[-1] < 3e-3 / 100
        assert rates[875] == pytest.approx(1.5e-3, rel=1e-6)  # both are at half the rate in the middle of the decay


def test_without_warm_up_training_starts_at_the_full_rate() -> None:
    assert trainer(warmup=0).lr(0) == 2e-3


@every_kind
def test_a_non_finite_loss_raises_before_the_update(kind: str) -> None:
    tested = trainer(kind=kind, steps=9)
    state = train(tested, 3)
    name, parameter = next(tested.network.named_parameters())
    with torch.no_grad():
        parameter[0] = torch.nan
    with pytest.raises(DdimError, match=r"^step 4: "):
        next(tested.updates())
    assert tested.step == 3
    after = tested.state()
    assert_same(
        {k: v for k, v in after.items() if k != f"network.{name}"},
        {k: v for k, v in state.items() if k != f"network.{name}"},
    )


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("pictures", {"network": {"channels": 24}}),
        ("pictures", {"kind": "levels"}),
        ("text", {"kind": "text", "network": {"width": 24}}),
        ("text", {"kind": "masked text"}),
    ],
)
def test_a_state_of_another_network_is_an_error(kind: str, other: dict[str, Any]) -> None:
    state = train(trainer(**other), 1)
    with pytest.raises(RuntimeError):
        trainer(kind=kind).load_state(state)


@pytest.mark.slow
def test_the_loss_decreases_on_digits() -> None:
    """On scikit-learn's digits the loss falls well below its initial value."""
    from ddim.data import load
    from ddim.data.policy import ImagePolicy

    digits = load("digits", ImagePolicy(height=8, width=8, channels=1), limit=500)
    tested = Trainer(
        new_network(tiny_network()),
        Objective(linear(), "v", "v", torch.device("cpu")),
        digits.batch,
        len(digits),
        recipe(steps=150, batch=24, lr=4e-3, warmup=10),
    )
    losses = [float(update.loss) for update in tested.updates()]
    assert len(losses) == 150
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:20])
