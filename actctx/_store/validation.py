"""Check the files and columns of a data set against its metadata before rows are read.

# NOTE [Takes and scans]
Lance hands a scan to Arrow as a stream of C functions. A panic in one of them ends the process, and
so does an error whose text has a NUL, as those that quote a damaged file may have. A take raises
both, and so does a count. So whole columns are read by takes; only a condition needs a scan, and
what it finds is counted before.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from actctx._errors import ActctxError, DataError
from actctx._files import reason_of
from actctx._text import printable

if TYPE_CHECKING:
    import pyarrow as pa

MOST_ELEMENTS = 2**31
"""Arrow counts the elements of a row in 32 bits."""

_TAKEN = 2**16
"""The rows that are read fastest at once, of numbers."""

_FOOTER = struct.Struct("<QQQII8x")
"""The end of a file of Lance's: where the metadata of columns begins, the table of columns, and
that of what else there is; the lengths of the second and of the first; its version."""

_MESSAGE = b"\xff" * 4
"""What each message of an Arrow file begins with."""

_MOST_ROWS = 2**48
"""More of them than any disk holds, and few enough that their bytes are counted in 64 bits."""

_COPY = "put a copy of it in its place, or extract it again to another path"
REOPEN = (
    "open it again, since another process may have replaced its files; if that fails, "
    "see 'actctx verify' and 'actctx repair'"
)
"""What to do where rows of an open data set cannot be read."""


def damaged(path: str, found: str, remedy: str = _COPY) -> DataError:
    """Explain why a data set cannot be read."""
    return DataError(f"the data set at {path!r} cannot be read: {printable(found)}; {remedy}")


def is_panic(error: BaseException) -> bool:
    """Return whether Lance panicked, as it does of some damage."""
    return type(error).__name__ == "PanicException"


@contextmanager
def reading(
    path: str, what: str = "the data set at", *, remedy: str = _COPY, panic: str = "{}"
) -> Iterator[None]:
    """Turn what Lance, Arrow and torch raise in the block into a `DataError`.

    Args:
        path: The path of the data set.
        what: What is read of it.
        remedy: What to do if it cannot be read.
        panic: How a panic of Lance is reported, with a place for its text.

    Raises:
        DataError: Something was raised.

    """
    try:
        yield
    except ActctxError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = reason_of(error) or type(error).__name__
        reason = panic.format(reason) if is_panic(error) else reason
        raise DataError(f"{what} {path!r} cannot be read: {reason}; {remedy}") from error


def count_rows(dataset: Any) -> int:
    """Count the rows of a Lance dataset.

    Raises:
        ValueError: There are more than can be.

    """
    rows: int = dataset.count_rows()
    if rows > _MOST_ROWS:
        raise ValueError(f"its manifest counts {rows} rows")
    return rows


class Files:
    """The files that hold the rows of a Lance dataset, each checked before its rows are read.

    Lance makes room for as many bytes as a file says that its pages have, and where memory has no
    such room, the process ends. Object stores are not checked.

    Args:
        dataset: The Lance dataset.
        path: Where it is.

    """

    def __init__(self, dataset: Any, path: str) -> None:
        self._dataset = dataset
        self._path = path
        self._fragments = [each.metadata for each in dataset.get_fragments()]
        self._ends = np.cumsum([_count(each) for each in self._fragments], dtype=np.int64)
        self._is_new = np.full(len(self._fragments), "://" not in path)

    def take(self, rows: Int64[np.ndarray, "row"], columns: list[str]) -> "pa.Table":
        """Read rows by number.

        Raises:
            ValueError: A file is damaged, or not all of them come.

        """
        self.check(rows)
        table = self._dataset.take(rows, columns=columns)
        if table.num_rows != len(rows) or table.column_names != columns:
            raise ValueError(f"{table.num_rows} rows were read for {len(rows)}")
        table.validate()
        return table

    def take_all(self, columns: list[str], start: int = 0) -> Iterator["pa.Table"]:
        """Read columns of all rows, or of those from one on, some at a time."""
        rows = count_rows(self._dataset)
        for first in range(start, rows, _TAKEN):
            yield self.take(np.arange(first, min(first + _TAKEN, rows)), columns)

    def check(self, rows: Int64[np.ndarray, "row"] | None = None) -> None:
        """Check the files that hold some rows, by default all, each of them once.

        Raises:
            ValueError: One is damaged.

        """
        numbers = np.arange(len(self._fragments))
        if rows is not None:
            numbers = np.unique(np.searchsorted(self._ends, rows, side="right"))
            numbers = numbers[numbers < len(self._fragments)]
        for number in numbers[self._is_new[numbers]]:
            fragment = self._fragments[number]
            for file in fragment.files:
                place = Path(self._path, "data", file.path)
                if file.file_major_version > 1 and place.is_file():
                    _check_file(place, fragment.physical_rows)
            deleted = fragment.deletion_file
            if deleted is not None and deleted.file_type == "array":
                _check_deleted(Path(self._path, deleted.path(fragment.id)), deleted)
            self._is_new[number] = False


def _count(fragment: Any) -> int:
    deleted = fragment.deletion_file
    rows: int = fragment.physical_rows
    return rows if deleted is None else rows - deleted.num_deleted_rows


def _check_file(place: Path, rows: int) -> None:
    from lance.file import LanceFileReader

    length = place.stat().st_size
    if length >= _FOOTER.size and max(_ends_of_tables(place)) > length:
        raise ValueError(f"its file {place.name!r} is damaged")
    found = LanceFileReader(str(place)).metadata()
    pages = [page for column in found.columns for page in column.pages]
    ends = [buffer.position + buffer.size for page in pages for buffer in page.buffers]
    if found.num_rows != rows or max(ends, default=0) > length:
        raise ValueError(f"its file {place.name!r} is damaged")


def _check_deleted(place: Path, deleted: Any) -> None:
    """Read the numbers of the rows that somebody deleted."""
    import pyarrow as pa

    if not place.is_file():
        return
    found = place.read_bytes()
    rows: int = deleted.num_deleted_rows
    if pa.ipc.open_file(found).read_all().num_rows != rows or not _are_lengths_right(found, rows):
        raise ValueError(f"its file {place.name!r} is damaged")


def _are_lengths_right(found: bytes, rows: int) -> bool:
    """Check how long the first buffer of each batch of an Arrow file says that it is.

    It is the bitmap of nulls. Where there are none pyarrow skips it, but Lance makes room for it.
    The length stands before its bytes, and is -1 where they are not compressed.
    """
    import pyarrow as pa

    reader = pa.MessageReader.open_stream(found[found.index(_MESSAGE) :])
    return all(
        -1 <= int.from_bytes(message.body.to_pybytes()[:8], "little", signed=True) <= 8 * rows + 64
        for message in iter(reader.read_next_message, None)
        if message.body
    )


def _ends_of_tables(place: Path) -> tuple[int, int]:
    """Return where the two tables at the end of a Lance file end, from the lengths in its footer.

    A table of columns, and one of what else there is, have 16 bytes for each.
    """
    with place.open("rb") as file:
        file.seek(-_FOOTER.size, os.SEEK_END)
        _, first, second, others, columns = _FOOTER.unpack(file.read())
    return first + 16 * columns, second + 16 * others


def check_fragments(dataset: Any, columns: Mapping[str, str], path: str) -> None:
    """Make sure that no rows were appended without a column, which Lance reads as nulls.

    Args:
        dataset: The Lance dataset.
        columns: What users call the columns that all rows must have, by their names on disk.
        path: Where it is.

    Raises:
        DataError: There are such rows.

    """
    numbers = {each.name(): each.id() for each in dataset.lance_schema.fields()}
    wanted = {numbers[column]: name for column, name in columns.items()}
    first = 0
    for fragment in dataset.get_fragments():
        there = {number for file in fragment.metadata.files for number in file.fields}
        end = first + fragment.physical_rows
        if missing := [name for number, name in wanted.items() if number not in there]:
            raise damaged(
                path,
                f"its rows from {first} to {end} were appended without the column {missing[0]!r}",
                "delete them, or leave that column out with sites=",
            )
        first = end


def check_columns(schema: "pa.Schema", wanted: Mapping[str, "pa.DataType"]) -> None:
    """Compare the columns that there are with what the metadata says of them.

    Raises:
        ValueError: Two have one name, one is missing, or is of another type or width.

    """
    names = schema.names
    if len({*names}) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has several columns {twice!r}")
    for name, kind in wanted.items():
        if name not in names:
            raise ValueError(f"it has no column {name!r}")
        check_type(name, schema.field(name).type, kind)


def check_type(name: str, found: "pa.DataType", wanted: "pa.DataType") -> None:
    """Make sure that a column is of a type; what a list calls its elements does not matter.

    Raises:
        ValueError: It is of another, or its rows are of another width.

    """
    import pyarrow as pa

    is_list = pa.types.is_fixed_size_list
    if is_list(found) and is_list(wanted):  # Arrow takes two widths of bfloat16 for one type
        alike = found.list_size == wanted.list_size
        alike = alike and (found == wanted or found.value_type == wanted.value_type)
    else:
        alike = found == wanted
    if not alike:
        raise ValueError(f"its column {name!r} is {_type_name(found)}, not {_type_name(wanted)}")


def _type_name(kind: "pa.DataType") -> str:
    return str(kind).replace("extension<lance.bfloat16<BFloat16Type>>", "bfloat16")


def elements_of(
    name: str, column: "pa.Array | pa.ChunkedArray", wanted: "pa.FixedSizeListType"
) -> "pa.Array":
    """Return the elements of all rows, of which memory holds as many as the type says.

    Args:
        name: The name of the column, for messages.
        column: Lists of one width.
        wanted: The type that it must have.

    Raises:
        ValueError: It has another type, or nulls, or less memory than that takes.

    """
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    check_type(name, column.type, wanted)
    rows = len(column)
    if column.null_count:
        raise ValueError(f"{column.null_count} of {rows} rows have no value in its column {name!r}")
    elements = column.flatten()  # of a window on a larger column, only what is in it
    if isinstance(elements, pa.ExtensionArray):
        elements = elements.storage
    if elements.null_count:
        raise ValueError(f"its column {name!r} has nulls among its elements")
    count = rows * wanted.list_size
    nbytes = -(-(elements.offset + count) * elements.type.bit_width // 8)
    buffer = elements.buffers()[1]
    if len(elements) != count or (count and (buffer is None or buffer.size < nbytes)):
        raise ValueError(
            f"its column {name!r} has less in memory than {rows} rows of {wanted.list_size} "
            "elements take"
        )
    return elements
