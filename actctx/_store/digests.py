"""Digest what each commit writes, so that damage is found later.

# NOTE [Digests]
They lie beside the data, in `digests.txt`, a line for each commit: the rows, a digest of each
column's values, and one of each file's bytes. That of values does not depend on how they are
encoded or divided into batches, so it holds where somebody compacts the files. A line is on the
disk before its commit is, so there are lines whose commit never came: rows are as they were written
where one of the lines that tell of them says so. Each line begins with a digest of itself: what is
damaged is the data, or the line. They are made to find damage, not forgery.

The digest of a manifest is written behind its commit. Where there are several of one version, the
last counts, since a version that was torn is deleted, and its number is used again.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actctx._files import expanded
from actctx._store.libraries import not_installed

if TYPE_CHECKING:
    import pyarrow as pa

DIGESTS = "digests.txt"
"""The file that the digests of a data set lie in."""

_READ_BYTES = 2**23


class Digest:
    """A digest of bytes, and of columns, that come part by part.

    Attributes:
        row_count: The number of rows that came.

    """

    def __init__(self) -> None:
        self._values, self._nulls = _new(), _new()
        self.row_count = 0

    def update(self, values: Any) -> None:
        """Add bytes."""
        self._values.update(values)

    def add(self, column: "pa.Array") -> None:
        """Add the rows of a column, whatever part of it they are."""
        valid = column
        if column.null_count:
            rows = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))
            self._nulls.update((rows + self.row_count).tobytes())
            valid = column.drop_null()
        self.row_count += len(column)
        self._add_valid(valid)

    def _add_valid(self, column: "pa.Array") -> None:
        import pyarrow as pa

        kind, types = column.type, pa.types
        if not len(column):
            return
        if isinstance(kind, pa.BaseExtensionType):
            self._add_valid(column.storage)
        elif types.is_dictionary(kind) and _is_fixed(kind.value_type):
            self._add_valid(column.dictionary_decode())
        elif types.is_fixed_size_list(kind):
            elements = column.flatten()
            inner = elements.storage if isinstance(elements, pa.ExtensionArray) else elements
            if inner.null_count or not _is_fixed(inner.type):
                self._add_objects(column)
            else:
                self._add_valid(inner)
        elif types.is_boolean(kind):
            self._add_valid(column.cast(pa.uint8()))
        elif _is_fixed(kind):
            width = kind.bit_width // 8
            start = column.offset * width
            self.update(memoryview(column.buffers()[1])[start : start + len(column) * width])
        else:
            self._add_objects(column)

    def _add_objects(self, column: "pa.Array") -> None:
        """Add texts and the like by a digest of each, which is computed once if they repeat."""
        import pyarrow as pa

        if not (pa.types.is_dictionary(column.type) or pa.types.is_nested(column.type)):
            column = column.dictionary_encode()
        if not pa.types.is_dictionary(column.type):
            self.update(_digests_of(column.to_pylist()).tobytes())
            return
        once = _digests_of(column.dictionary.to_pylist())
        self.update(once[column.indices.to_numpy()].tobytes())

    def hex(self) -> str:
        """Write it in 32 digits, or in 64 where there were nulls."""
        values: str = self._values.hexdigest()
        nulls: str = self._nulls.hexdigest()
        return values if nulls == _new().hexdigest() else values + nulls


def _new(value: bytes = b"") -> Any:
    """Make the hash of bytes."""
    return _hash()(value)


@cache  # since each text has a digest of its own
def _hash() -> Any:
    """Return what makes a hash."""
    try:
        from xxhash import xxh3_128
    except ModuleNotFoundError as error:
        raise not_installed(error) from None
    return xxh3_128


def _is_fixed(kind: Any) -> bool:
    import pyarrow as pa

    types = pa.types
    return bool(
        types.is_primitive(kind) or types.is_fixed_size_binary(kind) or types.is_boolean(kind)
    )


def _digests_of(values: list[Any]) -> np.ndarray:
    made = [_new(_as_bytes(value)).digest() for value in values]
    return np.array(made, dtype="V16") if made else np.empty(0, dtype="V16")


def _as_bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else repr(value)).encode("utf-8", "surrogatepass")


def digest_of(text: str) -> str:
    """Make the digest of a text."""
    made = Digest()
    made.update(text.encode())
    return made.hex()


def digest_file(path: Path) -> str:
    """Make the digest of a file.

    Raises:
        OSError: It cannot be read.

    """
    made = Digest()
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            made.update(part)
    return made.hex()


def digested(
    batches: Iterable["pa.RecordBatch"], digests: dict[str, Digest]
) -> Iterator["pa.RecordBatch"]:
    """Pass on rows, and make the digests of their columns."""
    for batch in batches:
        for digest, column in zip(digests.values(), batch.columns, strict=True):
            digest.add(column)
        yield batch


def record_all(path: Path, digests: dict[str, Digest], metadata: str) -> None:
    """Write the digests of a data set that was written at once."""
    row_count = next(iter(digests.values())).row_count
    columns = {name: digest.hex() for name, digest in digests.items()}
    files = {file.name: digest_file(file) for file in (path / "data").iterdir()}
    add_lines(path, [line_of_metadata(metadata), Commit(0, row_count, columns, files).line()])


@dataclass(frozen=True)
class Commit:
    """The digests of a commit.

    Attributes:
        start: Its first row.
        stop: The row after its last.
        columns: The digest of each of its columns, by their names on disk.
        files: The digest of each of its data files, by their names.

    """

    start: int
    stop: int
    columns: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """Write it as a line."""
        said = {"rows": [self.start, self.stop], "columns": self.columns, "files": self.files}
        return _line(said)


def line_of_metadata(metadata: str) -> str:
    """Write the line for what a data set says about itself."""
    return _line({"metadata": digest_of(metadata)})


def line_of_manifest(version: int, digest: str) -> str:
    """Write the line for the manifest of a version; without a digest, that there is none yet."""
    return _line({"manifest": version, "digest": digest})


def _line(said: dict[str, Any]) -> str:
    text = json.dumps(said)
    return f"{digest_of(text)} {text}\n"


@dataclass(frozen=True)
class DigestLog:
    """The digests of a data set, as far as they can be read.

    Attributes:
        commits: The commits in their order, with those that were never completed.
        metadata: The digests of all metadata that the data set ever had.
        damaged: The number of lines that cannot be read, such as one torn by a power cut.

    """

    commits: list[Commit]
    metadata: set[str]
    damaged: int = 0


def read_digests(path: str) -> DigestLog:
    """Read the digests of a data set; older versions wrote none.

    Args:
        path: The path of the data set, or its address in an object store.

    """
    found = DigestLog([], set())
    damaged = 0
    for said in _read_lines(path):
        if said is None:
            damaged += 1
        elif "metadata" in said:
            found.metadata.add(said["metadata"])
        elif "manifest" not in said:
            start, stop = said["rows"]
            found.commits.append(Commit(start, stop, said["columns"], said["files"]))
    return DigestLog(found.commits, found.metadata, damaged)


def read_manifest_digests(path: Path) -> dict[int, str]:
    """Read the digests of the manifests of a data set on a local disk, by version."""
    noted = (said for said in _read_lines(str(path), b'{"manifest"') if said is not None)
    return {said["manifest"]: said["digest"] for said in noted}


def _read_lines(path: str, having: bytes = b"") -> Iterator[dict[str, Any] | None]:
    """Parse each line that has some bytes; yield None for one that is damaged."""
    for line in _read(path).splitlines():
        if not line or having not in line:
            continue
        digest, _, text = line.decode("utf-8", "replace").partition(" ")
        yield json.loads(text) if digest_of(text) == digest else None


def add_lines(path: Path, lines: Iterable[str]) -> Path:
    """Append lines to the digests of a data set on a local disk, on a line of their own.

    Raises:
        OSError: They cannot be written.

    """
    file = path / DIGESTS
    with file.open("a+b") as written:
        if written.tell():
            written.seek(-1, os.SEEK_END)
            if written.read(1) != b"\n":
                written.write(b"\n")
        written.write("".join(lines).encode())
    return file


def _read(path: str) -> bytes:
    address = expanded(path)
    if "://" not in address:
        file = Path(address) / DIGESTS
        return file.read_bytes() if file.exists() else b""
    from pyarrow import ArrowException, fs

    try:
        store, place = fs.FileSystem.from_uri(f"{address.rstrip('/')}/{DIGESTS}")
        with store.open_input_stream(place) as stream:
            found: bytes = stream.read()
    except (OSError, ArrowException):
        return b""
    return found
