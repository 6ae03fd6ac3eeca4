"""Texts that come with sequences, which are stored once for each.

# NOTE [Texts]
The rows of a sequence lie together. Only the first of them has its texts; the others have null
there, and the column `_back` says how many rows before them that first row lies. So texts take
their space once a sequence, in the same commit as its rows, and a row is read with its texts by
reading another row. A sequence within which a commit ended has its texts twice.

Deleting rows, as others can, moves those after them. So where some were deleted, the first rows
are found by the column as a whole, and the number of the sequence has to be that of the row.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Int32, Int64

from actctx._errors import DataError
from actctx._store.layout import BACK
from actctx._store.libraries import import_lance
from actctx._store.matching import Matching
from actctx._store.validation import Files, count_rows

if TYPE_CHECKING:
    import pyarrow as pa

_SPREAD_BYTES = 2**26
"""What texts may take where a condition needs them row by row."""

TextCache: TypeAlias = dict[int, tuple[Any, ...]]
"""The texts that were read, by the rows that hold them."""

Take: TypeAlias = Callable[[Int64[np.ndarray, " row"], list[str]], "pa.Table"]
"""Reads columns of rows by number."""

Ask: TypeAlias = Callable[..., Iterator[Int64[np.ndarray, " match"]]]
"""Finds the rows that match a condition; see `rows_where`."""


def rows_back(within: Int64[np.ndarray, " row"]) -> "pa.Array":
    """Make the column `_back` of rows, given the sequence of each."""
    import pyarrow as pa

    places = np.arange(len(within))
    is_first = np.diff(within, prepend=-1) != 0
    first = np.maximum.accumulate(np.where(is_first, places, 0))
    return pa.array((places - first).astype(np.int32))


def once_a_sequence(
    values: "pa.Array", within: Int64[np.ndarray, " row"], back: "pa.Array"
) -> "pa.Array":
    """Make a column of texts, with one text for each sequence."""
    import pyarrow as pa

    return values.take(pa.array(within, mask=back.to_numpy() > 0))


class TextRows:
    """Finds the row that has the texts of a row.

    Args:
        files: The files of the data set.
        lance: The Lance dataset.
        path: Its path, for messages.

    """

    def __init__(self, files: Files, lance: Any, path: str) -> None:
        self._path = path
        self._first: Matching | None = None
        if any(fragment.metadata.num_deletions for fragment in lance.get_fragments()):
            self._first, start = Matching(count_rows(lance)), 0
            for table in files.take_all([BACK]):
                self._first.add(start + np.flatnonzero(table[BACK].to_numpy() == 0))
                start += table.num_rows
            self._first.settle()

    def of(
        self, rows: Int64[np.ndarray, " row"], back: Int32[np.ndarray, " row"]
    ) -> Int64[np.ndarray, " row"]:
        """Return for each row the row that holds its texts."""
        if self._first is None:
            first: Int64[np.ndarray, " row"] = rows - back
            if ((first < 0) | (first > rows)).any():
                raise lost(self._path)
            return first
        number = self._first.count(rows + 1) - 1
        if (number < 0).any():
            raise lost(self._path)
        return self._first[number]


def read_texts(
    take: Take,
    objects: Callable[["pa.Table", str], np.ndarray],
    first: Int64[np.ndarray, " row"],
    sequence: Int64[np.ndarray, " row"],
    *,
    names: tuple[str, ...],
    known: TextCache,
    path: str,
) -> dict[str, np.ndarray]:
    """Read the texts of rows; rows of one sequence share theirs.

    Args:
        take: Reads rows of the data set.
        objects: Makes objects of a column.
        first: For each row that which has its texts.
        sequence: The sequence of each row.
        names: The columns to read.
        known: What was read before, to which is added what is read now.
        path: The path of the data set, for messages.

    Raises:
        DataError: The row that had the texts is not there any more.

    """
    once, back = np.unique(first, return_inverse=True)
    new = np.array([row for row in once.tolist() if row not in known], dtype=np.int64)
    if len(new):
        table = take(new, ["sequence", *names])
        columns = [table["sequence"].to_pylist(), *(objects(table, name) for name in names)]
        known.update(zip(new.tolist(), zip(*columns, strict=True), strict=True))
    found = [known[row] for row in once.tolist()]
    is_theirs = np.array([each[0] for each in found])[back] == sequence
    if not is_theirs.all() or any(None in each for each in found):
        raise lost(path)
    texts = {}
    for number, name in enumerate(names, 1):
        values = np.empty(len(found), dtype=object)
        values[:] = [each[number] for each in found]
        texts[name] = values[back]
    return texts


def lost(path: str) -> DataError:
    """Explain that the texts of rows are lost."""
    return DataError(
        f"texts of {path!r} are lost: the first row of their sequence, which stored them, was "
        "deleted or changed; read only the sites with data.read(), or write the data set again"
    )


def offsets_of_matching(
    take: Take,
    ask: Ask,
    *,
    rows: int,
    columns: list[str],
    texts: list[str],
    batch_size: int,
    path: str,
) -> Iterator[Int64[np.ndarray, " match"]]:
    """Find the rows that match a condition on texts.

    Lance compares what is in a row, so the rows are read in their order, given the texts of their
    sequence, and compared some at a time.

    Args:
        take: Reads rows of the data set.
        ask: Finds the rows of a Lance dataset that the condition holds of.
        rows: How many rows the data set has.
        columns: The other columns that it may name.
        texts: The columns of texts that it may name.
        batch_size: The rows to read at a time.
        path: The path of the data set, for messages.

    Raises:
        DataError: Rows have no texts any more.

    """
    import pyarrow as pa

    needed = [*dict.fromkeys([BACK, "sequence", *columns, *texts])]
    last: dict[str, pa.Array] = {}
    for start in range(0, rows, batch_size):
        table = take(np.arange(start, min(start + batch_size, rows)), needed)
        batch = {name: table[name].combine_chunks() for name in needed}
        is_first = batch[BACK].to_numpy() == 0
        if not last and not is_first[0]:
            raise lost(path)
        number = (np.cumsum(is_first) - (not last)).astype(np.int32)
        held = {
            name: _behind(last.get(name), batch[name], is_first) for name in ["sequence", *texts]
        }
        is_theirs = held["sequence"].to_numpy()[number] == batch["sequence"].to_numpy()
        if not is_theirs.all() or any(held[name].null_count for name in texts):
            raise lost(path)
        named = {name: batch[name] for name in columns}
        yield start + _matching(ask, named, number, {name: held[name] for name in texts})
        last = {name: values[-1:] for name, values in held.items()}


def _behind(
    last: "pa.Array | None", column: "pa.Array", is_first: Bool[np.ndarray, " row"]
) -> "pa.Array":
    """List the values of first rows, after the last value before them, which may still apply."""
    import pyarrow as pa

    found = column.filter(pa.array(is_first))
    return found if last is None else pa.concat_arrays([last, found])


def _matching(
    ask: Ask,
    named: dict[str, "pa.Array"],
    number: Int32[np.ndarray, " row"],
    texts: dict[str, "pa.Array"],
) -> Int64[np.ndarray, " match"]:
    """Find the rows that match a condition.

    Args:
        ask: Asks the condition.
        named: The columns that it names, but for texts.
        number: For each row which of the texts are its own.
        texts: The texts.

    """
    once, first, again = np.unique(number, return_index=True, return_inverse=True)
    if all(column.equals(column.take(first[again])) for column in named.values()):
        # What it names is the same throughout a sequence, so it is asked once for each.
        holds = np.zeros(len(once), dtype=bool)
        named = {name: column.take(first) for name, column in named.items()}
        holds[_asked(ask, named, once.astype(np.int32), texts)] = True
        return np.flatnonzero(holds[again])
    return _asked(ask, named, number, texts)


def _asked(
    ask: Ask,
    named: dict[str, "pa.Array"],
    number: Int32[np.ndarray, " row"],
    texts: dict[str, "pa.Array"],
) -> Int64[np.ndarray, " match"]:
    import pyarrow as pa
    import pyarrow.compute as pc

    spread = {
        name: pa.DictionaryArray.from_arrays(number, values) for name, values in texts.items()
    }
    longest = max(pc.max(pc.binary_length(each)).as_py() or 0 for each in texts.values())
    if longest * len(number) < _SPREAD_BYTES:
        spread = {name: values.dictionary_decode() for name, values in spread.items()}
    # Functions are given the texts of a dictionary row by row.
    batch_size = max(1, min(_SPREAD_BYTES // (longest + 1), 8192))
    held = import_lance().write_dataset(pa.table({**named, **spread}), "memory://")
    return np.concatenate([np.empty(0, np.int64), *ask(held, batch_size=batch_size)])
