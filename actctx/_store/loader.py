"""Batches of a data set for training: read ahead in threads, in the order of an epoch."""

import operator
import reprlib
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from actctx._errors import OptionError
from actctx._select.own import device_of
from actctx._store.indexing import is_int
from actctx._store.rows import StoredBatch, StoredRows
from actctx._store.shuffle import Order, Pool

_AHEAD = 2  # batches that are ready before they are asked for

T = TypeVar("T")


@dataclass(frozen=True)
class _Filling:
    """A pool, and the memory that its rows are read to."""

    pool: Pool
    memory: StoredBatch

    def fill(self, source: StoredRows, start: int) -> None:
        rows = self.pool.rows[start : start + source.at_once]
        source.read_into(self.memory, rows, place=slice(start, start + len(rows)))

    def gather(self, which: Int64[np.ndarray, "row"], *, pin: bool) -> StoredBatch:
        """Copy the rows of a batch."""
        return {name: _pick(values, which, pin=pin) for name, values in self.memory.items()}


def _pick(values: Any, which: Int64[np.ndarray, "row"], *, pin: bool) -> Any:
    if not isinstance(values, Tensor):
        return values[which].tolist()
    picked = values.new_empty((len(which), *values.shape[1:]), pin_memory=pin)
    return torch.index_select(values, 0, torch.from_numpy(which), out=picked)


class Loader:
    """Batches of a data set, in another random order each epoch; made by `data.loader(...)`.

    Each iteration is an epoch. What was read ahead is dropped when an iteration ends early, and
    the next one begins the next epoch.
    """

    def __init__(
        self, source: StoredRows, order: Order, *, workers: int, device: torch.device | str | None
    ) -> None:
        self._source = source
        self._order = order
        self._workers = workers
        self._device = device_of(device)
        self._batch = 0
        self._resumes = False

    @property
    def epoch(self) -> int:
        """The number of the epoch, from 0; it is the next one once an iteration has ended."""
        return self._order.epoch

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        return len(self._order)

    def __iter__(self) -> Iterator[StoredBatch]:
        if self._batch and not self._resumes:  # an epoch was left early
            self._move_to(self.epoch + 1, 0)
        self._resumes = False
        return self._iterate(self._order, self._batch)

    def _iterate(self, order: Order, first: int) -> Iterator[StoredBatch]:
        with ExitStack() as stack:
            batches = self._batches(order, first, stack)
            for number, batch in enumerate(batches, first + 1):
                self._move_to(order.epoch, number)
                yield self._moved(batch)
        self._move_to(order.epoch + 1, 0)

    def _move_to(self, epoch: int, batch: int) -> None:
        self._order = replace(self._order, epoch=epoch)
        self._batch = batch

    def state_dict(self) -> dict[str, Any]:
        """Tell where the loader is: at the batch after the last one that was given.

        Returns:
            Plain numbers, which `torch.save` or JSON can write.

        Example:
            >>> loader = data.loader(8, seed=0)
            >>> batch = next(iter(loader))
            >>> state = loader.state_dict()
            >>> resumed = data.loader(8, seed=0)
            >>> resumed.load_state_dict(state)
            >>> len([*resumed])
            3

        """
        return {**self._identity(), "epoch": self.epoch, "batch": self._batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another loader was, with the batch after the last that it gave.

        The next iteration gives the rest of the epoch: an empty pass if the last batch had been
        given.

        Args:
            state: What its `state_dict()` returned. Device and workers may differ. All ranks may
                be given the state of one, if it is of a time when each had given as many batches,
                or all that it has of the epoch.

        Raises:
            OptionError: It is no such state, or of no such batch, or the other loader gave another
                order.

        """
        if not (
            isinstance(state, Mapping)
            and state.keys() >= self.state_dict().keys()
            and all(is_int(state[name]) for name in ("epoch", "batch"))
        ):
            raise OptionError(
                f"{reprlib.repr(state)} is no state of a loader; give what state_dict() returned"
            )
        for name, here in self._identity().items():
            if state[name] != here:
                raise OptionError(
                    f"the state is of a loader with {name}={state[name]!r}, but this one has "
                    f"{name}={here!r}, which makes another order; make the loader as it was made"
                )
        for name in ("epoch", "batch"):
            if state[name] < 0:
                raise OptionError(
                    f"the state is of {name}={state[name]}, but they count from 0; give what "
                    "state_dict() returned"
                )
        most = len(replace(self._order, rank=self._order.world_size - 1))  # no rank has more
        if state["batch"] > most:
            raise OptionError(
                f"the state is of batch={state['batch']}, but an epoch has no more than {most}; "
                "give what state_dict() returned"
            )
        self._move_to(operator.index(state["epoch"]), operator.index(state["batch"]))
        self._resumes = True

    def _identity(self) -> dict[str, Any]:
        """What the order depends on, but for the rank."""
        names = (each.name for each in fields(self._order) if each.name not in {"rank", "epoch"})
        return {name: getattr(self._order, name) for name in names}

    def _batches(self, order: Order, first: int, stack: ExitStack) -> Iterator[StoredBatch]:
        filled = self._filled(order, first, stack)
        gathered = (
            partial(filling.gather, which, pin=self._pins)
            for filling in filled
            for which in filling.pool.batches
        )
        return in_order(gathered, _threads(stack, min(self._workers, 1)), ahead=_AHEAD)

    def _filled(self, order: Order, first: int, stack: ExitStack) -> Iterator[_Filling]:
        """Read the pools, the next one while one is in use."""
        at_once = self._source.at_once
        fillings: deque[_Filling] = deque()

        def tasks() -> Iterator[Callable[[], None]]:
            for pool in order.pools(first):
                fillings.append(_Filling(pool, self._source.empty(len(pool.rows))))
                for start in range(0, len(pool.rows), at_once):
                    yield partial(fillings[-1].fill, self._source, start)

        ahead = -(-order.pool * order.batch_size // at_once)
        done = in_order(tasks(), _threads(stack, self._workers), ahead=ahead)
        for _ in done:
            filling = fillings[0]
            for _ in range(at_once, len(filling.pool.rows), at_once):
                next(done)
            yield fillings.popleft()

    def _moved(self, batch: StoredBatch) -> StoredBatch:
        if self._device is None:
            return batch
        return {name: self._move(values) for name, values in batch.items()}

    def _move(self, values: Any) -> Any:
        if not isinstance(values, Tensor):
            return values
        return values.to(self._device, non_blocking=self._pins)

    @property
    def _pins(self) -> bool:
        return self._device is not None and self._device.type == "cuda"


def _threads(stack: ExitStack, count: int) -> ThreadPoolExecutor | None:
    """Start threads that end with the stack, and do not begin what they have not begun."""
    if count == 0:
        return None
    threads = ThreadPoolExecutor(count, thread_name_prefix="actctx-loader")
    stack.callback(_end, threads)
    return threads


def _end(threads: ThreadPoolExecutor) -> None:
    if not sys.is_finalizing():  # then they have ended, and so has what would end them
        threads.shutdown(cancel_futures=True)


def in_order(
    tasks: Iterable[Callable[[], T]], threads: ThreadPoolExecutor | None, *, ahead: int
) -> Iterator[T]:
    """Run tasks in threads, some ahead, and give their results in the order of the tasks."""
    if threads is None:
        for task in tasks:
            yield task()
        return
    begun: deque[Future[T]] = deque()
    for task in tasks:
        begun.append(threads.submit(task))
        if len(begun) > ahead:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()
