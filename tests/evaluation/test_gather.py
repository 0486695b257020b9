"""Features are gathered of exactly the pictures asked for, and interruptions change nothing."""

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
from evaluation.kit import maker, random_pictures, small

PICTURES = random_pictures(300)


def same(a: FeatureStats, b: FeatureStats) -> bool:
    tensors = [(x.moments.mean, x.moments.scatter, x.features, torch.from_numpy(x.images)) for x in (a, b)]
    return a.count == b.count and all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


@pytest.mark.parametrize("block", [1, 8, 64, 100, 300])
@pytest.mark.parametrize("n", [2, 63, 64, 65, 128, 200])
def test_what_comes_out_does_not_depend_on_how_pictures_come_in(block: int, n: int) -> None:
    space = small()
    made = gather(maker(PICTURES, block), n, space)
    assert same(made, gather(maker(PICTURES, 7), n, space))
    assert made.count == n
    assert np.array_equal(made.images, PICTURES[:n])
    straight = of(space(PICTURES[:n]))
    assert torch.allclose(made.moments.covariance, straight.covariance, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("n", "stop"), [(128, 0), (128, 1), (128, 2), (200, 1), (200, 2), (200, 3), (200, 4)])
def test_stopped_anywhere_it_goes_on_with_the_same_end(tmp_path: Path, n: int, stop: int) -> None:
    whole = gather(maker(PICTURES, 10), n, small())
    asked: list[range] = []

    def make(some: range) -> Any:
        asked.append(some)
        return maker(PICTURES, 10)(some)

    steps = iter_gather(make, n, small(), tmp_path / "cell", {"seed": 0})
    for _ in range(stop + 1):
        next(steps)
    steps.close()
    assert same(drain(iter_gather(make, n, small(), tmp_path / "cell", {"seed": 0})), whole)
    assert same(drain(iter_gather(make, n, small(), tmp_path / "cell", {"seed": 0})), whole)  # there is nothing to do
    done = min(stop * CHUNK, n)
    assert asked == [range(n), *([range(done, n)] if done < n else [])][: len(asked)]


@pytest.mark.parametrize("moment", range(5))
def test_killed_between_two_writings_it_goes_on_with_the_same_end(tmp_path: Path, moment: int) -> None:
    """What a kill leaves is the file as it was last written."""
    steps = iter_gather(maker(PICTURES, 10), 290, small(), tmp_path / "cell", every=0.0)
    for _ in range(moment + 1):
        next(steps)
    left = tmp_path / "left"
    if (tmp_path / "cell").exists():
        shutil.copy(tmp_path / "cell", left)
    again = drain(iter_gather(maker(PICTURES, 64), 290, small(), left))
    assert same(again, gather(maker(PICTURES, 10), 290, small()))


def test_more_and_fewer_of_a_file_are_what_they_would_be_alone(tmp_path: Path) -> None:
    path, make = tmp_path / "cell", maker(PICTURES, 10)
    for n in (100, 230, 230, 64, 37, 290):
        assert same(drain(iter_gather(make, n, small(), path)), gather(make, n, small())), n


def test_fewer_than_there_are_features_of_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP", 50)
    path, make = tmp_path / "cell", maker(PICTURES, 10)
    made = drain(iter_gather(make, 200, small(), path))
    assert (len(made.features), made.count) == (50, 200)
    assert same(drain(iter_gather(make, 40, small(), path)), gather(make, 40, small()))
    with pytest.raises(DdimError, match=r"cell: .*\b200\b"):
        drain(iter_gather(make, 100, small(), path))


@pytest.mark.parametrize("given", [0, 99, 101, 170])
def test_another_number_of_pictures_is_refused(given: int) -> None:
    with pytest.raises(DdimError, match=r"^pictures: .*\b100\b"):
        gather(lambda _: maker(PICTURES, 10)(range(given)), 100, small())


def test_a_file_of_other_pictures_is_refused_and_other_software_is_said(tmp_path: Path) -> None:
    path, make = tmp_path / "cell", maker(PICTURES, 10)
    drain(iter_gather(make, 100, small(), path, {"seed": 0, "software": "a"}))
    with pytest.raises(DdimError, match="cell: "):
        drain(iter_gather(make, 100, small(), path, {"seed": 1, "software": "a"}))
    with pytest.raises(DdimError, match=r"cell: .*\bextractor\b"):
        drain(iter_gather(make, 100, small(7, "other"), path, {"seed": 0, "software": "a"}))
    with pytest.warns(DdimWarning):
        drain(iter_gather(make, 100, small(), path, {"seed": 0, "software": "b"}))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path, make = tmp_path / "cell", maker(PICTURES, 10)
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


@pytest.mark.parametrize("block", [10, 300])
def test_time_is_kept_of_what_was_made(tmp_path: Path, block: int) -> None:
    made = drain(iter_gather(maker(PICTURES, block), 300, small(), tmp_path / "cell"))
    assert made.timed == 300
    assert made.seconds > 0
    assert drain(iter_gather(maker(PICTURES, block), 300, small(), timed=False)).timed == 0
