"""A data set on disk that is written to: rows, sites, and what it says about itself.

# NOTE [Old versions]
A data set that is open is read at the version of its opening, whose manifest a later one replaces.
So the manifests that were the newest at any time in the last `_KEPT` stay; older ones are deleted
before more is written, unless they are tagged.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from actctx._errors import DataError
from actctx._files import cannot_write, reason_of
from actctx._store.commits import Commits
from actctx._store.digests import Commit, read_digests
from actctx._store.layout import COUNTED, DIGEST, KEY, Layout
from actctx._store.marks import Marks
from actctx._store.origins import Origins
from actctx._store.validation import REOPEN, Files, elements_of, reading

if TYPE_CHECKING:
    import pyarrow as pa

_KEPT = timedelta(hours=1)
"""How long a version can be read after it was replaced, at least."""


class Contents:
    """A data set on disk, locked for its writer.

    Args:
        commits: Commits what is written.
        layout: What the data set says about itself.
        schema: The schema of its columns.
        marks: Where its rows end in the input.
        is_locked: Whether the file system has locks.

    Attributes:
        closing: Waits until everything that was handed over is written.

    """

    def __init__(
        self,
        commits: Commits,
        layout: Layout,
        schema: "pa.Schema",
        *,
        marks: Marks,
        is_locked: bool,
    ) -> None:
        self.path = commits.path
        self.layout, self.schema = layout, schema
        self.marks = marks
        self.closing: Callable[[], None] = lambda: None
        self._commits = commits
        self._is_locked = is_locked
        self._is_tidy = False

    @property
    def row_count(self) -> int:
        """The number of rows that are on disk."""
        return self._commits.row_count

    def tidy(self, *, is_needed: bool = True) -> None:
        """Delete what killed writers left, and versions that are old enough.

        Args:
            is_needed: Whether there can be any of it.

        """
        self._is_tidy = True
        if not is_needed:
            return
        with writing(self.path, self.row_count):
            self._commits.clear()
            self._commits.check()
        with reading(str(self.path)):
            now = datetime.now().astimezone()
            ages = [
                now - each["timestamp"].astimezone() for each in self._commits.dataset.versions()
            ]
        oldest = min((age for age in ages if age > _KEPT), default=_KEPT)
        with writing(self.path, self.row_count):
            self._commits.dataset.cleanup_old_versions(
                older_than=oldest + timedelta(seconds=1),  # the age is told by now, a little later
                delete_unverified=self._is_locked,  # else another may be writing them
                error_if_tagged_old_versions=False,
            )

    def origins(self, start: int = 0) -> Iterator[Origins]:
        """Read where the rows on disk come from, chunk by chunk, beginning at one of them.

        Raises:
            DataError: They cannot be read.

        """
        with reading(str(self.path), "rows of", remedy=REOPEN):
            files = Files(self._commits.dataset, str(self.path))
            for table in files.take_all([*COUNTED, DIGEST], start):
                if empty := [name for name in table.column_names if table[name].null_count]:
                    raise ValueError(f"rows have no value in its column {empty[0]!r}")
                yield Origins(*(torch.from_numpy(each.to_numpy().copy()) for each in table.columns))

    def record_finished(self, *, finished: bool) -> None:
        """Record whether more rows are to come."""
        if self.layout.finished == finished:
            return
        if not self._is_tidy:  # as where nothing was left to write
            self.tidy()
        self.layout = replace(self.layout, finished=finished)
        with writing(self.path, self.row_count):
            self._commits.describe(self.layout.as_metadata())

    def append(self, batches: Iterator["pa.RecordBatch"]) -> None:
        """Add rows in one commit, and count them.

        Raises:
            DataError: Another writer wrote to the data set.
            OSError: The file system refuses it.

        """
        self._commits.append(batches, self.schema)

    def take_columns(self, other: "Contents") -> None:
        """Add the sites of another data set with the same rows; see `_extract/add_sites.py`."""
        import pyarrow as pa

        self.tidy()
        self.layout = replace(self.layout, sites=(*self.layout.sites, *other.layout.sites))
        metadata = self.layout.as_metadata()
        added = [other.schema.field(site.column) for site in other.layout.sites]
        schema = pa.schema(added, metadata={KEY: metadata})
        with reading(str(other.path)):
            Files(other._commits.dataset, str(other.path)).check()
            scanner = other._commits.dataset.scanner(columns=schema.names, scan_in_order=True)

        def checked(batch: pa.RecordBatch) -> pa.RecordBatch:
            for field, column in zip(schema, batch.columns, strict=True):
                elements_of(field.name, column, field.type)
            return pa.RecordBatch.from_arrays(batch.columns, schema=schema)

        batches = map(checked, scanner.to_batches())
        digests = _digests_of(other, schema.names)
        try:
            self._commits.describe(metadata)
            self._commits.add_columns(batches, schema, digests)
        except DataError:
            raise
        except (ValueError, OSError) as error:  # the first of Arrow, of what it could not read
            raise DataError(
                f"cannot add the sites to '{self.path}': {reason_of(error)}; nothing is lost, "
                f"since the new columns are in '{other.path}': free space, then the same call "
                "resumes"
            ) from error


def _digests_of(other: Contents, columns: list[str]) -> list[str]:
    """Write the digests of some columns of another data set, as far as there are any."""
    known = []
    for commit in read_digests(str(other.path)).commits:
        some = {name: each for name, each in commit.columns.items() if name in columns}
        if commit.stop <= other.row_count:
            known.append(Commit(commit.start, commit.stop, some).line())
    return known


@contextlib.contextmanager
def writing(path: Path, row_count: int = 0) -> Iterator[None]:
    """Turn what the file system raises in the block into a `DataError`.

    Raises:
        DataError: It raised something.

    """
    try:
        yield
    except OSError as error:
        raise unwritable(path, error, row_count) from error


def unwritable(path: Path, error: BaseException, rows: int = 0) -> DataError:
    """Explain why nothing can be written."""
    remedy = "give another path"
    if rows:
        remedy = f"{rows} rows are on disk, and running it again resumes after them"
    elif "No space left" in reason_of(error):
        remedy = "free space there and run it again, or give another path"
    elif isinstance(error, FileNotFoundError) and not path.parent.exists():
        remedy = f"make the directory '{path.parent}' first"
    return cannot_write(path, error, remedy)
