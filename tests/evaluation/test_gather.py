"""Accumulated features cover exactly the requested images, and interruptions change nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddim._io.safetensors import read_tensors, write_tensors
from ddim.data.parallel_decode import drain
from ddim.errors import DdimError, DdimWarning
from ddim.evaluation import accumulate as module
from ddim.evaluation.accumulate import CHUNK, FeatureStats, gather, iter_gather
from ddim.evaluation.moments import of
from evaluation.kit import maker, random_images, small

IMAGES = random_images(300)


def same(a: FeatureStats, b: FeatureStats) -> bool:
    tensors = [(x.moments.mean, x.moments.scatter, x.features, torch.from_numpy(x.images)) for x in (a, b)]
    return a.count == b.count and all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


@pytest.mark.parametrize("batch", [1, 8, 64, 100, 300])
@pytest.mark.parametrize("n", [2, 63, 64, 65, 128, 200])
def test_statistics_do_not_depend_on_the_batch_size(batch: int, n: int) -> None:
    extractor = small()
    stats = gather(maker(IMAGES, batch), n, extractor)
    assert same(stats, gather(maker(IMAGES, 7), n, extractor))
    assert stats.count == n
    assert np.array_equal(stats.images, IMAGES[:n])
    expected = of(extractor(IMAGES[:n]))
    assert torch.allclose(stats.moments.covariance, expected.covariance, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("n", "stop"), [(128, 0), (128, 1), (128, 2), (200, 1), (200, 2), (200, 3), (200, 4)])
def test_resume_after_a_stop_is_bit_exact(tmp_path: Path, n: int, stop: int) -> None:
    whole = gather(maker(IMAGES, 10), n, small())
    requested: list[range] = []

    def make(indices: range) -> Any:
        requested.append(indices)
        return maker(IMAGES, 10)(indices)

    steps = iter_gather(make, n, small(), tmp_path / "cell", {"seed": 0})
    for _ in range(stop + 1):
        next(steps)
    steps.close()
    assert same(drain(iter_gather(make, n, small(), tmp_path / "cell", {"seed": 0})), whole)
    assert same(drain(iter_gather(make, n, small(), tmp_path / "cell", {"seed": 0})), whole)  # already complete
    done = min(stop * CHUNK, n)
    assert requested == [range(n), *([range(done, n)] if done < n else [])][: len(requested)]


@pytest.mark.parametrize("chunks", range(5))
def test_resume_after_a_kill_is_bit_exact(tmp_path: Path, chunks: int) -> None:
    """A kill leaves the last written file."""
    steps = iter_gather(maker(IMAGES, 10), 290, small(), tmp_path / "cell", every=0.0)
    for _ in range(chunks + 1):
        next(steps)
    path = tmp_path / "left"
    if (tmp_path / "cell").exists():
        shutil.copy(tmp_path / "cell", path)
    again = drain(iter_gather(maker(IMAGES, 64), 290, small(), path))
    assert same(again, gather(maker(IMAGES, 10), 290, small()))


def test_extending_or_shortening_a_file_equals_a_new_computation(tmp_path: Path) -> None:
    path, make = tmp_path / "cell", maker(IMAGES, 10)
    for n in (100, 230, 230, 64, 37, 290):
        assert same(drain(iter_gather(make, n, small(), path)), gather(make, n, small())), n


def test_more_images_than_stored_features_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP", 50)
    path, make = tmp_path / "cell", maker(IMAGES, 10)
    stats = drain(iter_gather(make, 200, small(), path))
    assert (len(stats.features), stats.count) == (50, 200)
    assert same(drain(iter_gather(make, 40, small(), path)), gather(make, 40, small()))
    with pytest.raises(DdimError, match=r"cell: .*\b200\b"):
        drain(iter_gather(make, 100, small(), path))


@pytest.mark.parametrize("count", [0, 99, 101, 170])
def test_a_wrong_number_of_images_is_an_error(count: int) -> None:
    with pytest.raises(DdimError, match=r"^images: .*\b100\b"):
        gather(lambda _: maker(IMAGES, 10)(range(count)), 100, small())


def test_a_file_of_other_images_is_an_error_and_other_software_a_warning(tmp_path: Path) -> None:
    path, make = tmp_path / "cell", maker(IMAGES, 10)
    drain(iter_gather(make, 100, small(), path, {"seed": 0, "software": "a"}))
    with pytest.raises(DdimError, match="cell: "):
        drain(iter_gather(make, 100, small(), path, {"seed": 1, "software": "a"}))
    with pytest.raises(DdimError, match=r"cell: .*\bextractor\b"):
        drain(iter_gather(make, 100, small(7, "other"), path, {"seed": 0, "software": "a"}))
    with pytest.warns(DdimWarning):
        drain(iter_gather(make, 100, small(), path, {"seed": 0, "software": "b"}))


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    path, make = tmp_path / "cell", maker(IMAGES, 10)
    drain(iter_gather(make, 64, small(), path))
    tensors, meta = read_tensors(path)
    for change, word in (({"mean": tensors["mean"] * float("nan")}, "cell: "), ({"features": None}, "cell: ")):
        changed = {key: value for key, value in (tensors | change).items() if value is not None}
        write_tensors(path, changed, meta)
        with pytest.raises(DdimError, match=word):
            drain(iter_gather(make, 64, small(), path))
    path.write_bytes(b"no")
    with pytest.raises(DdimError, match="cell: "):
        drain(iter_gather(make, 64, small(), path))


@pytest.mark.parametrize("batch", [10, 300])
def test_the_sampling_time_is_recorded(tmp_path: Path, batch: int) -> None:
    stats = drain(iter_gather(maker(IMAGES, batch), 300, small(), tmp_path / "cell"))
    assert stats.timed == 300
    assert stats.seconds > 0
    assert drain(iter_gather(maker(IMAGES, batch), 300, small(), timed=False)).timed == 0
