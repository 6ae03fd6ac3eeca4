"""Read pools into one memory, the next one as batches of the last leave room."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from actctx._store.rows import StoredBatch, StoredRows
from actctx._store.shuffle import Pool
from actctx._store.texts import TextCache

T = TypeVar("T")


def begun(threads: ThreadPoolExecutor | None, task: Callable[[], T]) -> Future[T]:
    """Begin a task in a thread, or where there are none, do it."""
    if threads is not None:
        return threads.submit(task)
    future: Future[T] = Future()
    future.set_result(task())
    return future


@dataclass
class _PoolRead:
    """A pool that is being read.

    Attributes:
        pool: What is read.
        slots: Where in the memory each of its rows lies, as far as they are being read.
        rows: How many are being read.
        reads: The reads to wait for.
        texts: The texts that were read for it, which its rows share.

    """

    pool: Pool
    slots: Int64[np.ndarray, "row"]
    rows: int = 0
    reads: list[Future[None]] = field(default_factory=list)
    texts: TextCache = field(default_factory=dict)


class PoolMemory:
    """The rows of one pool, and those of the next as far as there is room for them.

    Not to be used by two threads at once; it reads in threads of its own.

    Args:
        source: What is read.
        pools: The pools, in their order.
        room: The rows that are in memory: the largest pool, and besides what is given but not yet
            released.
        threads: What reads ahead; with None each pool is read when its first batch is asked for.

    """

    def __init__(
        self,
        source: StoredRows,
        pools: Iterator[Pool],
        *,
        room: int,
        threads: ThreadPoolExecutor | None,
    ) -> None:
        self._source = source
        self._threads = threads
        self._pools = pools
        self._planned = begun(threads, partial(next, pools, None))
        self._readings: deque[_PoolRead] = deque()
        self._memory = source.empty(room)
        self._free = np.arange(room)  # of these, the first ones
        self._free_count = room

    def slots(self) -> Iterator[Int64[np.ndarray, "row"]]:
        """Yield the slots of each batch, once its pool is read."""
        while reading := self._first():
            for read in reading.reads:
                read.result()
            self._readings.popleft()
            for batch in reading.pool.batches:
                yield reading.slots[batch]

    def copy(self, slots: Int64[np.ndarray, "row"], *, pin: bool) -> StoredBatch:
        """Copy the rows of a batch; may be called in any thread, as long as it has the slots."""
        return {name: _picked(values, slots, pin=pin) for name, values in self._memory.items()}

    def release(self, slots: Int64[np.ndarray, "row"]) -> None:
        """Let other rows take the place of a batch that was copied."""
        self._free[self._free_count : self._free_count + len(slots)] = slots
        self._free_count += len(slots)
        if self._threads is not None:
            self._read_ahead()

    def _first(self) -> _PoolRead | None:
        """Begin to read the rest of the first pool that is left, if there is one."""
        if not self._readings and not self._plan():
            return None
        first = self._readings[0]
        while first.rows < len(first.pool.rows):
            self._read_some(first)
        return first

    def _plan(self) -> bool:
        """Take the next pool, and have the one after it worked out."""
        pool = self._planned.result()
        if pool is None:
            return False
        self._readings.append(_PoolRead(pool, np.empty_like(pool.rows)))
        self._planned = begun(self._threads, partial(next, self._pools, None))
        return True

    def _read_ahead(self) -> None:
        """Begin to read what there is room for."""
        while True:
            last = self._readings[-1] if self._readings else None
            if last is None or last.rows == len(last.pool.rows):
                if not self._planned.done() or not self._plan():
                    return
            elif self._size(last) > self._free_count:
                return
            else:
                self._read_some(last)

    def _size(self, reading: _PoolRead) -> int:
        return min(self._source.at_once, len(reading.pool.rows) - reading.rows)

    def _read_some(self, reading: _PoolRead) -> None:
        size = self._size(reading)
        some = slice(reading.rows, reading.rows + size)
        self._free_count -= size
        slots = np.sort(self._free[self._free_count : self._free_count + size])
        reading.slots[some] = slots
        reading.rows += size
        read = partial(
            self._source.read_into,
            self._memory,
            reading.pool.rows[some],
            place=slots,
            known=reading.texts,
        )
        reading.reads.append(begun(self._threads, read))


def _picked(values: Any, slots: Int64[np.ndarray, "row"], *, pin: bool) -> Any:
    if not isinstance(values, Tensor):
        return values[slots].tolist()
    picked = values.new_empty((len(slots), *values.shape[1:]), pin_memory=pin)
    return torch.index_select(values, 0, torch.from_numpy(slots), out=picked)
