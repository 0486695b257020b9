"""A dataset of images of one resolution, in memory or decoded on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from ddim.data.decode import read_bytes
from ddim.data.parallel_decode import Items, decode_batch
from ddim.data.policy import ImagePolicy

_SAMPLED = 64


class ImageSet:
    """A dataset of images of one resolution, with labels if it has any.

    Attributes:
        name: The dataset's name, without its folder.
        split: The split, such as "train".
        policy: The preprocessing.
        labels: int64, (N,), or None.
        classes: The name of each label, or None.
        label_columns: Other columns of a table that could be labels.

    Args:
        name: The dataset's name.
        split: The split.
        policy: The preprocessing.
        items: The encoded images.
        pixels: uint8, (N, H, W, C), the decoded images in memory; None to decode each batch on demand.
        labels: int64, (N,), or None.
        classes: The name of each label, or None.
        label_columns: Other columns of a table that could be labels.
    """

    def __init__(
        self,
        name: str,
        split: str,
        policy: ImagePolicy,
        items: Items,
        pixels: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        classes: tuple[str, ...] | None = None,
        label_columns: tuple[str, ...] = (),
    ):
        self.name, self.split, self.policy = name, split, policy
        self.labels, self.classes, self.label_columns = labels, classes, label_columns
        self._items, self._pixels = items, pixels
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        height, width, channels = self.policy.shape
        return f"ImageSet({self.name!r}, {self.split!r}: {len(self)} images {height}x{width}x{channels})"

    def batch(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The images at the indices, in their order; an index may occur more than once.

        Args:
            indices: int, (B,), each in 0..N-1.

        Returns:
            uint8, (B, H, W, C), in [0, 255]; a copy.

        Raises:
            IndexError: If an index is not in 0..N-1, or the indices are not integers of shape (B,).
            DdimError: If an image is not in memory and has become unreadable.
        """
        order = np.asarray(indices)
        if order.size == 0:
            order = order.astype(np.int64)
        if order.ndim != 1 or order.dtype.kind not in "iu":
            raise IndexError(f"indices must be integers of shape (B,), not {order.dtype} {order.shape}")
        outside = (order < 0) | (order >= len(self))
        if outside.any():
            raise IndexError(f"image {order[outside][0]} is outside 0..{len(self) - 1}")
        if self._pixels is None:
            return decode_batch(self._items, order, self.policy, self.name)
        images: np.ndarray = self._pixels[order]
        return images

    def slices(self, size: int) -> Iterator[np.ndarray]:
        """Iterate over all images in order, in batches of `size`.

        Args:
            size: Batch size, at least 1; the last batch may be smaller.

        Yields:
            uint8, (size, H, W, C), in [0, 255].
        """
        for start in range(0, len(self), size):
            yield self.batch(np.arange(start, min(start + size, len(self))))

    def names(self, index: int) -> str:
        """The name of image `index`: its path below the folder, or its row.

        Args:
            index: In 0..N-1.

        Returns:
            The name, on one line.
        """
        return self._items.name(index)

    def fingerprint(self) -> str:
        """A hash of the dataset, for provenance and to check that a run is resumed on the same data.

        It covers the name, the split, the policy, the number of images, the labels, and the encoded bytes of up to 64
        images spread over the dataset, but not its location.

        Returns:
            16 hexadecimal digits.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            identity = (self.name, self.split, len(self), self.classes, self.policy.model_dump_json())
            digest.update(repr(identity).encode("utf-8", "backslashreplace"))
            if self.labels is not None:
                digest.update(self.labels.astype("<i8").tobytes())
            for index in np.unique(np.linspace(0, len(self) - 1, _SAMPLED).astype(np.int64)).tolist():
                content = read_bytes(self._items.source(index), self.names(index))
                digest.update(hashlib.sha256(content).digest())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint
