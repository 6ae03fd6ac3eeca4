"""Batches of a data set for training: read ahead in threads, in the order of an epoch."""

import operator
import reprlib
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from actctx._errors import OptionError
from actctx._select.own import device_of
from actctx._store.indexing import is_int
from actctx._store.mixing import Mixing, mixing_of
from actctx._store.pool_memory import PoolMemory, begun
from actctx._store.rows import StoredBatch, StoredRows
from actctx._store.shuffle import Order

_AHEAD = 2  # batches that are ready before they are asked for
_SPARE = 2  # batches that are read while the last of a pool are given
_SCHEME = 2  # of the order; the first one had pools that were too small


@dataclass
class _Place:
    """The position of an iteration: how many batches of an epoch it gave."""

    epoch: int = 0
    batch: int = 0
    is_loaded: bool = False


class Loader(IterableDataset[StoredBatch]):
    """Batches of a data set, in another random order each epoch; made by `data.loader(...)`.

    Each iteration is an epoch. What was read ahead is dropped when an iteration ends early, and
    the next one begins the next epoch. Iterations are independent of each other; `epoch` and
    `state_dict` are those of the last one that was begun.

    It is an iterable dataset of torch, so `DataLoader(loader, batch_size=None)` gives the same
    batches. Workers of a `DataLoader` are refused: the loader has threads of its own.
    """

    def __init__(
        self, source: StoredRows, order: Order, *, workers: int, device: torch.device | str | None
    ) -> None:
        self._source = source
        self._order = order
        self._workers = workers
        self._device = device_of(device)
        self._place = _Place()

    @property
    def epoch(self) -> int:
        """The number of the epoch, from 0; it is the next one once an iteration has ended."""
        return self._place.epoch

    @property
    def mixing(self) -> Mixing:
        """How well the batches of this epoch are mixed, and the memory that it takes.

        Reads the sequences of some 32,000 rows.

        Example:
            >>> mixing = data.loader(8).mixing
            >>> mixing.pool  # which is all rows, and so a permutation
            28

        """
        order = replace(self._order, epoch=self.epoch)
        return mixing_of(self._source, order, memory=self.memory)

    @property
    def memory(self) -> int:
        """The bytes of all rows that an iteration holds at most, the batch in use included.

        Reading needs up to 100 MiB more.
        """
        batches = self._ahead + 2  # one more is being copied
        held = self._room + batches * min(self._order.batch_size, self._order.pool_rows)
        return held * self._source.row_memory

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        return len(self._order)

    def __iter__(self) -> Iterator[StoredBatch]:
        worker = get_worker_info()
        if worker is not None:
            raise OptionError(
                f"a loader cannot be shared by {worker.num_workers} workers of a DataLoader, each "
                "of which would yield all batches; it reads ahead in threads, so give "
                "DataLoader(loader, batch_size=None, num_workers=0), or iterate over it"
            )
        place = self._place
        left_early = place.batch and not place.is_loaded
        place = _Place(place.epoch + 1) if left_early else _Place(place.epoch, place.batch)
        self._place = place
        return self._iterate(place)

    def _iterate(self, place: _Place) -> Iterator[StoredBatch]:
        order = replace(self._order, epoch=place.epoch)
        with ExitStack() as stack:
            for batch in self._batches(order, place.batch, stack):
                place.batch += 1
                yield self._moved(batch)
        place.epoch, place.batch = place.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader is: at the batch after the last one that was given.

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
        return {**self._identity(), "epoch": self.epoch, "batch": self._place.batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume another loader, at the batch after the last one that it gave.

        The next iteration gives the rest of the epoch: an empty pass if the last batch had been
        given.

        Args:
            state: What its `state_dict()` returned. Device and workers may differ. All ranks may
                be given the state of one, if it is of a time when each had given as many batches,
                or all that it has of the epoch.

        Raises:
            OptionError: It is not such a state, has no such batch, or is of another order.

        """
        self._check_scheme(state)
        for name, here in self._identity().items():
            if state[name] != here:
                was, now = state[name], here
                if name == "pool":  # which counts batches, but users give rows
                    was, now = (each * self._order.batch_size for each in (was, now))
                raise OptionError(
                    f"the state is of a loader with {name}={was!r}, but this one has "
                    f"{name}={now!r}, which gives another order; create the loader with the same "
                    "arguments"
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
        epoch, batch = operator.index(state["epoch"]), operator.index(state["batch"])
        self._place = _Place(epoch, batch, is_loaded=True)

    def _check_scheme(self, state: Any) -> None:
        """Refuse what is not a state, or is of another way to shuffle."""
        names = self.state_dict().keys() - {"scheme"}
        if not (
            isinstance(state, Mapping)
            and state.keys() >= names
            and all(is_int(state[name]) for name in ("epoch", "batch"))
        ):
            raise OptionError(
                f"{reprlib.repr(state)} is not a state of a loader; give what state_dict() returned"
            )
        scheme = state.get("scheme", 1)
        if scheme != _SCHEME:
            then = operator.index(state["epoch"]) + 1
            raise OptionError(
                f"the state is of {'an earlier' if scheme == 1 else 'another'} version of actctx, "
                "which shuffled differently, so its epoch cannot be resumed; start the next one: "
                f"loader.load_state_dict({{**loader.state_dict(), 'epoch': {then}}})"
            )

    def _identity(self) -> dict[str, Any]:
        """Return what the order depends on, except the rank."""
        names = (each.name for each in fields(self._order) if each.name not in {"rank", "epoch"})
        return {"scheme": _SCHEME, **{name: getattr(self._order, name) for name in names}}

    def _batches(self, order: Order, first: int, stack: ExitStack) -> Iterator[StoredBatch]:
        """Copy batches out of the memory that their pools are read to, some ahead."""
        memory = PoolMemory(
            self._source,
            order.pools(first),
            room=self._room,
            threads=_threads(stack, self._workers),
        )
        copier = _threads(stack, min(self._workers, 1))
        copies: deque[tuple[Future[StoredBatch], np.ndarray]] = deque()

        def copied() -> StoredBatch:
            copy, slots = copies.popleft()
            batch = copy.result()
            memory.release(slots)
            return batch

        for slots in memory.slots():
            copies.append((begun(copier, partial(memory.copy, slots, pin=self._pins)), slots))
            if len(copies) > self._ahead:
                yield copied()
        while copies:
            yield copied()

    @property
    def _ahead(self) -> int:
        return _AHEAD if self._workers else 0

    @property
    def _room(self) -> int:
        """The rows that pools are read to: one, and some of the next while its last are given."""
        order, rows = self._order, self._order.pool_rows
        if order.pool_count <= 1 or not self._workers:
            return rows
        return rows + (_AHEAD + _SPARE) * order.batch_size + min(self._source.at_once, rows)

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
