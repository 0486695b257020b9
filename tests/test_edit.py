"""Image editing from Python and from the command line: runs that start from an image, or agree with part of one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddim._io.sheets import zoom
from ddim.data.pixels import to_float
from ddim.errors import DdimError, DdimWarning
from ddim.model.load import load
from ddim.model.model import Model
from ddim.process.schedule import zero_terminal_snr
from ddim.sampling.x0_hooks import LUMA, Grey, Mask, MeanPool, consistent, eps_kept
from models import contents, ddim, load_tiny, save_tiny, stripes, tiny_model, write_pictures


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model(micro_batch=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a grey and a colour model, images and a mask."""
    root = tmp_path_factory.mktemp("edit")
    save_tiny(root / "model")
    save_tiny(root / "colour", in_channels=3)
    write_pictures(root / "images", 2)
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save(root / "mask.png")
    Image.fromarray(stripes(3, 4)[2, :, :, 0]).save(root / "small.png")
    Image.fromarray(stripes(3, 8, 3)[2]).save(root / "rgb.png")
    return root


def read(folder: Path, n: int) -> np.ndarray:
    """uint8, (n, H, W) or (n, H, W, 3)."""
    return np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(n)])


ORIGIN = to_float(stripes(3)[2:])


@pytest.mark.parametrize("steps", [1, 5])
def test_a_plan_can_start_at_any_timestep(model: Model, steps: int) -> None:
    for top in (steps, 37, 400, 1000):
        for grid in ("equal-angle", "log-snr"):
            levels = model.levels(grid, steps, top=top)
            assert [levels[0].t, levels[-1].t] == [top, 0]
            assert model.plan(steps, grid, top=top).start.t == top
    assert tiny_model(predicts="eps").levels(steps=steps, top=950)[0].t == 950
    with pytest.raises(DdimError, match=r"^top 500: "):
        model.levels([1, 500], top=500)


def test_a_start_at_t_1_returns_the_image(model: Model) -> None:
    """From t = 1 a network that predicts v gives (1 - noise^2) x0 and terms of the size of noise = 0.01."""
    samples = model.sample(3, steps=1, top=1, origin=ORIGIN)
    noise = model.schedule.level(1).noise
    assert float((samples - ORIGIN).abs().max()) < 5 * noise


def test_a_lower_start_keeps_more_of_the_image(model: Model) -> None:
    """Exact for Gaussian data; for this network on average."""
    errors = [
        float((model.sample(8, steps=4, top=top, origin=ORIGIN) - ORIGIN).square().mean()) for top in (4, 100, 1000)
    ]
    assert errors == sorted(errors)


def test_a_start_without_signal_does_not_depend_on_the_image() -> None:
    """With zero terminal SNR the start is all noise, and the run equals an unconditional one, bit for bit."""
    config = tiny_model().config
    changed = config.model_copy(update={"schedule": config.schedule.model_copy(update={"zero_terminal_snr": True})})
    model = Model(tiny_model().network, changed, dtype="float32")
    assert model.schedule == zero_terminal_snr(config.schedule.build())
    assert torch.equal(model.sample(3, steps=4, origin=ORIGIN, top=1000), model.sample(3, steps=4, sampler="ddim"))


def test_a_variant_depends_only_on_seed_and_index(model: Model) -> None:
    settings = {"steps": 4, "top": 500, "eta": 0.5, "origin": ORIGIN}
    nine = model.sample(9, seed=3, **settings)  # type: ignore[arg-type]
    assert torch.equal(model.sample(2, seed=3, start=5, **settings), nine[5:7])  # type: ignore[arg-type]
    assert not torch.equal(model.sample(9, seed=4, **settings), nine)  # type: ignore[arg-type]
    assert len({tuple(image.flatten().tolist()) for image in nine}) == 9


def test_every_sample_can_have_its_own_origin(model: Model) -> None:
    images = to_float(stripes(6))
    variants = model.sample(6, steps=3, top=300, origin=images)
    for i in (0, 5):
        alone = model.sample(1, steps=3, top=300, origin=images[i : i + 1], start=i)
        torch.testing.assert_close(variants[i : i + 1], alone, rtol=0, atol=1e-5)


def test_start_at_equals_sampling_from_the_noised_image(folder: Path) -> None:
    arguments = ("edit", folder / "model", folder / "images/1.png", "--start-at", 400, "--steps", 4, "-n", 3)
    out = folder / "sdedit"
    assert ddim(*arguments, "--out", out, "--dtype", "float32", "--sheet", folder / "sdedit.png") == 0
    assert sorted(contents(out)) == [*(f"{i:06d}.png" for i in range(3)), "SHA256SUMS", "manifest.json"]
    model, origin = load_tiny(folder / "model"), to_float(stripes(3)[1:2])
    expected = model.sample(3, steps=4, eta=0.85, top=400, origin=origin)
    assert (to_float(read(out, 3)[..., None]) - expected.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6
    with Image.open(folder / "sdedit.png") as sheet:
        factor = zoom(10, 5 * 10)  # the image, its noised state and three variants
        assert sheet.size == (5 * (8 * factor + 2) + 2, 8 * factor + 4)
    whole = contents(out)
    (out / "000001.png").unlink()
    assert ddim(*arguments, "--out", out, "--dtype", "float32") == 0
    assert contents(out) == whole


def test_the_default_steps_fit_a_low_start(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "early"
    assert ddim("edit", folder / "model", folder / "images/1.png", "--start-at", 5, "-n", 1, "--out", out) == 0
    assert "5 network evaluations" in capsys.readouterr().out


@pytest.mark.parametrize("start", [(), ("--start-at", 600)])
def test_white_parts_of_the_mask_are_kept_to_the_byte(start: tuple[object, ...], folder: Path) -> None:
    out = folder / f"mask{len(start)}"
    arguments = ("--mask", folder / "mask.png", *start, "--steps", 4, "-n", 3)
    assert ddim("edit", folder / "model", folder / "images/1.png", *arguments, "--out", out) == 0
    variants, image = read(out, 3), stripes(3)[1, :, :, 0]
    assert (variants[:, :4] == image[:4]).all()
    assert (variants[:, 4:] != image[4:]).any()
    assert (variants[0] != variants[1]).any()


def test_a_mask_equals_the_hook(folder: Path) -> None:
    out = folder / "hook"
    arguments = ("--mask", folder / "mask.png", "--steps", 4, "-n", 2, "--eta", 0.5, "--seed", 7, "--dtype", "float32")
    assert ddim("edit", folder / "model", folder / "images/1.png", *arguments, "--out", out) == 0
    model, mask = load_tiny(folder / "model"), torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :4] = True
    plan, operator = model.plan(4, eta=0.5), Mask(mask)
    hook = eps_kept(consistent(operator, operator.apply(to_float(stripes(3)[1:2])), rounds=5), plan)
    expected = model.sample(2, plan=plan, seed=7, hook=hook)
    assert (to_float(read(out, 2)[..., None]) - expected.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6


def test_upscaled_images_agree_with_the_small_image(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "large"
    arguments = ("--upscale", 2, "--steps", 4, "-n", 2, "--sheet", folder / "large.png")
    assert ddim("edit", folder / "model", folder / "small.png", *arguments, "--out", out) == 0
    assert "note" not in capsys.readouterr().err
    plan, small = load_tiny(folder / "model").plan(4, eta=0.85), to_float(stripes(3, 4)[2:3])
    hook = eps_kept(consistent(MeanPool(2), small, rounds=5), plan)
    samples = load(folder / "model").sample(2, plan=plan, hook=hook)
    torch.testing.assert_close(MeanPool(2).apply(samples), small.expand(2, -1, -1, -1), rtol=0, atol=1e-6)
    assert (to_float(read(out, 2)[..., None]) - samples.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6


def test_upscaling_an_image_of_full_size_warns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--upscale", 4, "--steps", 2, "-n", 1, "--out", folder / "pooled")
    assert ddim("edit", folder / "model", folder / "images/1.png", *arguments) == 0
    assert "note: " in (warning := capsys.readouterr().err)
    assert "is not 2x2 pixels" in warning


def test_colourised_images_agree_with_the_grey_image(folder: Path) -> None:
    out = folder / "coloured"
    assert ddim("edit", folder / "colour", folder / "rgb.png", "--colour", "--steps", 4, "-n", 2, "--out", out) == 0
    assert read(out, 2).shape == (2, 8, 8, 3)
    model, image = load(folder / "colour"), to_float(stripes(3, 8, 3)[2:3])
    plan, y = model.plan(4, eta=0.85), Grey(LUMA).apply(image)
    samples = model.sample(2, plan=plan, hook=eps_kept(consistent(Grey(LUMA), y, rounds=5), plan))
    torch.testing.assert_close(Grey(LUMA).apply(samples), y.expand(2, -1, -1, -1), rtol=0, atol=1e-6)
    assert (to_float(read(out, 2)) - samples.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6


def test_a_folder_of_other_edits_or_samples_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("edit", folder / "model", folder / "images/1.png", "--steps", 2, "-n", 1, "--out", folder / "edited")
    assert ddim(*arguments, "--start-at", 300) == 0
    manifest = json.loads((folder / "edited/manifest.json").read_text())
    assert manifest["format"] == "ddim-edited"
    assert manifest["edit"]["start_at"] == 300
    before = contents(folder / "edited")
    for other in (
        (*arguments, "--start-at", 301),
        (*arguments, "--start-at", 300, "--mask", folder / "mask.png"),
        (*arguments[:2], folder / "images/0.png", *arguments[3:], "--start-at", 300),
        ("sample", folder / "model", "--steps", 2, "-n", 1, "--out", folder / "edited"),
    ):
        capsys.readouterr()
        assert ddim(*other) == 2
        assert "edited: " in capsys.readouterr().err
    assert contents(folder / "edited") == before


def test_a_plan_that_starts_below_T_does_not_warn(model: Model, recwarn: pytest.WarningsRecorder) -> None:
    """The warning that pure noise replaces x_t would be wrong for a run that starts from an image."""
    model.plan(4, top=300)
    assert not [warning for warning in recwarn if issubclass(warning.category, DdimWarning)]
