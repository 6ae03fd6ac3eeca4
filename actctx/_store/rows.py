"""The rows of a data set on disk, read into tensors."""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from actctx._errors import DataError, OptionError
from actctx._files import reason_of
from actctx._store.layout import BACK, Layout
from actctx._store.matching import Matching
from actctx._store.site_columns import StoredSite, as_tensor
from actctx._store.texts import TextCache, TextRows, lost, offsets_of_matching, read_texts
from actctx._store.validation import REOPEN, Files, count_rows, reading
from actctx._store.versions import open_lance
from actctx._store.where import as_lance_reads, rows_where, why_refused
from actctx._text import dtype_name, format_bytes, printable

StoredBatch: TypeAlias = dict[str, Any]
"""A tensor for each column, or a list where it holds no numbers, or nulls among integers."""

_READ_BYTES = 2**23  # at once; more is slower, since its memory is new each time
_MOST_AT_ONCE = 65536  # rows
_SAMPLED = 256  # rows, to tell what strings take
_SAMPLED_AT_ONCE = 32
_NEIGHBOURS = 32  # rows that a loader reads together, which mostly have the same texts
_OBJECT_BYTES = 64  # of a string beside its characters, and of any other object


@dataclass
class StoredRows:
    """Some columns of some rows.

    Attributes:
        path: Where the data set is.
        version: Which of its versions is read, whatever is appended later.
        sites: The sites to read, by name.
        others: The other columns to read, and their dtypes; None for what is read into a list.
        texts: Those of the others that are stored once a sequence.
        matching: The rows that are there, where they are not all.

    """

    path: str
    version: int | None = None
    sites: Mapping[str, StoredSite] = field(default_factory=dict)
    others: Mapping[str, torch.dtype | None] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    matching: Matching | None = None
    _opened: tuple[int, Any] | None = field(default=None, repr=False)
    _text_rows: TextRows | None = field(default=None, repr=False)
    _files: Files | None = field(default=None, repr=False)

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

    @property
    def files(self) -> Files:
        """The files of the Lance dataset.

        Raises:
            DataError: They cannot be listed.

        """
        lance = self.lance
        if self._files is None:
            with self._reading():
                self._files = Files(lance, self.path)
        return self._files

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_files": None}

    def __len__(self) -> int:
        if self.matching is not None:
            return len(self.matching)
        with self._reading():
            return count_rows(self.lance)

    @property
    def row_bytes(self) -> int:
        """The bytes of a row's activations and numbers."""
        numbers = sum(dtype.itemsize for dtype in self.others.values() if dtype is not None)
        return numbers + sum(site.nbytes for site in self.sites.values())

    @cached_property
    def row_memory(self) -> int:
        """The bytes that a row takes in memory; for lists, estimated from a sample.

        The sample is the same in every process, as is the estimate, so that what depends on it
        is as well.
        """
        alone, texts, ends = self._sampled
        return self.row_bytes + int(alone + texts * (1 + (_NEIGHBOURS - 1) * ends) / _NEIGHBOURS)

    @cached_property
    def _sampled(self) -> tuple[float, float, float]:
        """Estimate the bytes of a row's own objects, and of its texts, and how many rows end one.

        Texts are those of a sequence; the share is of rows that the next one has other texts than.
        """
        names = [name for name, dtype in self.others.items() if dtype is None]
        if not names or not len(self):
            return 0.0, 0.0, 0.0
        rows = np.unique(np.random.default_rng(0).integers(len(self), size=_SAMPLED))
        alone = texts = ends = 0
        for start in range(0, len(rows), _SAMPLED_AT_ONCE):
            some = rows[start : start + _SAMPLED_AT_ONCE]
            own = [name for name in names if name not in self.texts]
            table = self._table(some, [*own, *self._beside])
            alone += sum(_held(each) for name in own for each in self._objects(table, name))
            if self.texts:
                after = self._table(np.minimum(some + 1, len(self) - 1), ["sequence"])
                ends += int((table["sequence"].to_numpy() != after["sequence"].to_numpy()).sum())
                found = self._texts_of(self._on_disk(some), table, {})
                texts += sum(_held(each) for values in found.values() for each in values)
        return alone / len(rows), texts / len(rows), ends / len(rows)

    def _table(self, rows: Int64[np.ndarray, "row"], columns: list[str]) -> Any:
        return self._take(self._on_disk(rows), columns)

    def _on_disk(self, rows: Int64[np.ndarray, "row"]) -> Int64[np.ndarray, "row"]:
        return rows if self.matching is None else self.matching[rows]

    @property
    def _beside(self) -> list[str]:
        """The columns that tell where the texts of a row are."""
        return ["sequence", BACK] if self.texts else []

    def _texts_of(
        self, rows: Int64[np.ndarray, "row"], table: Any, known: TextCache
    ) -> dict[str, np.ndarray]:
        """Read the texts of rows, of which a table tells where they are."""
        if table[BACK].null_count or table["sequence"].null_count:
            raise lost(self.path)
        if self._text_rows is None:
            self._text_rows = TextRows(self.files, self.lance, self.path)
        return read_texts(
            self._take,
            self._objects,
            self._text_rows.of(rows, table[BACK].to_numpy()),
            table["sequence"].to_numpy(),
            names=self.texts,
            known=known,
            path=self.path,
        )

    def find(self, where: str, sites: Mapping[str, StoredSite]) -> None:
        """Keep only the rows that match a condition.

        Args:
            where: The condition.
            sites: The sites that it may name, which are all that there are.

        Raises:
            OptionError: It is not a condition that Lance understands.

        """
        with self._reading():
            self.files.check()
            matching = Matching(count_rows(self.lance))
            for offsets in self._offsets(where, sites):
                matching.add(offsets)
        matching.settle()
        self.matching = matching
        vars(self).pop("_sampled", None)  # which was of all rows

    def _offsets(
        self, where: str, sites: Mapping[str, StoredSite]
    ) -> Iterator[Int64[np.ndarray, " match"]]:
        """Find the rows that match a condition, some at a time, in any order."""

        def refused(error: Exception) -> OptionError:
            reason = printable(why_refused(reason_of(error), sites, self.others))
            return OptionError(f"where={where!r} is not a condition on rows: {reason}")

        condition = as_lance_reads(where, sites, self.others)
        folded = condition.casefold()  # as Lance reads names
        sites_named = [site for site in sites.values() if site.column.casefold() in folded]
        named = [name for name in self.others if name.casefold() in folded]
        texts = [name for name in named if name in self.texts]
        row_bytes = sum(site.nbytes for site in sites_named)
        if texts:
            _, text, ends = self._sampled
            row_bytes += int(text * max(ends, 1 / _SAMPLED))
        batch_size = max(64, min(_READ_BYTES // max(row_bytes, 1), _MOST_AT_ONCE))
        if not texts:
            yield from rows_where(self.lance, condition, batch_size=batch_size, refused=refused)
            return
        others = [name for name in named if name not in texts]
        yield from offsets_of_matching(
            self.files.take,
            partial(rows_where, condition=condition, refused=refused),
            rows=count_rows(self.lance),
            columns=[*others, *(site.column for site in sites_named)],
            texts=texts,
            batch_size=batch_size,
            path=self.path,
        )

    def empty(self, rows: int) -> StoredBatch:
        """Allocate memory for rows.

        Raises:
            DataError: Memory has none.

        """
        try:
            batch: StoredBatch = {
                name: torch.empty(rows, dtype=dtype) if dtype else np.empty(rows, dtype=object)
                for name, dtype in self.others.items()
            }
            for name, site in self.sites.items():
                batch[name] = torch.empty((rows, *site.shape), dtype=site.torch_dtype)
        except (RuntimeError, MemoryError, ValueError):  # of torch, and of NumPy
            size = format_bytes(rows * self.row_bytes)
            raise DataError(
                f"{rows} rows of {self.path!r} take {size}, which do not fit in memory; read "
                "fewer at once, or fewer columns with sites="
            ) from None
        return batch

    def read(self, rows: range | Int64[np.ndarray, "row"]) -> StoredBatch:
        """Read rows in any order, also several times, with little more memory than they take.

        That is a few megabytes, and if the rows are not a range, 8 bytes for each to sort them.
        """
        batch = self.empty(len(rows))
        known: TextCache = {}
        for place, some in _ascending(rows, self.at_once):
            self.read_into(batch, some, place=place, known=known)
        return {
            name: values if isinstance(values, Tensor) else values.tolist()
            for name, values in batch.items()
        }

    @property
    def at_once(self) -> int:
        """The number of rows that are read fastest."""
        return max(64, min(_READ_BYTES // max(self.row_memory, 1), _MOST_AT_ONCE))

    def read_into(
        self,
        batch: StoredBatch,
        rows: Int64[np.ndarray, "row"],
        *,
        place: slice | Int64[np.ndarray, "row"],
        known: TextCache,
    ) -> None:
        """Read rows, in ascending order, to a place in a batch.

        Args:
            batch: The batch, which `empty` made.
            rows: The rows.
            place: Their places in it.
            known: The texts that were read to the batch before, which are read once.

        """
        once, back = np.unique(self._on_disk(rows), return_inverse=True)
        others = [name for name in self.others if name not in self.texts]
        columns = [*others, *self._beside, *(site.column for site in self.sites.values())]
        table = self._take(once, [*dict.fromkeys(columns)])
        repeated = None if len(once) == len(rows) else back
        texts = self._texts_of(once, table, known) if self.texts else {}
        for name, dtype in self.others.items():
            values: Any = texts.get(name)
            if values is None:
                values = self._numbers(table, name, dtype) if dtype else self._objects(table, name)
            _put(batch[name], place, values if repeated is None else values[repeated])
        for name, site in self.sites.items():
            with self._reading(f"{REOPEN}, or leave that site out with sites="):
                tensor = as_tensor(table[site.column], site)
            _put(batch[name], place, tensor if repeated is None else tensor[repeated])

    def _take(self, rows: Int64[np.ndarray, "row"], columns: list[str]) -> Any:
        files = self.files
        with self._reading():
            return files.take(rows, columns)

    def _reading(self, remedy: str = REOPEN) -> AbstractContextManager[None]:
        return reading(self.path, "rows of", remedy=remedy)

    def _numbers(self, table: Any, name: str, dtype: torch.dtype) -> Tensor:
        if table[name].null_count and not dtype.is_floating_point:
            raise DataError(
                f"the column {name!r} of {self.path!r} has nulls, which {dtype_name(dtype)} does "
                "not have; fill them, for example with -1, or drop the column"
            )
        with self._reading():
            if _dtype_of(table[name].type) != dtype:
                raise ValueError(f"its column {name!r} is {table[name].type}, unlike before")
            values = table[name].to_numpy()
            if dtype == torch.int64:  # also of what has fewer bits, and no sign
                return torch.from_numpy(values.astype(np.int64))
            return torch.from_numpy(values.copy())

    def _objects(self, table: Any, name: str) -> np.ndarray:
        column = table[name]
        with self._reading():
            try:
                column.validate(full=True)
                values = column.to_pylist()
            except (ValueError, OverflowError) as error:
                reason = reason_of(error)
                raise ValueError(f"its column {name!r} is not {column.type}: {reason}") from None
        # One by one, since NumPy would make an axis of lists.
        return np.fromiter(values, dtype=object, count=len(column))


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
    """Yield some rows at a time, in ascending order, and their places."""
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


def dtypes_of(lance: Any, layout: Layout, files: Files) -> dict[str, torch.dtype | None]:
    """Return the dtypes of columns other than sites; None for those read into a list.

    Lists are what holds no numbers, or more than torch reckons with, as uint64 does. So are
    integers and booleans with nulls, which only somebody else's columns have: these are looked at.
    """
    sites = {site.column for site in layout.sites}
    hidden = {*sites, *layout.hidden}
    fields = {each.name: each for each in lance.schema if each.name not in hidden}
    found = {name: _dtype_of(each.type) for name, each in fields.items()}
    exact = {
        name
        for name in layout.unlisted(lance.schema)
        if fields[name].nullable and (dtype := found[name]) and not dtype.is_floating_point
    }
    return {**found, **dict.fromkeys(_with_nulls(files, exact))}


@lru_cache
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


def _with_nulls(files: Files, names: set[str]) -> set[str]:
    """Find out which columns have nulls; each is read until the first."""
    found = set()
    for name in names:
        if any(table[name].null_count for table in files.take_all([name])):
            found.add(name)
    return found


def _held(value: object) -> int:
    """Estimate the bytes that an object takes, with every version of Python alike."""
    if isinstance(value, str):
        return _OBJECT_BYTES + len(value) * (1 if value.isascii() else 4)
    if isinstance(value, list):
        return _OBJECT_BYTES + sum(map(_held, value))
    if isinstance(value, dict):
        return _OBJECT_BYTES + sum(_held(key) + _held(each) for key, each in value.items())
    return _OBJECT_BYTES
