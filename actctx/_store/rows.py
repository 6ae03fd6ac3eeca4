"""The rows of a data set on disk, read into tensors."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from actctx._errors import DataError, OptionError
from actctx._files import reason_of
from actctx._store.layout import DIGEST, Layout, StoredSite, as_tensor, open_lance, unreadable
from actctx._store.where import as_lance_reads, why_refused
from actctx._text import dtype_name

StoredBatch: TypeAlias = dict[str, Any]
"""A tensor for each column, or a list where it holds no numbers, or nulls among integers."""

_READ_BYTES = 2**23  # at once; more is slower, since its memory is new each time
_SAMPLED = 256  # rows, to tell what strings take
_OBJECT_BYTES = 64  # of a string beside its characters, and of any other object


@dataclass
class StoredRows:
    """Some columns of some rows.

    Attributes:
        path: Where the data set is.
        version: Which of its versions is read, whatever is appended later.
        sites: The sites to read, by name.
        others: The other columns to read, and their dtypes; None for what is read into a list.
        matching: The rows that are there, where they are not all.

    """

    path: str
    version: int | None = None
    sites: Mapping[str, StoredSite] = field(default_factory=dict)
    others: Mapping[str, torch.dtype | None] = field(default_factory=dict)
    matching: Int64[np.ndarray, "row"] | None = None
    _opened: tuple[int, Any] | None = field(default=None, repr=False)

    @property
    def lance(self) -> Any:
        """The Lance dataset, opened when it is first needed, in each process anew.

        Raises:
            OptionError: The process was forked from one that had opened it.

        """
        if self._opened is None:
            self._opened = (os.getpid(), open_lance(self.path, self.version))
        opened_in, lance = self._opened
        if opened_in != os.getpid():
            raise OptionError(
                f"{self.path!r} cannot be read in a process that was forked, since Lance's threads "
                "do not survive a fork; start workers another way: DataLoader(..., "
                "multiprocessing_context='spawn')"
            )
        return lance

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __len__(self) -> int:
        rows: int = self.lance.count_rows() if self.matching is None else len(self.matching)
        return rows

    @property
    def nbytes(self) -> int:
        """The bytes of a row's activations and numbers."""
        numbers = sum(dtype.itemsize for dtype in self.others.values() if dtype is not None)
        return numbers + sum(site.nbytes for site in self.sites.values())

    @cached_property
    def memory(self) -> int:
        """The bytes that a row takes in memory; what lists hold is estimated by a sample.

        The sample is the same in every process, as is the estimate, so that what depends on it
        is as well.
        """
        names = [name for name, dtype in self.others.items() if dtype is None]
        if not names or not len(self):
            return self.nbytes
        rows = np.random.default_rng(0).integers(len(self), size=_SAMPLED)
        if self.matching is not None:
            rows = self.matching[rows]
        table = self._take(np.unique(rows), names)
        held = sum(_held(value) for name in names for value in table[name].to_pylist())
        return self.nbytes + held // len(table)

    def find(self, where: str, sites: Mapping[str, StoredSite]) -> None:
        """Keep the rows that a condition holds of.

        Args:
            where: The condition.
            sites: The sites that it may name, which are all that there are.

        Raises:
            OptionError: It is not a condition that Lance understands.

        """
        condition = as_lance_reads(where, sites, self.others)
        try:
            scanned = self.lance.scanner(columns=["_rowoffset"], filter=condition)
            found = scanned.to_table()["_rowoffset"].to_numpy()
        except (ValueError, OSError, RuntimeError) as error:  # the last where Lance panics
            if "LanceError(IO)" in str(error):
                raise unreadable(self.path, error) from error
            reason = why_refused(reason_of(error), sites, self.others)
            raise OptionError(f"where={where!r} is not a condition on rows: {reason}") from None
        self.matching = np.sort(found.astype(np.int64))

    def empty(self, rows: int) -> StoredBatch:
        """Make room for rows."""
        batch: StoredBatch = {
            name: np.empty(rows, dtype=object) if dtype is None else torch.empty(rows, dtype=dtype)
            for name, dtype in self.others.items()
        }
        for name, site in self.sites.items():
            batch[name] = torch.empty((rows, *site.shape), dtype=site.torch_dtype)
        return batch

    def read(self, rows: range | Int64[np.ndarray, "row"]) -> StoredBatch:
        """Read rows in any order, also several times, with little more memory than they take.

        That is a few megabytes, and where the rows are no range, 8 bytes for each to sort them.
        """
        batch = self.empty(len(rows))
        for place, some in _ascending(rows, self.at_once):
            self.read_into(batch, some, place=place)
        return {
            name: values if isinstance(values, Tensor) else values.tolist()
            for name, values in batch.items()
        }

    @property
    def at_once(self) -> int:
        """The number of rows that are read fastest."""
        return max(64, min(_READ_BYTES // max(self.memory, 1), 65536))

    def read_into(
        self,
        batch: StoredBatch,
        rows: Int64[np.ndarray, "row"],
        *,
        place: slice | Int64[np.ndarray, "row"],
    ) -> None:
        """Read rows, in ascending order, to a place in a batch."""
        if self.matching is not None:
            rows = self.matching[rows]
        once, back = np.unique(rows, return_inverse=True)
        columns = [*self.others, *{site.column: None for site in self.sites.values()}]
        table = self._take(once, columns)
        repeated = None if len(once) == len(rows) else back
        for name, dtype in self.others.items():
            values = self._numbers(table, name, dtype) if dtype else _objects(table[name])
            _put(batch[name], place, values if repeated is None else values[repeated])
        for name, site in self.sites.items():
            tensor = as_tensor(table[site.column], site)
            _put(batch[name], place, tensor if repeated is None else tensor[repeated])

    def _take(self, rows: Int64[np.ndarray, "row"], columns: list[str]) -> Any:
        lance = self.lance
        try:
            return lance.take(rows, columns=columns)
        except (ValueError, OSError) as error:
            raise unreadable(self.path, error) from error

    def _numbers(self, table: Any, name: str, dtype: torch.dtype) -> Tensor:
        if table[name].null_count and not dtype.is_floating_point:
            raise DataError(
                f"the column {name!r} of {self.path!r} has nulls, which no {dtype_name(dtype)} is; "
                "fill them, with -1 for one, or drop the column"
            )
        values = table[name].to_numpy()
        if dtype == torch.int64:  # also of what has fewer bits, and no sign
            return torch.from_numpy(values.astype(np.int64))
        return torch.from_numpy(values.copy())


def _put(memory: Any, place: slice | Int64[np.ndarray, "row"], values: Any) -> None:
    """Write rows to their places: to scattered ones by NumPy, which is faster than torch."""
    if isinstance(place, slice) or not isinstance(memory, Tensor) or memory.dtype != values.dtype:
        memory[place] = values
        return
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[memory.itemsize]
    memory.view(bits).numpy()[place] = values.view(bits).numpy()


def _ascending(
    rows: range | Int64[np.ndarray, "row"], at_once: int
) -> Iterator[tuple[slice | Int64[np.ndarray, "row"], Int64[np.ndarray, "row"]]]:
    """Give some rows at a time, in ascending order, and their places."""
    if not isinstance(rows, range):
        order = np.argsort(rows, kind="stable")
        for start in range(0, len(rows), at_once):
            place = order[start : start + at_once]
            yield place, rows[place]
        return
    for start in range(0, len(rows), at_once):
        end = min(start + at_once, len(rows))
        some = rows[start:end]
        numbers = np.arange(some.start, some.stop, some.step)
        if some.step > 0:
            yield slice(start, end), numbers
        else:
            yield np.arange(start, end)[::-1].copy(), numbers[::-1]


def dtypes_of(lance: Any, layout: Layout) -> dict[str, torch.dtype | None]:
    """Tell the dtypes of the columns that are no sites; None for what is read into a list.

    Lists are what holds no numbers, or more than torch reckons with, as uint64 does. So are
    integers and booleans with nulls, which only somebody else's columns have: these are looked at.
    """
    sites = {site.column for site in layout.sites}
    fields = {each.name: each for each in lance.schema if each.name not in {*sites, DIGEST}}
    found = {name: _dtype_of(each.type) for name, each in fields.items()}
    exact = {
        name
        for name in layout.unlisted(lance.schema)
        if fields[name].nullable and (dtype := found[name]) and not dtype.is_floating_point
    }
    return {**found, **dict.fromkeys(_with_nulls(lance, exact))}


def _dtype_of(kind: Any) -> torch.dtype | None:
    import pyarrow as pa

    types = pa.types
    if types.is_uint64(kind):
        return None
    if types.is_uint16(kind) or types.is_uint32(kind):  # for which torch has no operations
        return torch.int64
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        return None
    return torch.from_numpy(np.empty(0, dtype=kind.to_pandas_dtype())).dtype


def _with_nulls(lance: Any, names: set[str]) -> set[str]:
    """Find out which columns have nulls; each is read until the first."""
    found = set()
    for name in names:
        batches = lance.scanner(columns=[name]).to_batches()
        if any(batch.column(0).null_count for batch in batches):
            found.add(name)
    return found


def _objects(column: Any) -> np.ndarray:
    # One by one, since NumPy would make an axis of lists.
    return np.fromiter(column.to_pylist(), dtype=object, count=len(column))


def _held(value: object) -> int:
    """Estimate the bytes that an object takes, with every version of Python alike."""
    if isinstance(value, str):
        return _OBJECT_BYTES + len(value) * (1 if value.isascii() else 4)
    if isinstance(value, list):
        return _OBJECT_BYTES + sum(map(_held, value))
    if isinstance(value, dict):
        return _OBJECT_BYTES + sum(_held(key) + _held(each) for key, each in value.items())
    return _OBJECT_BYTES
