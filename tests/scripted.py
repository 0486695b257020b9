"""A numpy bit generator that returns prescribed 32-bit words, to test numpy's ziggurat algorithm."""

from __future__ import annotations

import ctypes
import threading

import numpy as np

NEXT32 = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_void_p)
NEXT64 = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)
NEXT_DOUBLE = ctypes.CFUNCTYPE(ctypes.c_double, ctypes.c_void_p)
ACCEPTED = 255 | 1 << 9  # accepted at once, whatever the ziggurat tables are


class _BitGenerator(ctypes.Structure):
    """numpy's C interface `bitgen_t`."""

    _fields_ = (
        ("state", ctypes.c_void_p),
        ("next_uint64", NEXT64),
        ("next_uint32", NEXT32),
        ("next_double", NEXT_DOUBLE),
        ("next_raw", NEXT64),
    )


class Scripted:
    """Returns prescribed words, then words that are accepted at once."""

    def __init__(self) -> None:
        self.words: tuple[int, ...] = ()
        self.used = 0
        self._struct = _BitGenerator(None, NEXT64(lambda _: 0), NEXT32(self._next), NEXT_DOUBLE(lambda _: 0.0))
        self._struct.next_raw = self._struct.next_uint64
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        self.capsule = make(ctypes.addressof(self._struct), b"BitGenerator", None)
        self.lock = threading.Lock()
        self._generator = np.random.Generator(self)  # type: ignore[arg-type]

    def _next(self, _: object) -> int:
        self.used += 1
        return self.words[self.used - 1] if self.used <= len(self.words) else ACCEPTED

    def normal(self, *words: int) -> tuple[np.float32, int]:
        """The normal number computed from these words, and the number of words used."""
        self.words, self.used = words, 0
        return self._generator.standard_normal(dtype=np.float32), self.used
