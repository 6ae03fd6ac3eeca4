"""The place of a data set on disk: one writer at a time, and what is there already.

# NOTE [The lock]
It is one of the system's, on a file that stays in the data set's directory: the system lets go of
it however a process ends. It is made before all else: a directory without one, and without a
manifest, was not begun here, and nothing in it is touched.

# NOTE [Old versions]
Whoever opened the data set reads the version of then, whose manifest a later one replaces. So the
manifests that were the newest at any time in the last `_KEPT` stay; older ones are deleted before
more is written, but for those that somebody tagged.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from actctx._errors import DataError
from actctx._files import cannot_write, clear_leftovers, reason_of
from actctx._store.layout import (
    COUNTED,
    DIGEST,
    KEY,
    Layout,
    import_lance,
    layout_of,
    open_lance,
    unreadable,
)
from actctx._store.marks import NAME, Marks
from actctx._store.origins import Stored

if TYPE_CHECKING:
    import pyarrow as pa

_KEPT = timedelta(hours=1)
"""How long a version can be read after it was replaced, at least."""

_LOCK = "writing.lock"
_OWN = {"_versions", "_transactions", "_deletions", "_indices", _LOCK, NAME}
"""What a directory holds in which a data set was begun: no `data` before there is a manifest."""

_OF_THE_SYSTEM = {".DS_Store", "Thumbs.db", "desktop.ini"}
"""What file managers leave in directories, beside files whose names begin with `._`."""


class Target:
    """The place of a data set, locked, and what is there already.

    Args:
        path: Where the data set is, or is to be.

    Attributes:
        layout: What the data set says about itself; None where there is none yet, or one without
            rows, as where the first commit failed: that fixes nothing, and is made anew.
        rows: The number of rows that it has; whoever writes counts on.
        closing: What waits until all is written that was handed over.
        marks: Where its rows end in the input.

    Raises:
        DataError: There is something else, or somebody else is writing, or nobody can.

    """

    def __init__(self, path: Path) -> None:
        from filelock import FileLock, Timeout

        self.path = path
        self._lance = import_lance()
        clear_leftovers(path.parent)
        found = found_at(path)
        if found:
            raise DataError(
                f"'{path}' {found}, and no data set of actctx; give another path, or remove it"
            )
        try:
            self._is_new = not path.exists()
            path.mkdir(exist_ok=True)
            self._before = _names(path)
            self._lock = FileLock(path / _LOCK, timeout=0)
            self._lock.acquire()
        except Timeout:
            raise DataError(
                f"'{path}' is being written to by another extraction; wait until it has ended, or "
                "give another path"
            ) from None
        except OSError as error:
            raise unwritable(path, error) from None
        self.layout: Layout | None = None
        self.rows = 0
        self.schema: pa.Schema = None
        self.closing: Callable[[], None] | None = None
        self._is_empty = self._is_tidy = False
        if _has_manifest(path):
            self._open()
        self.marks = Marks(path, self.rows)

    def _open(self) -> None:
        try:
            dataset = open_lance(str(self.path))
            layout, self.rows = layout_of(dataset.schema, str(self.path)), dataset.count_rows()
        except BaseException:
            self.release()
            raise
        self._is_empty = not self.rows
        if self.rows:
            self.layout, self.schema = layout, dataset.schema

    def tidy(self) -> None:
        """Delete what writers left that were killed; see also the note on old versions."""
        dataset, now = self._lance.dataset(str(self.path)), datetime.now().astimezone()
        ages = [now - version["timestamp"].astimezone() for version in dataset.versions()]
        oldest = min((age for age in ages if age > _KEPT), default=_KEPT)
        with self._writing():
            dataset.cleanup_old_versions(
                older_than=oldest + timedelta(seconds=1),  # the age is told by now, a little later
                delete_unverified=True,
                error_if_tagged_old_versions=False,
            )
        self._is_tidy = True

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritable(self.path, error, self.rows) from error

    def stored(self, start: int = 0) -> Iterator[Stored]:
        """Read where the rows on disk come from, chunk by chunk, from one of them on."""
        dataset = self._lance.dataset(str(self.path))
        fragments = dataset.get_fragments()
        while fragments and start >= (rows := fragments[0].count_rows()):
            start -= rows
            fragments.pop(0)
        if not fragments:
            return
        scanner = dataset.scanner(
            columns=[*COUNTED, DIGEST],
            scan_in_order=True,
            fragments=fragments,
            offset=start,
        )
        try:
            for batch in scanner.to_batches():
                yield Stored(*(torch.from_numpy(each.to_numpy().copy()) for each in batch.columns))
        except (ValueError, OSError) as error:
            raise unreadable(str(self.path), error) from error

    def create(self, layout: Layout, carried: "pa.Schema") -> None:
        """Make a data set without rows, in the place of one that has none either.

        Raises:
            DataError: The system does not let it.

        """
        schema = layout.schema(carried)
        try:
            mode = "overwrite" if self._is_empty else "create"
            self._lance.write_dataset([], str(self.path), schema=schema, mode=mode)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self.layout, self.schema = layout, schema
        if self._is_empty or self._before - {_LOCK}:
            self.tidy()
        self._is_tidy = True

    def note_finished(self, *, finished: bool) -> None:
        """Note whether more rows are to come."""
        if self.layout is not None and self.layout.finished != finished:
            if not self._is_tidy:  # as where nothing was left to write
                self.tidy()
            self.layout = self.layout.as_finished(finished=finished)
            dataset = self._lance.dataset(str(self.path))
            with self._writing():
                dataset.update_schema_metadata({"actctx": self.layout.as_metadata()})

    def append(self, batches: Iterator["pa.RecordBatch"]) -> None:
        """Add rows in one commit."""
        import pyarrow as pa

        reader = pa.RecordBatchReader.from_batches(self.schema, batches)
        self._lance.write_dataset(reader, str(self.path), mode="append")

    def take_columns(self, other: "Target") -> None:
        """Add the sites of another data set, which has the same rows; see the note on adding."""
        import pyarrow as pa

        assert self.layout is not None  # noqa: S101  both have rows
        assert other.layout is not None  # noqa: S101
        self.tidy()
        self.layout = replace(self.layout, sites=(*self.layout.sites, *other.layout.sites))
        dataset, metadata = self._lance.dataset(str(self.path)), self.layout.as_metadata()
        added = [other.schema.field(site.column) for site in other.layout.sites]
        schema = pa.schema(added, metadata={KEY: metadata})
        scanner = self._lance.dataset(str(other.path)).scanner(
            columns=schema.names, scan_in_order=True
        )
        batches = (
            pa.RecordBatch.from_arrays(batch.columns, schema=schema)
            for batch in scanner.to_batches()
        )
        try:
            dataset.update_schema_metadata({"actctx": metadata})
            dataset.add_columns(pa.RecordBatchReader.from_batches(schema, batches))
        except (ValueError, OSError) as error:  # the first of Arrow, of what it could not read
            raise DataError(
                f"cannot add the sites to '{self.path}': {reason_of(error)}; nothing is lost, "
                f"since what is new lies in '{other.path}': make room, and the same call goes on "
                "with it"
            ) from error

    def release(self) -> None:
        """Let others write, once the writer has ended, however that goes.

        Where no data set came about, nothing is left of what was made for one.
        """
        try:
            if self.closing is not None:
                self.closing()
        finally:
            with contextlib.suppress(OSError):  # somebody else may have come, or put something in
                if self.layout is None and _names(self.path) - self._before == {_LOCK}:
                    (self.path / _LOCK).unlink()
            self._lock.release()
            with contextlib.suppress(OSError):
                if self.layout is None and self._is_new:
                    self.path.rmdir()


def found_at(path: Path) -> str:
    """Say what is at a path, where it is no data set and none was begun there."""
    try:
        if not path.is_dir():
            return "is a file" if path.exists() else ""
        if _has_manifest(path):
            return ""
        names = _names(path)
    except OSError as error:
        raise unwritable(path, error) from None
    is_begun = _LOCK in names and names <= _OWN
    return "is a directory of other things" if names and not is_begun else ""


def delete(path: Path) -> None:
    """Delete a data set, in an order by which what is half deleted is still known as one.

    Without a manifest a directory with `data` is taken for one of other things, and so is one
    without the lock.
    """
    if (path / "data").exists():
        shutil.rmtree(path / "data")
    for each in path.iterdir():
        if each.is_dir():
            shutil.rmtree(each)
    shutil.rmtree(path)


def _names(path: Path) -> set[str]:
    """Name what a directory holds, but for what file managers leave."""
    names = {each.name for each in path.iterdir()} - _OF_THE_SYSTEM
    return {name for name in names if not name.startswith("._")}


def _has_manifest(path: Path) -> bool:
    """Tell whether a Lance dataset is at a path, of whomever."""
    return any((path / "_versions").glob("*.manifest"))


def unwritable(path: Path, error: BaseException, rows: int = 0) -> DataError:
    """Say why nothing can be written."""
    remedy = "give another path"
    if rows:
        remedy = f"{rows} rows are on disk, and running it again goes on after them"
    elif "No space left" in reason_of(error):
        remedy = "make room there and run it again, or give another path"
    elif isinstance(error, FileNotFoundError) and not path.parent.exists():
        remedy = f"make the directory '{path.parent}' first"
    return cannot_write(path, error, remedy)
