"""What a user meets first: public names, one default sampler, refused arguments, latents that decode themselves."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ddim
from ddim.data.pixels import to_float
from ddim.errors import DdimError
from ddim.sampling.loop import run
from models import KINDS, stripes, tiny_model

ROOT = Path(__file__).resolve().parents[1]


class Net(nn.Module):
    """A network of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x * self.weight + t.view(-1, *[1] * (x.ndim - 1)) / 1000)


def wrapped() -> Any:
    return ddim.wrap(Net().eval(), "linear", predicts="v", shape=(2, 5))


RUNNERS = {**{kind: (lambda kind=kind: tiny_model(kind=kind)) for kind in KINDS}, "wrapped": wrapped}
SETTINGS: list[dict[str, Any]] = [{}, {"steps": 3}, {"steps": 3, "eta": 0.5}, {"steps": 4, "grid": "linear"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", RUNNERS)
def test_sampling_runs_the_plan_of_the_same_settings(name: str, settings: dict[str, Any]) -> None:
    """`sample(n, ...)` is `sample(n, plan=plan(...))`, in every modality: there is one default."""
    model = RUNNERS[name]()
    plan = model.plan(**settings)
    samples = model.sample(3, seed=5, **settings)
    assert torch.equal(samples, model.sample(3, seed=5, plan=plan))
    at, _ = model.denoiser_of(3, None, None)
    by_hand = run(at(torch.arange(3)), plan, *(model.noise_of(range(3), 5, model.shape),) * 2)
    assert torch.allclose(samples.double(), by_hand.double(), atol=1e-5)


@pytest.mark.parametrize("name", ["pictures", "text"])
def test_commands_plan_what_sample_runs(name: str, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from ddim.cli.main import cli

    model = tiny_model(kind=name)
    model.save(tmp_path / "m")
    result = CliRunner().invoke(cli, ["plan", str(tmp_path / "m"), "--steps", "4", "--json"])
    assert result.exit_code == 0, result.output
    assert type(model.plan(4)).from_json(result.stdout) == model.plan(4)


def test_public_names_are_listed_and_exist() -> None:
    assert {*ddim.__all__} <= {*dir(ddim)}
    for name in ddim.__all__:
        assert getattr(ddim, name) is not None


def named(text: str) -> set[str]:
    return {match.rstrip(".") for match in re.findall(r"\bddim(?:\.[A-Za-z_][A-Za-z_0-9]*)+", text)}


FILES = [
    *(ROOT / "src" / "ddim").rglob("*.py"),
    *(path for path in (ROOT / "docs").rglob("*.md") if "results" not in path.parts),
    ROOT / "README.md",
]


def test_names_in_messages_docstrings_and_pages_exist() -> None:
    missing = {}
    for path in FILES:
        for name in named(path.read_text(encoding="utf-8")):
            parts = name.split(".")[1:]
            if parts[-1] not in ("json", "py", "git") and not in_files(parts) and not in_package(parts):
                missing[name] = path
    assert not missing


def in_package(parts: list[str]) -> bool:
    """Whether `import ddim` gives this name, up to the fields of a class."""
    value: Any = ddim
    for part in parts:
        fields = {*getattr(value, "__annotations__", ()), *getattr(value, "__dataclass_fields__", ())}
        if not hasattr(value, part):
            return inspect.isclass(value) and part in fields
        value = getattr(value, part)
    return True


def in_files(parts: list[str]) -> bool:
    """Whether the tree has this module, or the module this definition; without importing it, as it may need a GPU."""
    folder, rest = ROOT / "src" / "ddim", [*parts]
    while rest and (folder / rest[0]).is_dir():
        folder = folder / rest.pop(0)
    if not rest:
        return True
    file = folder / f"{rest[0]}.py"
    if not file.exists():
        return False
    text = file.read_text(encoding="utf-8")
    return all(re.search(rf"^\s*(def |class |self\.)?{part}\b", text, re.MULTILINE) for part in rest[1:])


@pytest.mark.parametrize(
    ("call", "near"),
    [
        (lambda: tiny_model().sample(1, stps=3), "steps"),
        (lambda: tiny_model().plan(3, samplr="ddim"), "sampler"),
        (lambda: tiny_model(kind="text").sample(1, temprature=1.0), "temperature"),
        (lambda: wrapped().encode(torch.zeros(1, 2, 5), metod="ddim"), "method"),
        (lambda: ddim.load("mnist", dtyp="float32"), "dtype"),
        (lambda: ddim.wrap(Net().eval(), "linear", predict="eps"), "predicts"),
    ],
)
def test_unknown_arguments_are_refused_with_the_nearest(call: Any, near: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{near}\b"):
        call()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("pictures", {"temperature": 0.5}),
        ("pictures", {"top_p": 0.5}),
        ("text", {"sigma": "hat"}),
        ("text", {"top": 5}),
    ],
)
def test_settings_of_another_modality_are_refused(kind: str, settings: dict[str, Any]) -> None:
    [name] = settings
    with pytest.raises(DdimError, match=f"^{name}: "):
        tiny_model(kind=kind).plan(4, **settings)


@pytest.mark.parametrize("method", ["ddim", "ddim-target", "fixed-point", "reversible", "lossless"])
@pytest.mark.parametrize("name", ["pictures", "wrapped"])
def test_latents_decode_alone(name: str, method: str) -> None:
    """`decode(encode(x))` runs the plan of the encoding; a selection decodes to the same bits."""
    model = RUNNERS[name]()
    data = to_float(stripes(3)) if name == "pictures" else torch.linspace(-1, 1, 30).reshape(3, 2, 5)
    latents = model.encode(data, steps=20, method=method)
    assert len(latents) == 3
    assert len(repr(latents).splitlines()) == 1
    again = model.decode(latents)
    assert torch.equal(model.decode(latents[1:]), again[1:])
    assert torch.equal(model.decode(latents[[2, 0]]), again[[2, 0]])
    assert torch.equal(model.decode(latents.to("cpu")), again)
    if method == "lossless":
        assert torch.equal(again, data)
    if not latents.states()[1]:
        assert torch.equal(model.decode(latents.x, steps=len(latents.plan), method=method), again)
    with pytest.raises(DdimError, match=r"^latents: "):
        model.decode(latents, steps=20)


def test_latents_of_another_model_are_refused() -> None:
    latents = tiny_model(seed=1).encode(to_float(stripes(1)), steps=3)
    with pytest.raises(DdimError, match=r"^latents: "):
        tiny_model(seed=2).decode(latents)


@pytest.mark.parametrize("call", [lambda m: m.encode(torch.zeros(1, 12)), lambda m: next(m.tuning(5))])
def test_discrete_data_have_no_inversion_and_no_tuning(call: Any) -> None:
    with pytest.raises(DdimError):
        call(tiny_model(kind="text"))


def test_a_model_is_copied_only_to_another_device() -> None:
    model = tiny_model()
    assert model.to("cpu") is model
    if torch.cuda.is_available():
        assert model.to("cuda").device.type == "cuda"
        assert model.device.type == "cpu"


def test_the_shape_of_a_wrapped_network_is_passed_once() -> None:
    bare = ddim.wrap(Net().eval(), "linear", predicts="v")
    assert torch.equal(bare.sample(2, (2, 5), steps=3), wrapped().sample(2, steps=3))
    for call in (
        lambda: bare.sample(2, steps=3),
        lambda: wrapped().sample(2, (3, 5)),
        lambda: tiny_model().sample(1, 20),
    ):
        with pytest.raises(DdimError, match=r"^shape"):
            call()


def test_settings_are_keywords() -> None:
    """After the first one or two arguments, public functions take keywords only."""
    for function in (
        ddim.Model.sample,
        ddim.Model.plan,
        ddim.Model.encode,
        ddim.Model.decode,
        ddim.Model.inversion,
        ddim.Model.tuning,
        ddim.Model.from_pretrained,
        ddim.Model.push_to_hub,
        ddim.Model.save_pretrained,
        ddim.load,
        ddim.wrap,
    ):
        parameters = inspect.signature(function).parameters.values()
        assert sum(p.kind == p.POSITIONAL_OR_KEYWORD and p.name not in ("self", "cls") for p in parameters) <= 2, (
            function
        )
        assert not any(p.kind == p.VAR_KEYWORD for p in parameters), function
