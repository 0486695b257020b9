"""Editing: runs that start from a picture, or are held to what is known of one, from Python and from the shell."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a grey and a colour model, pictures and a mask."""
    root = tmp_path_factory.mktemp("edit")
    save_tiny(root / "model")
    save_tiny(root / "colour", in_channels=3)
    write_pictures(root / "pictures", 2)
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save(root / "mask.png")
    Image.fromarray(stripes(3, 4)[2, :, :, 0]).save(root / "small.png")
    Image.fromarray(stripes(3, 8, 3)[2]).save(root / "rgb.png")
    return root


def read(folder: Path, n: int) -> np.ndarray:
    """uint8, (n, H, W) or (n, H, W, 3)."""
    return np.stack([np.asarray(Image.open(folder / f"{i:06d}.png")) for i in range(n)])


PICTURE = to_float(stripes(3)[2:])


@pytest.mark.parametrize("steps", [1, 5])
def test_a_grid_may_start_at_any_time(model: Model, steps: int) -> None:
    for top in (steps, 37, 400, 1000):
        for grid in ("equal-angle", "log-snr"):
            levels = model.levels(grid, steps, top=top)
            assert [levels[0].t, levels[-1].t] == [top, 0]
            assert model.plan(steps, grid, top=top).start.t == top
    assert tiny_model(predicts="eps").levels(steps=steps, top=950)[0].t == 950
    with pytest.raises(DdimError, match=r"^top 500: "):
        model.levels([1, 500], top=500)


def test_from_clean_data_the_picture_comes_back(model: Model) -> None:
    """From t = 1 a network that predicts v gives (1 - noise^2) x0 and terms of the size of noise = 0.01."""
    made = model.sample(3, steps=1, top=1, origin=PICTURE)
    noise = model.schedule.level(1).noise
    assert float((made - PICTURE).abs().max()) < 5 * noise


def test_the_earlier_the_start_the_more_is_kept(model: Model) -> None:
    """Of Gaussian data, exactly; of this network, in the mean."""
    far = [
        float((model.sample(8, steps=4, top=top, origin=PICTURE) - PICTURE).square().mean()) for top in (4, 100, 1000)
    ]
    assert far == sorted(far)


def test_from_no_signal_the_picture_is_forgotten() -> None:
    """Zero terminal SNR: all of the start is noise, and the run is an unconditional one, bit for bit."""
    config = tiny_model().config
    changed = config.model_copy(update={"schedule": config.schedule.model_copy(update={"zero_terminal_snr": True})})
    model = Model(tiny_model().network, changed, dtype="float32")
    assert model.schedule == zero_terminal_snr(config.schedule.build())
    assert torch.equal(model.sample(3, steps=4, origin=PICTURE, top=1000), model.sample(3, steps=4, sampler="ddim"))


def test_a_variant_is_a_function_of_seed_and_index(model: Model) -> None:
    settings = {"steps": 4, "top": 500, "eta": 0.5, "origin": PICTURE}
    nine = model.sample(9, seed=3, **settings)  # type: ignore[arg-type]
    assert torch.equal(model.sample(2, seed=3, start=5, **settings), nine[5:7])  # type: ignore[arg-type]
    assert not torch.equal(model.sample(9, seed=4, **settings), nine)  # type: ignore[arg-type]
    assert len({tuple(picture.flatten().tolist()) for picture in nine}) == 9


def test_each_may_start_from_its_own_picture(model: Model) -> None:
    pictures = to_float(stripes(6))
    made = model.sample(6, steps=3, top=300, origin=pictures)
    for i in (0, 5):
        alone = model.sample(1, steps=3, top=300, origin=pictures[i : i + 1], start=i)
        torch.testing.assert_close(made[i : i + 1], alone, rtol=0, atol=1e-5)


def test_a_rough_picture_made_anew(place: Path) -> None:
    words = ("edit", place / "model", place / "pictures/1.png", "--start-at", 400, "--steps", 4, "-n", 3)
    out = place / "rough"
    assert ddim(*words, "--out", out, "--dtype", "float32", "--sheet", place / "rough.png") == 0
    assert sorted(contents(out)) == [*(f"{i:06d}.png" for i in range(3)), "SHA256SUMS", "manifest.json"]
    model, picture = load_tiny(place / "model"), to_float(stripes(3)[1:2])
    expected = model.sample(3, steps=4, eta=0.85, top=400, origin=picture)
    assert (to_float(read(out, 3)[..., None]) - expected.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6
    with Image.open(place / "rough.png") as sheet:
        assert sheet.size == (10 * 18 + 2, 20)
    whole = contents(out)
    (out / "000001.png").unlink()
    assert ddim(*words, "--out", out, "--dtype", "float32") == 0
    assert contents(out) == whole


def test_the_steps_fit_an_early_start(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "early"
    assert ddim("edit", place / "model", place / "pictures/1.png", "--start-at", 5, "-n", 1, "--out", out) == 0
    assert "5 network evaluations" in capsys.readouterr().out


@pytest.mark.parametrize("start", [(), ("--start-at", 600)])
def test_white_parts_are_kept_to_the_byte(start: tuple[object, ...], place: Path) -> None:
    out = place / f"mask{len(start)}"
    words = ("--mask", place / "mask.png", *start, "--steps", 4, "-n", 3)
    assert ddim("edit", place / "model", place / "pictures/1.png", *words, "--out", out) == 0
    made, picture = read(out, 3), stripes(3)[1, :, :, 0]
    assert (made[:, :4] == picture[:4]).all()
    assert (made[:, 4:] != picture[4:]).any()
    assert (made[0] != made[1]).any()


def test_the_command_is_the_hook(place: Path) -> None:
    out = place / "hook"
    words = ("--mask", place / "mask.png", "--steps", 4, "-n", 2, "--eta", 0.5, "--seed", 7, "--dtype", "float32")
    assert ddim("edit", place / "model", place / "pictures/1.png", *words, "--out", out) == 0
    model, mask = load_tiny(place / "model"), torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :4] = True
    plan, operator = model.plan(4, eta=0.5), Mask(mask)
    hook = eps_kept(consistent(operator, operator.apply(to_float(stripes(3)[1:2])), rounds=5), plan)
    expected = model.sample(2, plan=plan, seed=7, hook=hook)
    assert (to_float(read(out, 2)[..., None]) - expected.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6


def test_a_small_picture_made_large(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "large"
    words = ("--upscale", 2, "--steps", 4, "-n", 2, "--sheet", place / "large.png")
    assert ddim("edit", place / "model", place / "small.png", *words, "--out", out) == 0
    assert "note" not in capsys.readouterr().err
    plan, small = load_tiny(place / "model").plan(4, eta=0.85), to_float(stripes(3, 4)[2:3])
    hook = eps_kept(consistent(MeanPool(2), small, rounds=5), plan)
    made = load(place / "model").sample(2, plan=plan, hook=hook)
    torch.testing.assert_close(MeanPool(2).apply(made), small.expand(2, -1, -1, -1), rtol=0, atol=1e-6)
    assert (to_float(read(out, 2)[..., None]) - made.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6


def test_a_picture_at_full_size_is_made_small_first_and_it_is_said(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--upscale", 4, "--steps", 2, "-n", 1, "--out", place / "pooled")
    assert ddim("edit", place / "model", place / "pictures/1.png", *words) == 0
    assert "note: " in (told := capsys.readouterr().err)
    assert "is not 2x2 pixels" in told


def test_colours_for_a_grey_picture(place: Path) -> None:
    out = place / "coloured"
    assert ddim("edit", place / "colour", place / "rgb.png", "--colour", "--steps", 4, "-n", 2, "--out", out) == 0
    assert read(out, 2).shape == (2, 8, 8, 3)
    model, picture = load(place / "colour"), to_float(stripes(3, 8, 3)[2:3])
    plan, y = model.plan(4, eta=0.85), Grey(LUMA).apply(picture)
    made = model.sample(2, plan=plan, hook=eps_kept(consistent(Grey(LUMA), y, rounds=5), plan))
    torch.testing.assert_close(Grey(LUMA).apply(made), y.expand(2, -1, -1, -1), rtol=0, atol=1e-6)
    assert (to_float(read(out, 2)) - made.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6


def test_the_folder_of_other_edits_or_samples_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("edit", place / "model", place / "pictures/1.png", "--steps", 2, "-n", 1, "--out", place / "mine")
    assert ddim(*words, "--start-at", 300) == 0
    manifest = json.loads((place / "mine/manifest.json").read_text())
    assert manifest["format"] == "ddim-edited"
    assert manifest["edit"]["start_at"] == 300
    before = contents(place / "mine")
    for other in (
        (*words, "--start-at", 301),
        (*words, "--start-at", 300, "--mask", place / "mask.png"),
        (*words[:2], place / "pictures/0.png", *words[3:], "--start-at", 300),
        ("sample", place / "model", "--steps", 2, "-n", 1, "--out", place / "mine"),
    ):
        capsys.readouterr()
        assert ddim(*other) == 2
        assert "mine: " in capsys.readouterr().err
    assert contents(place / "mine") == before


def test_a_start_at_the_top_says_nothing(model: Model, recwarn: pytest.WarningsRecorder) -> None:
    """The note that pure noise stands in for x would be wrong of a run that starts from a picture."""
    model.plan(4, top=300)
    assert not [warning for warning in recwarn if issubclass(warning.category, DdimWarning)]
