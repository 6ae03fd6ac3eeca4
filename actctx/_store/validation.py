"""Compare what a data set says of itself with what it holds, before anything is read by it.

# NOTE [Trust]
The metadata is text that anybody can edit, and the columns are Arrow's, which other tools alter and
disks damage. So the metadata is read by the annotations of the classes that it becomes, the schema
is compared with it when a data set is opened, and each column that is read is compared with it
again: an address in memory is made from a size only if Arrow's own buffer is as long.

# NOTE [Takes and scans]
Lance hands a scan to Arrow as a stream of C functions. A panic in one of them ends the process, and
so does an error whose text has a NUL, as those that quote a damaged file may have. A take raises
both, and so does a count. So whole columns are read by takes; only a condition needs a scan, and
what it finds is counted before.
"""

import json
import os
import reprlib
import struct
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from jaxtyping import Int64

from actctx._errors import ActctxError, DataError
from actctx._files import reason_of
from actctx._text import printable

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

MOST_ELEMENTS = 2**31
"""Arrow counts the elements of a row in 32 bits."""

_DEEPEST = 16
"""The depth of nesting that no metadata of ours has."""

_EXPECTED = {
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    tuple: "a list",
    Mapping: "an object",
}

_TAKEN = 2**16
"""The rows that are read fastest at once, of numbers."""

_FOOTER = struct.Struct("<QQQII8x")
"""The end of a file of Lance's: where the metadata of columns begins, the table of columns, and
that of what else there is; the lengths of the second and of the first; its version."""

_MOST_ROWS = 2**48
"""More of them than any disk holds, and few enough that their bytes are counted in 64 bits."""

_COPY = "put a copy of it in its place, or give another path"
REOPEN = "open it again, since another process may have replaced its files, or write it anew"
"""What to do where rows of an open data set cannot be read."""


class LaterError(ValueError):
    """The metadata has something that a later version wrote."""


def damaged(path: str, found: str, remedy: str = _COPY) -> DataError:
    """Say that a data set cannot be read, and why."""
    return DataError(f"the data set at {path!r} cannot be read: {printable(found)}; {remedy}")


@contextmanager
def reading(path: str, what: str = "the data set at", *, remedy: str = _COPY) -> Iterator[None]:
    """Turn what Lance, Arrow and torch raise in the block into a `DataError`.

    Raises:
        DataError: Something was raised, or Lance panicked, as it does of some damage.

    """
    try:
        yield
    except ActctxError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = reason_of(error) or type(error).__name__
        raise DataError(f"{what} {path!r} cannot be read: {reason}; {remedy}") from error


# The metadata.


def read_json(text: bytes) -> dict[str, Any]:
    """Read an object of JSON, in which no name comes twice.

    Raises:
        ValueError: It is not an object, or a name comes twice.

    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name comes twice in it")
        return found

    try:
        found = json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is not an object, but {_shown(found)}")  # noqa: TRY004  as all are
    return found


def from_json(kind: type[T], found: Any, where: str = "") -> T:
    """Make a dataclass of an object of JSON, each of whose values is as the class annotates it.

    Args:
        kind: The class.
        found: The object.
        where: What messages call it.

    Raises:
        ValueError: A value is missing, or is something else.
        LaterError: There is a value that the class does not have.

    """
    if not isinstance(found, dict):
        raise ValueError(f"{where!r} is {_shown(found)}, where an object belongs")  # noqa: TRY004
    before = f"{where}." if where else ""
    hints = get_type_hints(kind)
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    for name, each in known.items():
        has_default = each.default is not MISSING or each.default_factory is not MISSING
        if name not in found and not has_default:
            raise ValueError(f"{before + name!r} is missing")
    if more := [name for name in found if name not in known]:
        raise LaterError(f"field {before + more[0]!r}")
    return kind(**{name: _read(each, hints[name], before + name) for name, each in found.items()})


def _read(value: Any, hint: Any, where: str) -> Any:
    """Read a value as it is annotated; lists become tuples."""
    origin, inner = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value, where)
    if hint is Any:
        _check_text(value, where)
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_read(each, inner[0], f"{where}[{k}]") for k, each in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        _check_text([*value], where)
        return {name: _read(each, inner[1], f"{where}.{name}") for name, each in value.items()}
    if origin is types.UnionType and (value is None or len(inner) == 2):  # noqa: PLR2004  X | None
        return None if value is None else _read(value, inner[0], where)
    if type(value) is not hint:
        expected = _EXPECTED.get(origin or hint, "something else")
        raise ValueError(f"{where!r} is {_shown(value)}, where {expected} belongs")
    _check_text(value, where)
    return value


def _check_text(value: Any, where: str, depth: int = 0) -> None:
    """Refuse halves of characters, which JSON can write and nothing can show.

    Raises:
        ValueError: It has such halves, or lists nested too deeply.

    """
    if depth > _DEEPEST:
        raise ValueError(f"{where!r} is nested too deeply")
    if isinstance(value, list | dict):
        inner = value if isinstance(value, list) else [*value, *value.values()]
        for each in inner:
            _check_text(each, where, depth + 1)
    try:
        _ = value.encode() if isinstance(value, str) else value
    except UnicodeEncodeError:
        raise ValueError(f"{where!r} is {_shown(value)}, which is not text") from None


def _shown(value: object) -> str:
    return reprlib.repr(value)


# The columns.


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
    """The files that hold the rows of a Lance dataset, each looked at before its rows are read.

    Lance makes room for as many bytes as a file says that its pages have, and where memory has no
    such room, the process ends. Object stores are not looked at.

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
            raise ValueError(f"{table.num_rows} rows came for {len(rows)}")
        table.validate()
        return table

    def take_all(self, columns: list[str], start: int = 0) -> Iterator["pa.Table"]:
        """Read columns of all rows, or of those from one on, some at a time."""
        rows = count_rows(self._dataset)
        for first in range(start, rows, _TAKEN):
            yield self.take(np.arange(first, min(first + _TAKEN, rows)), columns)

    def check(self, rows: Int64[np.ndarray, "row"] | None = None) -> None:
        """Look at the files that hold some rows, by default all, but for those that were looked at.

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

    table = pa.ipc.open_file(place.read_bytes()).read_all() if place.is_file() else None
    if table is not None and table.num_rows != deleted.num_deleted_rows:
        raise ValueError(f"its file {place.name!r} is damaged")


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
        raise ValueError(
            f"its column {name!r} is {_type_name(found)}, where {_type_name(wanted)} belongs"
        )


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
        raise ValueError(f"{column.null_count} of {rows} rows have nothing in its column {name!r}")
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
