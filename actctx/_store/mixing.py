"""Measure how well the batches of a loader are mixed, beside a permutation of all rows."""

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
from jaxtyping import Int64

from actctx._store.rows import StoredRows
from actctx._store.shuffle import BLOCK, LEAST_BATCHES, LEAST_ROWS, Order
from actctx._text import counted, format_bytes

_SEEN = 8192  # rows, at each end of the epoch


@dataclass(frozen=True)
class Mixing:
    """How well the batches of a loader are mixed.

    Measured on some batches at the start of the epoch, and on some at its end, of which the worse
    are given, and on some of a permutation, drawn at random.

    Attributes:
        batch_size: The rows of a batch.
        sequences: From how many sequences the rows of a batch come, on average.
        permuted_sequences: From how many they come in a permutation of all rows.
        neighbours: The share of the rows of a batch with the row before or after them in it.
        permuted_neighbours: The share in a permutation of all rows.
        pool: The most rows that are shuffled among each other.
        memory: The bytes that the loader holds at most, batches included.

    """

    batch_size: int
    sequences: float
    permuted_sequences: float
    neighbours: float
    permuted_neighbours: float
    pool: int
    memory: int

    def __str__(self) -> str:
        return (
            f"a batch of {counted(self.batch_size, 'row')} comes from {self.sequences:,.1f} "
            f"sequences; in a permutation, {self.permuted_sequences:,.1f}\n"
            f"{self.neighbours:.1%} of its rows have a neighbour in it; in a permutation, "
            f"{self.permuted_neighbours:.1%}\n"
            f"{counted(self.pool, 'row')} are shuffled at a time, in {format_bytes(self.memory)}"
        )


def mixing_of(source: StoredRows, order: Order, *, memory: int) -> Mixing:
    """Measure how well the batches of an epoch are mixed; see `Loader.mixing`."""
    if not len(order):
        return Mixing(order.batch_size, 0.0, 0.0, 0.0, 0.0, pool=0, memory=memory)
    full = max(1, len(order) - 1)  # all but the last are
    seen = max(1, _SEEN // order.batch_size)
    some = min(seen, full)
    ends = [list(islice(_batches(order, first), some)) for first in (0, full - some)]
    size = min(order.batch_size, order.rows)
    random = np.random.default_rng(order.seed)
    drawn = [random.choice(order.rows, size, replace=False) for _ in range(seen)]
    numbers = replace(source, sites={}, others={"sequence": source.others["sequence"]})
    found = [(_sequences(numbers, each), _mean(map(neighbours, each))) for each in (*ends, drawn)]
    (first, before), (last, after), (permuted, beside) = found
    return Mixing(
        batch_size=order.batch_size,
        sequences=min(first, last),
        permuted_sequences=permuted,
        neighbours=max(before, after),
        permuted_neighbours=beside,
        pool=order.pool_rows if order.shuffle else 0,
        memory=memory,
    )


def neighbours(rows: Int64[np.ndarray, "row"]) -> float:
    """Return the share of some rows that have the row before or after them among them."""
    follows = np.diff(np.sort(rows)) == 1
    return float(np.mean(np.append(follows, [False]) | np.append([False], follows)))


def _batches(order: Order, first: int) -> Iterator[Int64[np.ndarray, "row"]]:
    for pool in order.pools(first):
        for batch in pool.batches:
            yield pool.rows[batch]


def _sequences(numbers: StoredRows, batches: list[Int64[np.ndarray, "row"]]) -> float:
    found = numbers.read(np.concatenate(batches))["sequence"].numpy()
    cuts = np.cumsum([len(batch) for batch in batches])[:-1]
    return _mean(len(np.unique(batch)) for batch in np.split(found, cuts))


def _mean(values: Iterable[float]) -> float:
    return float(np.mean([*values]))


def warn_of_pool(order: Order, pool: int | None, *, memory: int) -> None:
    """Warn of a pool that mixes little, as somebody bounded it, or that takes much memory."""
    machine = _machine_memory()
    least = max(LEAST_BATCHES * order.batch_size, LEAST_ROWS)
    if machine and memory > machine // 2:
        fewer = least if order.pool_rows > least else order.pool_rows // 2
        warnings.warn(
            f"the loader will hold up to {format_bytes(memory)}, and this machine has "
            f"{format_bytes(machine)} of memory; read fewer sites with sites=, or shuffle fewer "
            f"rows at a time with pool={fewer}",
            stacklevel=3,
        )
    if pool is None or not order.shuffle or order.pool_count <= 1 or pool >= least:
        return
    rows = next(_batches(order, 0))
    warnings.warn(
        f"pool={pool} shuffles {counted(order.pool_rows, 'row')} at a time, out of "
        f"{counted(-(-order.pool_rows // BLOCK), 'block')} of neighbouring rows: "
        f"{neighbours(rows):.0%} of the rows of a batch have a neighbour in it; give "
        f"pool={min(least, order.rows)} "
        "or more, or leave it out",
        stacklevel=3,
    )


def _machine_memory() -> int:
    """Return the bytes of memory of the machine; 0 where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0
