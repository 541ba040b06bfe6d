"""A shuffled epoch without a list of indices: a keyed permutation of range(n) in O(1) memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ddptrain.keys import derive

Integers = npt.NDArray[np.uint64]

ROUNDS = 8


def _mix(values: Integers, key: np.uint64) -> Integers:
    """Scramble 64-bit integers under a key (the finaliser of MurmurHash3)."""
    h = values ^ key
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xFF51AFD7ED558CCD)
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xC4CEB9FE1A85EC53)
    h ^= h >> np.uint64(33)
    return h


class Permutation:
    """A bijection of ``range(size)`` chosen by ``key``; calling it maps positions to indices.

    A Feistel network over Z_a × Z_b with a·b just above ``size``; results outside the range are
    sent through again ("cycle walking"), which with a, b ≈ √size happens to about one position in
    √size. Black and Rogaway, *Ciphers with Arbitrary Finite Domains*, CT-RSA 2002.
    """

    def __init__(self, size: int, key: int) -> None:
        if not 0 < size <= 1 << 62:
            raise ValueError(f"a permutation needs 1 to 2^62 elements, got {size}")
        self.size = size
        rows = max(1, round(size**0.5))
        self._rows = np.uint64(rows)
        self._columns = np.uint64(-(-size // rows))
        self._keys = [np.uint64(derive(key, "round", r)) for r in range(2 * ROUNDS)]

    def __call__(self, positions: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Map positions, integers in [0, size), shape (k,), to indices, int64, shape (k,)."""
        values = self._rounds(np.asarray(positions, dtype=np.uint64))
        while (outside := values >= np.uint64(self.size)).any():
            values[outside] = self._rounds(values[outside])
        return values.astype(np.int64)

    def _rounds(self, values: Integers) -> Integers:
        row, column = np.divmod(values, self._columns)
        for key_row, key_column in zip(self._keys[::2], self._keys[1::2], strict=True):
            row = (row + _mix(column, key_row) % self._rows) % self._rows
            column = (column + _mix(row, key_column) % self._columns) % self._columns
        return row * self._columns + column
