from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddim.data import ImagePolicy, digits_as_mnist, load
from ddim.errors import DdimError

pytestmark = pytest.mark.filterwarnings("ignore:.* (cropped|resized) to:ddim.DdimWarning")  # expected here


def test_digits_equal_those_of_scikit_learn() -> None:
    original = pytest.importorskip("sklearn.datasets").load_digits()
    train, test = load("digits"), load("digits", split="test")
    assert (len(train), len(test), train.policy.shape) == (1500, 297, (8, 8, 1))
    both = np.concatenate([train.batch(range(1500)), test.batch(range(297))])[..., 0]
    assert np.array_equal(np.rint(both * (16 / 255)), original.images)
    assert (both.min(), both.max()) == (0, 255)
    assert np.array_equal(np.concatenate([train.labels, test.labels]), original.target)
    assert train.classes == tuple("0123456789")
    assert len(load("digits", limit=7)) == len(load("digits", limit=7).labels) == 7
    with pytest.raises(DdimError, match=r"^digits: "):
        load("digits", split="validation")


def test_digits_at_another_resolution_correlate_with_the_original() -> None:
    pytest.importorskip("sklearn")
    small = load("digits").batch(range(200)).astype(float)
    large = load("digits", ImagePolicy(height=32, width=32, channels=3)).batch(range(200))
    assert large.shape == (200, 32, 32, 3)
    pooled = large[..., 0].reshape(200, 8, 4, 8, 4).mean(axis=(2, 4))
    assert np.corrcoef(pooled.ravel(), small.ravel())[0, 1] > 0.98


def test_digits_as_mnist_have_a_black_border() -> None:
    pytest.importorskip("sklearn")
    images = digits_as_mnist()
    pixels = images.batch(range(len(images)))
    assert pixels.shape == (1500, 28, 28, 1)
    inner = pixels[:, 4:24, 4:24].copy()
    pixels[:, 4:24, 4:24] = 0
    assert pixels.max() == 0
    assert inner[:, 0].max() > 0
    assert images.fingerprint() != load("digits").fingerprint()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "means", "shape"),
    [("mnist", [0.1307], (28, 28, 1)), ("fashion_mnist", [0.2860], (28, 28, 1))],
)
def test_pixel_means_equal_the_published_ones(
    library: Any, shared: Path, name: str, means: list[float], shape: tuple[int, ...]
) -> None:
    images = load(shared / name)
    assert (len(images), images.policy.shape, len(images.classes)) == (60000, shape, 10)
    assert np.bincount(images.labels).min() > 5000
    total = sum(part.astype(np.int64).sum(axis=(0, 1, 2)) for part in images.slices(10000))
    assert np.allclose(total / (60000 * 28 * 28 * 255), means, atol=1e-4)


def test_cifar10_and_celeba_load(library: Any, shared: Path) -> None:
    cifar = load(shared / "cifar10", split="test")
    assert (len(cifar), cifar.policy.shape, cifar.classes[0]) == (10000, (32, 32, 3), "airplane")
    faces = ImagePolicy(height=64, width=64, channels=3, box=(10, 25, 80, 95))
    celeba = load(shared / "celeba_10k", faces, split="test", limit=100)
    assert (celeba.batch(range(100)).shape, celeba.labels) == ((100, 64, 64, 3), None)
