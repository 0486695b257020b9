"""The model object: what a sample depends on, and what it does not."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch

import ddim
from ddim.data.pixels import to_float
from ddim.errors import DdimError, DdimWarning
from ddim.model.model import Model
from models import KINDS, LENGTH, stripes, tiny_model, tiny_set

PLANS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("pictures", {"steps": 6}),
    "ddpm": ("pictures", {"steps": 6, "eta": 1.0}),
    "sigma hat": ("pictures", {"steps": 6, "sigma": "hat"}),
    "own grid": ("pictures", {"grid": [1, 250, 333.5, 1000]}),
    "levels": ("levels", {"steps": 6}),
    "levels, markov": ("levels", {"steps": 6, "sampler": "markov"}),
    "text, eta 0.3": ("text", {"steps": 6, "eta": 0.3}),
    "text, sharper": ("text", {"grid": [1, 250, 333.5, 1000], "temperature": 0.7, "top_p": 0.9}),
    "masked text": ("masked text", {"steps": 6}),
    "masked text, eta 1": ("masked text", {"steps": 6, "eta": 1.0}),
}


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Model:
    """A model of images, or of the modality that a test is parametrised over."""
    return tiny_model(kind=getattr(request, "param", "pictures"), micro_batch=4)


@pytest.fixture(scope="module")
def labelled(request: pytest.FixtureRequest) -> Model:
    return tiny_model(kind=getattr(request, "param", "pictures"), classes=3, micro_batch=4)


every_kind = pytest.mark.parametrize("model", KINDS, indirect=True)
every_labelled = pytest.mark.parametrize("labelled", KINDS, indirect=True)


def guided(model: Model, n: int, steps: int, labels: Any = None, guidance: float | None = None) -> Any:
    """Samples with labels and guidance, for any modality."""
    return model.sample(n, steps=steps, labels=labels, guidance=guidance)


@pytest.mark.parametrize(("model", "settings"), PLANS.values(), ids=PLANS, indirect=["model"])
def test_a_sample_does_not_depend_on_the_number_of_samples(settings: dict[str, Any], model: Model) -> None:
    nine = model.sample(9, seed=3, **settings)
    assert nine.shape == (9, *model.shape)
    assert nine.dtype == (torch.int64 if model.config.categorical else torch.float32)
    assert torch.equal(model.sample(5, seed=3, **settings), nine[:5])
    assert torch.equal(model.sample(1, seed=3, **settings), nine[:1])
    assert torch.equal(model.sample(3, seed=3, start=5, **settings), nine[5:8])
    blocks = model.sample_blocks(model.plan(**{"sampler": "auto", **settings}), [7, 2, 2, 0, 8], seed=3)
    assert torch.equal(torch.cat([*blocks]), nine[[7, 2, 2, 0, 8]])
    assert len({tuple(image.flatten().tolist()) for image in nine}) == 9


@pytest.mark.parametrize(("kind", "model"), [(kind, kind) for kind in KINDS], ids=KINDS, indirect=["model"])
def test_render_is_the_inverse_of_read(kind: str, model: Model) -> None:
    data = tiny_set(kind)
    batch = data.batch([0, 5, 19])
    rendered = model.kind.render(model.kind.read(batch))
    if kind == "pictures":
        assert (np.stack(rendered) == batch).all()
    elif kind == "levels":
        assert (np.stack(rendered) == batch // 64 * 85).all()
    else:
        assert rendered == [data.policy.decode(data.ids[i : i + LENGTH]) for i in (0, 5, 19)]


@every_kind
def test_another_seed_gives_other_samples(model: Model) -> None:
    assert not torch.equal(model.sample(2, steps=3, seed=0), model.sample(2, steps=3, seed=1))


@every_kind
def test_zero_samples_are_an_empty_batch(model: Model) -> None:
    none = model.sample(0, steps=3)
    assert none.shape == (0, *model.shape)
    assert none.dtype == model.sample(1, steps=3).dtype


def test_zero_images_have_zero_latents(model: Model) -> None:
    assert model.encode(torch.zeros(0, 1, 8, 8), steps=3).x.shape == (0, 1, 8, 8)


def test_the_micro_batch_changes_no_more_than_rounding(model: Model) -> None:
    torch.testing.assert_close(
        tiny_model(micro_batch=3).sample(5, steps=6), model.sample(5, steps=6), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("micro_batch", [0, -1])
def test_an_invalid_micro_batch_raises_an_error(micro_batch: int) -> None:
    with pytest.raises(DdimError, match=f"micro-batch {micro_batch}"):
        tiny_model(micro_batch=micro_batch)


@pytest.mark.parametrize(("model", "labelled"), [(kind, kind) for kind in KINDS], ids=KINDS, indirect=True)
def test_the_global_generator_is_not_used(model: Model, labelled: Model) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    model.sample(3, steps=4, eta=1.0)
    guided(labelled, 3, 4, [1, 1, 1], 2.0)
    model.noise(5).start()
    if not model.config.categorical:
        model.decode(model.encode(to_float(stripes(2)), 3))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    torch.rand(7)
    again = model.sample(3, steps=4, eta=1.0)
    torch.manual_seed(5)
    assert torch.equal(model.sample(3, steps=4, eta=1.0), again)


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_unchanged(kind: str) -> None:
    before = tiny_model(kind=kind).network.state_dict()
    tiny = tiny_model(dtype="bfloat16", kind=kind)
    tiny.sample(2, steps=3)
    for key, value in tiny.network.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[key])
    assert not any(parameter.requires_grad for parameter in tiny.network.parameters())
    assert not tiny.network.training


@every_labelled
def test_guidance_0_is_unconditional_and_guidance_1_conditional(labelled: Model) -> None:
    labels = [0, 1, 2, 0, 1]
    plain, conditional = labelled.sample(5, steps=5), labelled.sample(5, steps=5, labels=labels)
    assert not torch.equal(plain, conditional)
    assert torch.equal(guided(labelled, 5, 5, labels, 1.0), conditional)
    torch.testing.assert_close(guided(labelled, 5, 5, labels, 0.0), plain, rtol=0, atol=1e-4)


def test_guidance_extrapolates_linearly(labelled: Model) -> None:
    x, level = labelled.noise(4).start(), labelled.schedule.level(500)
    labels = torch.tensor([0, 1, 2, 0])
    off, on = labelled.denoiser()(x, level), labelled.denoiser(labels)(x, level)
    for scale in (0.5, 3.0, -1.0):
        guided = labelled.denoiser(labels, scale)(x, level)
        torch.testing.assert_close(guided.x0, off.x0 + scale * (on.x0 - off.x0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(guided.eps, off.eps + scale * (on.eps - off.eps), rtol=1e-4, atol=1e-5)
        together = level.signal * guided.x0 + level.noise * guided.eps
        torch.testing.assert_close(together, x, rtol=1e-4, atol=1e-4)


@every_labelled
def test_each_sample_has_its_own_label(labelled: Model) -> None:
    mixed = guided(labelled, 6, 4, [0, 1, 2, 2, 1, 0], 2.0)
    for label in range(3):
        alone = guided(labelled, 6, 4, [label] * 6, 2.0)
        assert not torch.equal(mixed, alone)
        mine = torch.tensor([0, 1, 2, 2, 1, 0]) == label
        assert torch.equal(mixed[mine], alone[mine])


@every_labelled
@pytest.mark.parametrize(
    ("labels", "wrong"),
    [(3, r"^labels: .*\b0\.\.2\b"), (-1, r"^labels: .*\b0\.\.2\b"), ([0, 1], r"^labels: ")],
    ids=str,
)
def test_invalid_labels_raise_an_error(labels: Any, wrong: str, labelled: Model) -> None:
    with pytest.raises(DdimError, match=wrong):
        labelled.sample(3, steps=2, labels=labels)


@every_labelled
def test_guidance_needs_a_label(labelled: Model) -> None:
    with pytest.raises(DdimError, match=r"^guidance: "):
        guided(labelled, 3, 2, guidance=2.0)


@every_kind
def test_labels_for_a_model_without_labels_raise_an_error(model: Model) -> None:
    with pytest.raises(DdimError, match=r"^labels: "):
        model.sample(3, steps=2, labels=1)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("t", [1, 2.5, 499.25, 1000])
def test_denoise_is_the_network_at_integer_and_fractional_times(predicts: str, t: float) -> None:
    model = tiny_model(predicts=predicts)
    x, level = model.noise(3).start(), model.schedule.level(t)
    with torch.no_grad():
        output = model.network(x, torch.full((3,), float(t)))
    actual = model.denoise(x, level)
    if predicts == "eps":
        expected = (x - level.noise * output) / level.signal, output
    elif predicts == "x0":
        expected = output, (x - level.signal * output) / level.noise
    else:
        expected = level.signal * x - level.noise * output, level.noise * x + level.signal * output
    scale = 1 / min(level.signal, level.noise)
    torch.testing.assert_close(actual.x0, expected[0], rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(actual.eps, expected[1], rtol=1e-4, atol=1e-5 * scale)


def test_fractional_times_are_distinguished(model: Model) -> None:
    x = model.noise(2).start()
    low, middle, high = (model.denoise(x, model.schedule.level(t)).x0 for t in (400, 400.5, 401))
    assert not torch.equal(low, middle)
    assert not torch.equal(middle, high)
    torch.testing.assert_close(middle, (low + high) / 2, rtol=1e-2, atol=1e-2)


@every_kind
def test_batched_and_single_time_conditioning_agree(model: Model) -> None:
    """Times computed all at once give the same as times computed one by one."""
    plan = model.plan(7)
    alone = list(ddim.trajectory(model.denoiser(), plan, model.noise(4, seed=2)))[-1].x
    torch.testing.assert_close(alone, model.sample(4, plan=plan, seed=2), rtol=0, atol=1e-4)


def test_bfloat16_stays_close_and_the_state_stays_float32(model: Model) -> None:
    fast = tiny_model(dtype="bfloat16", micro_batch=4)
    one, other = model.sample(4, steps=10), fast.sample(4, steps=10)
    assert other.dtype == torch.float32
    assert not torch.equal(one, other)
    assert float((one - other).abs().max()) < 0.15 * float(one.abs().max())


def test_images_may_be_bytes_or_floats(model: Model) -> None:
    images = stripes(3)
    latents = model.encode(to_float(images), steps=5).x
    for same in (images, torch.from_numpy(images), to_float(images).numpy()):
        assert torch.equal(model.encode(same, steps=5).x, latents)
    assert latents.shape == (3, 1, 8, 8)
    assert torch.equal(model.encode(images[:1], steps=5).x, latents[:1])


@pytest.mark.parametrize("shape", [(3, 1, 8, 9), (3, 3, 8, 8), (3, 1, 16, 16), (1, 8, 8), (8, 8)])
def test_images_and_latents_of_another_shape_raise_an_error(shape: tuple[int, ...], model: Model) -> None:
    with pytest.raises(DdimError, match=r"^images: "):
        model.encode(torch.zeros(shape), steps=3)
    with pytest.raises(DdimError, match=r"^images: "):
        model.encode(np.zeros(shape, np.float32), steps=3)
    with pytest.raises(DdimError, match=r"^latents: "):
        model.decode(torch.zeros(shape), steps=3)


def test_bytes_of_another_shape_raise_an_error(model: Model) -> None:
    with pytest.raises(DdimError, match=r"^images: "):
        model.encode(stripes(2, 9), steps=3)


def test_plans_end_at_clean_data_and_start_there_to_encode(model: Model) -> None:
    down, up = model.levels("linear", 4), model.levels("linear", 4, encode=True)
    assert [level.t for level in down] == [1000, 750, 500, 250, 0]
    assert up == down[::-1]


def test_the_default_grid_of_an_eps_network_avoids_the_noisiest_times_with_a_warning() -> None:
    model = tiny_model(predicts="eps")
    with pytest.warns(DdimWarning, match=r"\bT = 1000\b"):
        levels = model.levels()
    assert levels[0].t < 1000
    assert model.levels([10, 500, 1000])[0].t == 1000


@pytest.mark.parametrize("apart", [False, True])
def test_float32_on_a_gpu_disables_tf32_and_restores_the_setting(apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's convolutions round to TF32's ten bits by default; a user may have set them separately."""
    from ddim.model.precision import without_tf32

    conv, seen = torch.backends.cudnn.conv, []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    if apart:
        torch._C._set_fp32_precision_setter("cuda", "rnn", "ieee")
    before = conv.fp32_precision
    assert before == "tf32"

    def body(x: torch.Tensor) -> torch.Tensor:
        seen.append(conv.fp32_precision)
        if x.isnan().any():
            raise ValueError("not a number")
        return x + 1

    try:
        assert without_tf32(body)(torch.zeros(2)).tolist() == [1, 1]
        with pytest.raises(ValueError, match="not a number"):
            without_tf32(body)(torch.full((1,), torch.nan))
        assert conv.fp32_precision == before
    finally:
        torch._C._set_fp32_precision_setter("cuda", "rnn", "tf32")
    assert len(seen) == 2
    assert "tf32" not in seen


@pytest.mark.parametrize(
    ("name", "home"), [("pixels", "data.pixels"), ("grid", "process.timesteps"), ("schedule", "process.schedule")]
)
def test_modules_are_importable_by_their_short_names(name: str, home: str) -> None:
    """`import ddim.pixels` and `ddim.pixels` are the one module that the tree has elsewhere."""
    module = importlib.import_module(f"ddim.{home}")
    assert importlib.import_module(f"ddim.{name}") is module
    assert getattr(importlib.import_module("ddim"), name) is module
    assert module.__spec__.name == f"ddim.{home}"


@pytest.mark.parametrize("kind", ["pictures", "text"])
def test_reprs_are_one_line(kind: str) -> None:
    model = tiny_model(kind=kind)
    for value in (model, model.schedule, model.plan(3), model.noise(2)):
        assert len(repr(value).splitlines()) == 1
        assert len(repr(value)) < 400
        assert type(value).__name__ in repr(value)


def test_pillow_images_equal_uint8_images() -> None:
    for channels in (1, 3):
        images = torch.rand((2, channels, 4, 5), generator=torch.Generator().manual_seed(0)) * 3 - 1.5
        for image, pixels in zip(ddim.to_pil(images), ddim.to_uint8(images), strict=True):
            assert (np.asarray(image).reshape(pixels.shape) == pixels).all()
