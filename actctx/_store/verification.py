"""Compare what is on disk with what was written.

# NOTE [Repair]
How far an extraction has come is told by the number of rows, so what is kept is a whole beginning:
all rows before the first that is damaged. Rows are dropped by whole fragments, of which no file is
rewritten.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from actctx._errors import DataError
from actctx._files import reason_of
from actctx._store.digests import Commit, Digest, DigestLog, digest_file, digest_of, read_digests
from actctx._store.layout import KEY, Layout, layout_of
from actctx._store.validation import Files, count_rows, is_panic
from actctx._text import counted, shortened

_READ_ROWS = 2**16
_READ_BYTES = 2**23
_Rows: TypeAlias = tuple[int, int, str]
"""The first of some rows, the row after the last, and what is wrong with them."""


@dataclass(frozen=True)
class Damage:
    """Rows that are not as they were written.

    Attributes:
        start: The first of them.
        stop: The row after the last.
        name: The column, by the name that users know; or the file.
        found: What is wrong.

    """

    start: int
    stop: int
    name: str
    found: str

    def __str__(self) -> str:
        rows = f"row {self.start}" if self.stop == self.start + 1 else ""
        rows = rows or f"rows {self.start} to {self.stop - 1}"
        return f"{self.name} {self.found} in {rows}"


@dataclass(frozen=True)
class Verified:
    """What `ActivationDataset.verify` compared.

    Attributes:
        rows: The rows of the data set.
        columns: The columns of which all rows are as they were written, by the names that they
            are read under, and on disk for those that are not read.
        unchecked: What could not be compared, and why, a sentence each.

    """

    rows: int
    columns: tuple[str, ...]
    unchecked: tuple[str, ...] = ()


@dataclass
class Findings:
    """What is wrong with a data set, collected while it is read.

    Attributes:
        damages: The rows that are not as they were written.
        compared: The rows of each column that were compared.
        unchecked: What could not be compared, and why.
        metadata: What is wrong with what the data set says about itself.

    """

    damages: list[Damage] = field(default_factory=list)
    compared: dict[str, int] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)
    metadata: str = ""


def check_whole(dataset: Any, path: str, *, lost: str = "") -> Verified:
    """Compare all rows with their digests.

    Args:
        dataset: The Lance dataset.
        path: Its path or address.
        lost: What is known to be damaged.

    Raises:
        DataError: Some are not as they were written.

    """
    layout = layout_of(dataset, path)
    found = compare(dataset, path, layout)
    rows = count_rows(dataset)
    said = [*filter(None, (lost, found.metadata)), *map(str, found.damages)]
    if said:
        remedy = f"'actctx repair {path}' keeps the rows before, and extract() rewrites the others"
        if "://" in path or found.metadata:
            remedy = "put a copy in its place"
        raise DataError(f"{path!r} is damaged: {shortened(said)}; {remedy}")
    columns = tuple(
        _known_as(name, layout) for name, count in found.compared.items() if count == rows
    )
    return Verified(rows, columns, tuple(found.unchecked))


def compare(dataset: Any, path: str, layout: Layout) -> Findings:
    """Compare all rows with their digests, and collect those that differ."""
    log, found = read_digests(path), Findings()
    rows = count_rows(dataset)
    if digest_of(dataset.schema.metadata[KEY].decode()) not in log.metadata:
        if log.damaged or not log.metadata:
            found.unchecked.append("its metadata has no digest")
        else:
            found.metadata = "its metadata is not what was written"
    fragments = dataset.get_fragments()
    if any(fragment.metadata.num_deletions for fragment in fragments):
        found.unchecked.append("rows were deleted from it, so digests do not apply to the others")
        return found
    commits = [commit for commit in log.commits if commit.stop <= rows]
    files = Files(dataset, path)
    for column in dataset.schema.names:
        _compare_column(dataset, column, commits, files=files, layout=layout, found=found)
    if "://" not in path:
        _compare_files(Path(path), fragments, log, found)
    _say_unchecked(dataset, rows, layout, found)
    return found


def _compare_column(
    dataset: Any,
    column: str,
    commits: list[Commit],
    *,
    files: Files,
    layout: Layout,
    found: Findings,
) -> None:
    """Compare a column; rows are intact if one of the digests that cover them matches."""
    kind, rows = dataset.schema.field(column).type, count_rows(dataset)
    whole: list[_Rows] = []
    wrong: list[_Rows] = []
    for commit in commits:
        if digest := commit.columns.get(column):
            differs = _differs(files, kind, column, digest, commit)
            kept = wrong if differs else whole
            kept.append((commit.start, commit.stop, differs))
    name = repr(_known_as(column, layout))
    left = _without([(0, rows, "")], [*whole, *wrong])
    found.compared[column] = rows - sum(stop - start for start, stop, _ in left)
    found.damages += [
        Damage(start, stop, name, said) for start, stop, said in _without(wrong, whole)
    ]


def _without(rows: list[_Rows], others: list[_Rows]) -> list[_Rows]:
    """Take rows out of others."""
    for start, stop, _ in others:
        left = []
        for first, last, said in rows:
            parts = ((first, min(last, start)), (max(first, stop), last))
            left += [(*part, said) for part in parts if part[0] < part[1]]
        rows = left
    return rows


def _differs(files: Files, kind: Any, column: str, digest: str, commit: Commit) -> str:
    """Explain how a column differs from its digest; empty if it does not."""
    made = Digest()
    some = _rows_at_once(kind)
    try:
        for start in range(commit.start, commit.stop, some):
            for part in files.take(np.arange(start, min(start + some, commit.stop)), [column])[
                column
            ].chunks:
                made.add(part)
    except BaseException as error:
        if isinstance(error, Exception) or is_panic(error):
            return f"cannot be read ({reason_of(error)})"
        raise
    return "" if made.hex() == digest else "has other values than were written"


def _rows_at_once(kind: Any) -> int:
    """Return how many rows of a column are read fastest."""
    import pyarrow as pa

    if not pa.types.is_fixed_size_list(kind):
        return _READ_ROWS
    value = getattr(kind.value_type, "storage_type", kind.value_type)
    nbytes: int = kind.list_size * value.bit_width // 8
    return max(64, min(_READ_BYTES // max(nbytes, 1), _READ_ROWS))


def _compare_files(path: Path, fragments: list[Any], log: DigestLog, found: Findings) -> None:
    """Find files whose bytes differ though all of their values match."""
    known = {name: each for commit in log.commits for name, each in commit.files.items()}
    for start, stop, fragment in numbered(fragments):
        if any(damage.start < stop and start < damage.stop for damage in found.damages):
            continue
        for file in fragment.metadata.files:
            if file.path not in known:
                continue
            try:
                wrong = digest_file(path / "data" / file.path) != known[file.path]
            except OSError:
                wrong = True
            if wrong:
                name, wrong_bytes = f"the file 'data/{file.path}'", "has other bytes than written"
                found.damages.append(Damage(start, stop, name, wrong_bytes))


def _say_unchecked(dataset: Any, rows: int, layout: Layout, found: Findings) -> None:
    if not rows:
        return
    others = layout.unlisted(dataset.schema)
    for name in others:
        found.unchecked.append(f"{name!r} is a column that actctx did not write")
    names = [name for name in dataset.schema.names if name not in others]
    if not any(found.compared.values()):
        found.unchecked = ["it has no digests, like data sets of older versions of actctx"]
        return
    for name in names:
        left = rows - found.compared.get(name, 0)
        if left:
            shown = repr(_known_as(name, layout))
            found.unchecked.append(f"{counted(left, 'row')} of {shown} have no digest")


def numbered(fragments: list[Any]) -> Iterator[tuple[int, int, Any]]:
    """Yield each fragment with its first row and the row after its last."""
    start = 0
    for fragment in fragments:
        stop = start + fragment.metadata.num_rows
        yield start, stop, fragment
        start = stop


def _known_as(column: str, layout: Layout) -> str:
    return next((site.name for site in layout.sites if site.column == column), column)
