"""Training from Python: any data, a network of the user's, and the same times in training and sampling."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import ddim
from bench import randn
from ddim.errors import DdimError, DdimWarning
from ddim.model.config import TrainConfig
from ddim.model.denoisers import teller
from ddim.nn.base import network_time
from ddim.objective.cross_entropy import CrossEntropy
from ddim.objective.mse import Objective
from ddim.process.categorical import Alphabet
from ddim.process.schedule import linear
from ddim.sampling.microbatch import size_of
from ddim.train.trainer import Trainer
from models import new_network, recipe, stripes, tiny_network

ROOT = Path(__file__).resolve().parents[1]
SHAPES = [(2,), (1, 16), (3, 8, 8), (1, 4, 4, 4)]


class Net(nn.Module):
    """A network for any shape that records the times it is passed."""

    def __init__(self, kernel: int | None = None) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.1))
        self.convolution = None if kernel is None else [nn.Conv1d, nn.Conv2d, nn.Conv3d][kernel - 1](1, 1, 1)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("calls", torch.zeros(()))
        self.times: list[Tensor] = []

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        self.times.append(time)
        if self.training:
            self.calls += 1
        return x * self.scale + self.shift * (time / 10).view(-1, *[1] * (x.ndim - 1))


def data(*shape: int, count: int = 32) -> Tensor:
    return randn(count, *shape, seed=1).float()


def settings(**changes: Any) -> TrainConfig:
    return recipe(**({"gamma": "simple", "steps": 4} | changes))


# ---------------------------------------------------------------- one convention of time


def test_training_and_sampling_pass_the_same_times() -> None:
    """Over all timesteps, the set of times of training is that of sampling with every step, and the dtype too."""
    schedule, network = linear(6, beta_end=0.5), Net()
    trainer = Trainer(network, Objective(schedule, "v"), data(2), recipe=settings(steps=12))
    for _ in trainer.updates():
        pass
    trained = torch.cat(network.times)
    network.times.clear()
    ddim.wrap(network.eval(), schedule, predicts="v", shape=(2,)).sample(3, steps=6, sampler="ddim")
    sampled = torch.cat(network.times)
    assert trained.dtype == sampled.dtype == torch.int64
    assert {*trained.tolist()} == {*sampled.tolist()} == {*range(6)}


def test_the_loss_is_that_of_the_wrapped_network() -> None:
    """E ||eps - eps_theta||^2 of `Objective`, and of the prediction of `ddim.wrap`, both with default arguments."""
    schedule, network, x0, eps = linear(), Net().eval(), data(3, count=4), randn(4, 3, seed=2).float()
    for t in (1, 2, 500, 1000):
        level = schedule.level(t)
        x = level.signal * x0 + level.noise * eps
        error = (ddim.wrap(network, schedule, predicts="eps")(x, level).eps - eps).square().mean(1)
        loss = Objective(schedule, "eps").loss(network, x0, torch.full((4,), t), eps)
        torch.testing.assert_close(loss, error, rtol=1e-4, atol=1e-5)


def test_networks_of_this_library_are_passed_t_by_both() -> None:
    schedule, network = linear(), new_network(tiny_network()).eval()
    x0, eps, level = data(1, 8, 8, count=2), randn(2, 1, 8, 8, seed=3).float(), linear().level(321)
    x = level.signal * x0 + level.noise * eps
    expected = network(x, torch.full((2,), 321.0))
    torch.testing.assert_close(ddim.wrap(network, schedule, predicts="eps")(x, level).eps, expected)
    loss = Objective(schedule, "eps").loss(network, x0, torch.full((2,), 321), eps)
    torch.testing.assert_close(loss, (expected - eps).square().flatten(1).mean(1), rtol=1e-4, atol=1e-5)


def test_the_shift_has_one_home() -> None:
    level = linear().level(7)
    assert teller("index", 1000, 0)(level) == network_time(level.t) == 6
    seen: list[Tensor] = []

    def network(x: Tensor, time: Tensor) -> Tensor:
        seen.append(time)
        return torch.zeros(*x.shape, 3)

    loss, t = CrossEntropy(linear(), Alphabet.uniform(3)), torch.tensor([1, 7])
    loss.error(network, torch.zeros(2, 4, dtype=torch.int64), t, torch.rand(2, 4, 2, generator=torch.Generator()))
    assert torch.equal(seen[0], network_time(t))


# ---------------------------------------------------------------- data of any type and shape


class Squares(Dataset[Any]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return data(2)[index], index % 3


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from data(2).split(8)


class Again:
    def __iter__(self) -> Iterator[Tensor]:
        yield from data(2).split(8)


KINDS: dict[str, Any] = {
    "tensor": data(2),
    "array": data(2).numpy(),
    "Dataset": Squares(),
    "list of samples": [*data(2)],
    "DataLoader": DataLoader(TensorDataset(data(2)), batch_size=8),
    "DataLoader with labels": DataLoader(Squares(), batch_size=8),
    "DataLoader of an IterableDataset": DataLoader(Endless(), batch_size=None),
    "iterable": Again(),
}


@pytest.mark.parametrize("name", KINDS)
def test_any_type_of_data(name: str) -> None:
    trainer = Trainer(Net(), Objective(linear(), "v"), KINDS[name], recipe=settings(steps=6))
    assert [update.step for update in trainer.updates()] == [1, 2, 3, 4, 5, 6]
    [batch] = [next(trainer.loader.batches(0))[0]]
    assert batch.shape == (8, 2)


def test_batches_of_a_dataset_are_those_of_its_tensor() -> None:
    objective, states = Objective(linear(), "v"), []
    for given in (data(2), Squares()):
        trainer = Trainer(Net(), objective, given, recipe=settings())
        [*_] = trainer.updates()
        states.append(trainer.state())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_data_loader_is_used_in_its_order() -> None:
    loader = DataLoader(TensorDataset(data(2)), batch_size=8)
    batches = Trainer(Net(), Objective(linear(), "v"), loader, recipe=settings()).loader.batches(0)
    seen = torch.cat([next(batches)[0] for _ in range(8)])
    assert torch.equal(seen, torch.cat([data(2)] * 2))


def test_resuming_a_stream_warns() -> None:
    trainer = Trainer(Net(), Objective(linear(), "v"), Again(), recipe=settings())
    with pytest.warns(DdimWarning, match="^data: "):
        next(trainer.loader.batches(3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["auto", "contiguous"])
def test_any_shape_is_neither_flipped_nor_laid_out_by_default(shape: tuple[int, ...], layout: str) -> None:
    network = Net(max(len(shape) - 1, 1))
    trainer = Trainer(network, Objective(linear(), "v"), data(*shape), recipe=settings(layout=layout))
    assert not TrainConfig().flip
    assert len([*trainer.updates()]) == 4


@pytest.mark.parametrize("shape", [(2,), (1, 16), (1, 4, 4, 4)], ids=str)
def test_what_only_suits_images_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(DdimError, match=r"^train\.flip: "):
        next(Trainer(Net(), Objective(linear(), "v"), data(*shape), recipe=settings(flip=True)).updates())
    network = Net(3 if len(shape) == 4 else 1)
    with pytest.raises(DdimError, match=r"^train\.layout: "):
        Trainer(network, Objective(linear(), "v"), data(*shape), recipe=settings(layout="channels-last"))


def test_flips_reverse_the_last_axis_only() -> None:
    seen: list[Tensor] = []

    class Spy(Objective):
        def draw(self, x0: Tensor, generator: torch.Generator) -> Tensor:
            seen.append(x0)
            return super().draw(x0, generator)

    images = data(1, 2, 3)
    trainer = Trainer(Net(), Spy(linear(), "v"), images, recipe=settings(flip=True, steps=1))
    next(trainer.updates())
    originals = images[torch.from_numpy(trainer.loader.indices(0))]  # type: ignore[union-attr]
    flipped = [torch.equal(x, original.flip(2)) for x, original in zip(seen[0], originals, strict=True)]
    unchanged = [torch.equal(x, original) for x, original in zip(seen[0], originals, strict=True)]
    assert any(flipped)
    assert all(a != b for a, b in zip(flipped, unchanged, strict=True))


@pytest.mark.parametrize(
    ("given", "subject"),
    [
        (torch.zeros(4, 2, dtype=torch.int64), "data"),
        (torch.zeros(0, 2), "data"),
        ([torch.zeros(2), torch.zeros(3)], "data"),
        (["a", "b"], "data"),
        (iter([]), "data"),
        (3, "data"),
        (lambda indices: np.zeros((len(indices), 2)), "data"),
    ],
)
def test_data_that_cannot_be_used(given: Any, subject: str) -> None:
    with pytest.raises(DdimError, match=f"^{subject}: "):
        [*Trainer(Net(), Objective(linear(), "v"), given, recipe=settings()).updates()]


# ---------------------------------------------------------------- fit


def fit(folder: Path, given: Any = None, network: Any = None, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"steps": 12, "batch": 8, "log": "none", "checkpoint_every": 4}
    network = Net() if network is None else network
    return ddim.fit(data(2) if given is None else given, network, out=folder, **(arguments | changes))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
def test_fit_returns_a_network_that_samples(shape: tuple[int, ...], predicts: Any, tmp_path: Path) -> None:
    mine = fit(tmp_path, data(*shape), predicts=predicts, schedule="cosine", steps=2)
    samples = mine.sample(5, steps=4)
    assert samples.shape == (5, *shape)
    assert torch.isfinite(samples).all()
    assert torch.equal(ddim.load(tmp_path, network=Net()).sample(5, steps=4), samples)


class Interrupted(Exception):
    pass


class StopAt:
    """A logger that interrupts the training."""

    def log(self, step: int, values: Any) -> None:
        raise Interrupted

    def close(self) -> None:
        pass


def test_an_interrupted_fit_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", steps=60, checkpoint_every=20)
    with pytest.raises(Interrupted):
        fit(tmp_path / "run", steps=60, checkpoint_every=20, log=StopAt())
    network = Net()
    resumed = fit(tmp_path / "run", network=network, steps=60, checkpoint_every=20)
    assert network.times[0].shape == (8,)  # it was trained, from the last checkpoint
    assert len([time for time in network.times if len(time) == 8]) == 20
    for key, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[key]), key
    again = Net()
    assert torch.equal(fit(tmp_path / "run", network=again, steps=60, checkpoint_every=20).sample(2), whole.sample(2))
    assert again.times[0].shape != (8,)  # a finished run is loaded, not trained again


def test_another_fit_in_the_same_folder_is_an_error(tmp_path: Path) -> None:
    fit(tmp_path)
    for changes in ({"given": data(2) + 1}, {"lr": 0.5}, {"predicts": "eps"}, {"schedule": "cosine"}):
        with pytest.raises(DdimError, match=tmp_path.name):
            fit(tmp_path, **changes)


def test_a_folder_is_data_only(tmp_path: Path) -> None:
    mine = fit(tmp_path, arguments={"kernel": None})
    with pytest.raises(DdimError, match=r"Net.*kernel"):
        ddim.load(tmp_path)
    with pytest.raises(DdimError, match=r"^mnist: "):
        ddim.load("mnist", network=Net())
    with pytest.raises(DdimError, match="weight is missing"):
        ddim.load(tmp_path, network=nn.Linear(2, 2))
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.safetensors", "config.json"}
    assert mine.shape == (2,)


def test_fit_builds_a_u_net_for_images_only(tmp_path: Path) -> None:
    mine = ddim.fit(data(1, 8, 8, count=4), out=tmp_path / "a", steps=1, batch=2, log="none")
    assert torch.equal(ddim.load(tmp_path / "a").sample(1, steps=2), mine.sample(1, steps=2))
    with pytest.raises(DdimError, match=r"^network: "):
        ddim.fit(data(2), out=tmp_path / "b", steps=1)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("changes", "subject"),
    [
        ({"flip": True}, "flip"),
        ({"given": Again()}, "batch"),
        ({"given": iter([]), "batch": None}, "data"),
        ({"given": torch.from_numpy(stripes(4))}, "data"),
        ({"given": torch.zeros(3)}, "data"),
        ({"network": nn.Identity()}, "network"),
        ({"arguments": {"device": torch.device("cpu")}}, "arguments"),
        ({"steps": 0}, "fit"),
    ],
)
def test_arguments_that_cannot_be_used_leave_no_folder(changes: dict[str, Any], subject: str, tmp_path: Path) -> None:
    with pytest.raises(DdimError, match=f"^{subject}: "):
        fit(tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_commands_refuse_the_folder_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from models import ddim as command

    fit(tmp_path / "network", steps=1)
    ddim.fit(data(1, 8, 8, count=4), out=tmp_path / "u-net", steps=1, batch=2, log="none")
    capsys.readouterr()
    for name in ("network", "u-net"):
        for words in (("info",), ("sample", "--out", tmp_path / "samples")):
            assert command(*words[:1], tmp_path / name, *words[1:]) == 2
            [line] = capsys.readouterr().err.splitlines()
            assert line.startswith("error: ")
            assert name in line
    assert not (tmp_path / "samples").exists()


# ---------------------------------------------------------------- micro-batches


def test_the_micro_batch_follows_from_the_size_of_a_sample() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    sizes = [size_of(None, cpu, shape) for shape in ((2,), (64,), (16, 16), (1, 28, 28), (3, 256, 256))]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (1024, 8)
    assert all(size_of(None, gpu, shape) >= size_of(None, cpu, shape) for shape in ((2,), (64,), (3, 64, 64)))
    assert size_of(7, cpu, (2,)) == 7


def test_points_are_sampled_in_few_calls_and_bits_do_not_depend_on_n() -> None:
    network = Net().eval()
    points = ddim.wrap(network, "linear", predicts="v", shape=(2,))
    many = points.sample(1000, steps=3)
    assert len(network.times) == 3
    assert torch.equal(points.sample(1, steps=3, start=700), many[700:701])
    assert torch.equal(points.sample(30, steps=3), many[:30])


# ---------------------------------------------------------------- the example


@pytest.mark.slow
def test_the_example_trains_by_both_routes() -> None:
    """After a few steps the samples of points on a circle are closer to it than noise is, whose mean is 0.54."""
    example = runpy.run_path(str(ROOT / "examples" / "train_from_python.py"))
    for samples in example["main"](400):
        assert samples.shape == (500, 2)
        assert (samples.norm(dim=1) - 1).abs().mean() < 0.4
