"""Feature extractors: independence of the batch, parity with torch-fidelity, and errors for invalid ones."""

from __future__ import annotations

import io
import json
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ddim import evaluation
from ddim._io.atomic import sha256
from ddim._io.safetensors import read_tensors
from ddim.data import digits_as_mnist, load
from ddim.data.pixels import to_float
from ddim.errors import DdimError
from ddim.evaluation import extractors, fidelity
from ddim.evaluation.extractors import bundled, choose, from_file, from_module
from ddim.evaluation.features import INCEPTION, INCEPTION_SHA256
from ddim.evaluation.inception import inception
from ddim.nn.classifier import ResNetConfig, config_of
from ddim.process import rng
from evaluation.kit import Small, random_images, save_script, small


@pytest.mark.parametrize("name", bundled())
def test_features_do_not_depend_on_other_images(name: str) -> None:
    extractor = evaluation.load_extractor(name)
    assert extractor.shape is not None
    images = random_images(70, extractor.shape[0], extractor.shape[2])
    features = extractor(images)
    assert features.dtype == torch.float32
    assert torch.equal(features[:3], extractor(images[:3]))
    assert torch.equal(features[[69, 5]], extractor(images[[69, 5]]))
    assert features.std(0).max() > 0


@pytest.mark.parametrize("name", bundled())
def test_bundled_extractors_match_their_config(name: str) -> None:
    about = json.loads((bundled()[name] / "config.json").read_bytes())
    extractor = evaluation.load_extractor(name)
    assert extractor.metric == f"FD({name})"
    assert extractor.sha256 == sha256(bundled()[name] / "model.safetensors") == about["sha256"]
    assert f"{about['test_accuracy']:.2%}" in extractor.note
    network = config_of(about["network"]).build()
    missing = network.load_state_dict(read_tensors(bundled()[name] / "model.safetensors")[0], strict=False)
    assert not missing.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys)


@pytest.mark.parametrize(
    ("name", "folder", "count"),
    [
        ("digits28", "mnist", 10_000),
        ("clothing28", "fashion_mnist", 10_000),
        ("colour32", "cifar10", 1000),
        pytest.param("colour32", "cifar10", 10_000, marks=pytest.mark.slow),
    ],
)
def test_the_stated_accuracy_is_measured_on_the_test_set(name: str, folder: str, count: int, shared: Path) -> None:
    dataset = load(shared / folder, split="test")
    about = json.loads((bundled()[name] / "config.json").read_bytes())
    network = config_of(about["network"]).build().eval()
    stored = read_tensors(bundled()[name] / "model.safetensors")[0]
    network.load_state_dict({key: value.float() for key, value in stored.items()}, strict=False)
    correct = 0
    with torch.no_grad():
        for first in range(0, count, 1000):
            indices = range(first, first + 1000)
            correct += int(
                (network(to_float(dataset.batch(indices))).argmax(1).numpy() == dataset.labels[indices]).sum()
            )
    stated = about["test_accuracy"]
    tolerance = 3e-4 if count == 10_000 else 3 * (stated * (1 - stated) / count) ** 0.5
    assert correct / count == pytest.approx(stated, abs=tolerance)


def test_a_whitened_layer_is_frozen_and_has_uncorrelated_outputs_of_variance_one() -> None:
    network = ResNetConfig(in_channels=2, side=8, widths=(8, 16)).build()
    x = torch.randn(50, 2, 8, 8, generator=torch.Generator().manual_seed(0)).cumsum(3)
    network.whiten(x)
    with torch.no_grad():
        output = network.white(x).permute(0, 2, 3, 1).flatten(0, 2).double()
    first, second = output.split(8, dim=1)
    torch.testing.assert_close(torch.cov(first.T), torch.eye(8, dtype=torch.float64), rtol=0, atol=0.02)
    torch.testing.assert_close(first - first.mean(0), -(second - second.mean(0)), rtol=0, atol=1e-5)
    assert not network.white.weight.requires_grad
    assert network.features(x).shape == (50, network.config.features)
    assert network(x).shape == (50, 10)


def test_digit_features_separate_unseen_digits() -> None:
    """The nearest neighbour of an unseen digit in feature space mostly has the same label."""
    pytest.importorskip("sklearn")
    dataset = digits_as_mnist("train", 600)
    features = evaluation.load_extractor("digits28")(dataset.batch(range(600)))
    nearest = torch.cdist(features, features).fill_diagonal_(torch.inf).argmin(1).numpy()
    assert (dataset.labels[nearest] == dataset.labels).mean() > 0.85


def test_the_default_extractor_of_a_shape() -> None:
    assert choose((28, 28, 1), "mnist") == "digits28"
    assert choose((28, 28, 1), "fashion_mnist") == "clothing28"
    assert choose((32, 32, 3), "cifar10") == "colour32"
    with pytest.raises(DdimError, match=r"^extractor: .*\b64x64x3\b"):
        choose((64, 64, 3), "photos")


def test_extractors_from_files_match_the_module(tmp_path: Path) -> None:
    images, expected = random_images(20), small()
    script = from_file(save_script(tmp_path / "script.pt"))
    assert torch.allclose(script(images), expected(images), atol=1e-6)
    program = torch.export.export(Small().eval(), (torch.zeros(64, 1, 8, 8),))
    torch.export.save(program, tmp_path / "program.pt2")
    exported = from_file(tmp_path / "program.pt2")
    assert torch.allclose(exported(images), expected(images), atol=1e-6)
    assert (script.name, script.metric) == ("script", "FD(script)")
    assert script.sha256 == sha256(tmp_path / "script.pt")


def test_invalid_extractors_are_errors(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"nothing")
    (tmp_path / "x.pt2").write_bytes(b"nothing")
    for name in ("x.pt", "x.pt2"):
        with pytest.raises(DdimError):
            extractors.load(str(tmp_path / name))
    with pytest.raises(DdimError, match=r"^extractor incepshun: "):
        extractors.load("incepshun")
    with pytest.raises(DdimError, match=r"^extractor digits28: .*\b28x28x1\b"):
        extractors.load("digits28")(random_images(3))
    with pytest.raises(DdimError, match="uint8"):
        small()(np.zeros((2, 8, 8, 1), np.float32))
    with pytest.raises(DdimError, match=r"^extractor digits28: "):
        from_module(Small(), "digits28")
    with pytest.raises(DdimError, match=r"^extractor inception: "):
        from_module(Small(), INCEPTION)

    for name in ("inception", "digits28"):
        save_script(tmp_path / f"{name}.pt")
        with pytest.raises(DdimError, match=r"^extractor"):
            extractors.load(str(tmp_path / f"{name}.pt"))

    class Flat(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum() * torch.ones(3)

    for module, word in ((nn.Conv2d(3, 4, 3), r"^extractor: "), (Flat(), r"^extractor wrong: ")):
        with pytest.raises(DdimError, match=word):
            from_module(module, "wrong")(random_images(3))
    with pytest.raises(DdimError, match=r"^extractor nan: "):
        from_module(nn.Sequential(Small(), nn.Hardtanh(float("nan"), float("nan"))), "nan")(random_images(3))


def blank() -> Any:
    """torch-fidelity's network with random weights from numpy's Philox in place of its own."""
    fidelity.need("Inception")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            return

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    network = Blank("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing)
    for number, (key, value) in enumerate(network.state_dict().items()):
        if value.is_floating_point():
            drawn = torch.from_numpy(rng.normal(7, number, 0, tuple(value.shape)))
            if value.ndim > 1:
                drawn *= (2 / value[0].numel()) ** 0.5
            elif key.endswith(("running_var", "bn.weight")):
                drawn = 1 + 0.1 * drawn.abs()
            else:
                drawn *= 0.1
            value.copy_(drawn)
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(dict(blank().state_dict()), path)
    return path


RECORDED = json.loads((Path(__file__).parent / "inception.json").read_bytes())


def test_inception_matches_torch_fidelity_and_recorded_features(weights: Path) -> None:
    """Parity with the installed library, and with features recorded with torch-fidelity 0.4.0."""
    extractor = inception(weights, expected=sha256(weights), batch=2)
    images = random_images(2, 32, 3, seed=1)
    features = extractor(images)
    assert features.shape == (2, 2048)
    library = blank()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))[0]
    assert torch.allclose(features, library, rtol=1e-4, atol=1e-5)
    recorded = torch.tensor(RECORDED["features"])
    assert torch.allclose(features[:, RECORDED["places"]], recorded, rtol=1e-3, atol=1e-4)
    grey = images[..., :1]
    assert torch.equal(extractor(grey), extractor(grey.repeat(3, axis=3)))


def test_only_the_standard_weights_are_named_fid(weights: Path) -> None:
    extractor = inception(weights, expected=sha256(weights))
    assert extractor.metric == f"FD(inception-{sha256(weights)[:8]})"
    assert evaluation.Extractor(INCEPTION, INCEPTION_SHA256, lambda x: torch.zeros(1)).metric == "FID"
    assert evaluation.Extractor(INCEPTION, "0" * 64, lambda x: torch.zeros(1)).metric != "FID"
    with pytest.raises(DdimError, match=r"weights\.pth: .*\bSHA-256\b"):
        inception(weights)


def test_invalid_weights_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DdimError, match=r"nowhere\.pth: "):
        inception(tmp_path / "nowhere.pth")
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": torch.zeros(3)}, path)
    with pytest.raises(DdimError, match=r"weights\.pth: "):
        inception(path, expected=sha256(path))


def test_pickled_code_in_weights_is_not_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": Trap()}, path)
    with pytest.raises(DdimError, match=r"weights\.pth: "):
        inception(path, expected=sha256(path))
    assert not (tmp_path / "executed").exists()


def test_a_failed_download_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(DdimError, match=r"^Inception's weights: .*--inception-weights\b"):
        inception()


def test_missing_torch_fidelity_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "installed", lambda: False)
    with pytest.raises(DdimError, match=r"^Inception: .*'ddim\[eval\]'"):
        evaluation.load_extractor(INCEPTION)
    features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DdimError, match="KID"):
        fidelity.kid(features, features)
