"""The rows that match a condition, in a bit for each row of the data set.

# NOTE [Matching rows]
Which rows match is a bitmap, and beside it stands how many do before each block of 512 rows. Where
the k-th matching row lies is found by a binary search for its block, and by counting in that block.
Together they take 0.14 bytes for each row of the data set, however many of them match.
"""

import numpy as np
from jaxtyping import Int64, UInt8

_BLOCK = 512
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.int64)
_AT_ONCE = 4096  # blocks, which take 2 MiB when each bit is a byte


class Matching:
    """Some rows of a data set, in ascending order.

    Args:
        rows: How many the data set has.

    """

    def __init__(self, rows: int) -> None:
        blocks = -(-rows // _BLOCK)
        self._bits: UInt8[np.ndarray, "block byte"] = np.zeros((blocks, _BLOCK // 8), np.uint8)
        self._before: Int64[np.ndarray, " _"] = np.zeros(blocks + 1, np.int64)

    def add(self, rows: Int64[np.ndarray, " row"]) -> None:
        """Add rows, each of which is added once; call `settle` after the last of them."""
        if not len(rows):
            return
        rows = np.sort(rows)
        byte = rows >> 3
        first = np.concatenate([[0], np.flatnonzero(np.diff(byte)) + 1])
        bit = np.left_shift(1, 7 - (rows & 7)).astype(np.uint8)
        self._bits.reshape(-1)[byte[first]] |= np.bitwise_or.reduceat(bit, first)

    def settle(self) -> None:
        """Count the rows, so that they can be read."""
        for start in range(0, len(self._bits), _AT_ONCE):
            ones = _ONES[self._bits[start : start + _AT_ONCE]].sum(1)
            self._before[start + 1 : start + 1 + len(ones)] = ones
        np.cumsum(self._before, out=self._before)

    def __len__(self) -> int:
        return int(self._before[-1])

    def count(self, rows: Int64[np.ndarray, " _"]) -> Int64[np.ndarray, " _"]:
        """Count how many there are before each of some rows."""
        block, within = np.divmod(rows, _BLOCK)
        found = self._before[block]
        for start in range(0, len(rows), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            bits = np.unpackbits(self._bits[np.minimum(block[some], len(self._bits) - 1)], axis=1)
            is_before = np.arange(_BLOCK) < within[some, None]
            found[some] += (bits & is_before).sum(1, dtype=np.int64)
        return found

    @property
    def nbytes(self) -> int:
        """The bytes that it takes in memory."""
        return self._bits.nbytes + self._before.nbytes

    def __getitem__(self, numbers: Int64[np.ndarray, " row"]) -> Int64[np.ndarray, " row"]:
        """Return which rows the matching ones are that have these numbers, in any order."""
        block = np.searchsorted(self._before, numbers, side="right") - 1
        once, at = np.unique(block, return_inverse=True)
        found = np.empty_like(numbers)
        for start in range(0, len(once), _AT_ONCE):
            (here,) = ((start <= at) & (at < start + _AT_ONCE)).nonzero()
            some = once[start : start + _AT_ONCE]
            (ones,) = np.unpackbits(self._bits[some]).nonzero()  # block by block
            first = np.cumsum(self._before[some + 1] - self._before[some])
            first = np.concatenate([[0], first[:-1]])
            nth = first[at[here] - start] + numbers[here] - self._before[block[here]]
            found[here] = block[here] * _BLOCK + ones[nth] % _BLOCK
        return found
