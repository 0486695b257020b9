"""The paper's published results of section 5: FID of Table 1, T = 1000, and the errors of Table 2."""

from __future__ import annotations

ROWS = ("0", "0.2", "0.5", "1", "hat")
STEPS = (10, 20, 50, 100, 1000)
_TABLE_1 = {
    "CIFAR-10": (
        (13.36, 6.84, 4.67, 4.16, 4.04),
        (14.04, 7.11, 4.77, 4.25, 4.09),
        (16.66, 8.35, 5.25, 4.46, 4.29),
        (41.07, 18.36, 8.01, 5.78, 4.73),
        (367.43, 133.37, 32.72, 9.99, 3.17),
    ),
    "CelebA": (
        (17.33, 13.73, 9.17, 6.53, 3.51),
        (17.66, 14.11, 9.51, 6.79, 3.64),
        (19.86, 16.06, 11.01, 8.09, 4.28),
        (33.12, 26.03, 18.48, 13.93, 5.98),
        (299.71, 183.83, 71.71, 45.20, 3.26),
    ),
}
TABLE_2 = {10: 0.014, 20: 0.0065, 50: 0.0023, 100: 0.0009, 200: 0.0004, 500: 0.0001, 1000: 0.0001}
"""Mean squared error per dimension on CIFAR-10's test set, images in [0, 1]."""


def data_set(name: str) -> str | None:
    """The paper's name of a dataset, or None if the paper has no results for it.

    Args:
        name: Name of the dataset here, such as "cifar10" or "uoft-cs/cifar10".
    """
    plain = name.lower().rpartition("/")[2].replace("-", "").replace("_", "")
    if plain.startswith("cifar10") and not plain.startswith("cifar100"):
        return "CIFAR-10"
    return "CelebA" if plain.startswith("celeba") and not plain.startswith("celebahq") else None


def table_1(name: str) -> dict[tuple[str, int], float]:
    """The published FID of each (row, S) for "CIFAR-10" or "CelebA"."""
    return {
        (row, s): v for row, line in zip(ROWS, _TABLE_1[name], strict=True) for s, v in zip(STEPS, line, strict=True)
    }
