"""The place of a data set on disk: locked for one writer, and what is there already.

# NOTE [The lock]
It is one of the system's, on a file that stays in the data set's directory: the system lets go of
it however a process ends. It is made before all else: a directory without one, and without a
manifest, was not begun here, and nothing in it is touched.

A file system may have none, and somebody may delete the file; see the note on two writers.

# NOTE [Old versions]
Whoever opened the data set reads the version of then, whose manifest a later one replaces. So the
manifests that were the newest at any time in the last `_KEPT` stay; older ones are deleted before
more is written, but for those that somebody tagged.
"""

import contextlib
import errno
import inspect
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from actctx._errors import DataError
from actctx._files import cannot_write, clear_leftovers, reason_of
from actctx._model.known_faults import warn
from actctx._store.commits import Commits
from actctx._store.digests import DIGESTS, Commit, read_digests
from actctx._store.layout import COUNTED, DIGEST, KEY, Layout, layout_of
from actctx._store.marks import NAME, Marks
from actctx._store.origins import Stored
from actctx._store.validation import REOPEN, Files, check_fragments, elements_of, reading
from actctx._store.versions import manifests, newest_whole, torn_frame

if TYPE_CHECKING:
    import pyarrow as pa

_KEPT = timedelta(hours=1)
"""How long a version can be read after it was replaced, at least."""

_LOCK = "writing.lock"
_OWN = {"_versions", "_transactions", "_deletions", "_indices", _LOCK, DIGESTS, NAME}
"""What a directory holds in which a data set was begun: no `data` before there is a manifest."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What the system says of locks on a file system that has none."""

_OF_THE_SYSTEM = {".DS_Store", "Thumbs.db", "desktop.ini"}
"""What file managers leave in directories, beside files whose names begin with `._`."""


class Target:
    """The place of a data set, locked, and what is there already.

    Args:
        path: Where the data set is, or is to be.
        sync: Whether what is committed is on the disk itself before more is written.
        repairs: Whether a data set with gaps, which no older version is without, is opened, too.

    Attributes:
        layout: What the data set says about itself; None where there is none yet, or one without
            rows, as where the first commit failed: that fixes nothing, and is made anew.
        lost: What is damaged of the newest versions; empty where nothing is.
        closing: What waits until all is written that was handed over.
        marks: Where its rows end in the input.

    Raises:
        DataError: There is something else, or somebody else is writing, or nobody can.

    Warns:
        UserWarning: The newest version is damaged, and an older one is resumed; or the file system
            has no locks.

    """

    def __init__(self, path: Path, *, sync: bool = True, repairs: bool = False) -> None:
        self.path = path
        clear_leftovers(path.parent)
        found = found_at(path)
        if found:
            raise DataError(
                f"'{path}' {found}, and no data set of actctx; give another path, or remove it"
            )
        self.layout: Layout | None = None
        self.schema: pa.Schema = None
        self.lost = ""
        self.closing: Callable[[], None] | None = None
        self._commits = Commits(path, syncs=sync)
        self._repairs = repairs
        self._is_empty = self._is_tidy = False
        try:
            self._is_new = not path.exists()
            path.mkdir(exist_ok=True)
            self._before = _names(path)
            self._lock = _locked(path)
        except OSError as error:
            raise unwritable(path, error) from None
        if _has_manifest(path):
            self._open()
        self.marks = Marks(path, self.rows)

    @property
    def rows(self) -> int:
        """The number of rows that it has."""
        return self._commits.rows

    @property
    def syncs(self) -> bool:
        """Whether what is committed is on the disk itself before more is written."""
        return self._commits.syncs

    @property
    def dataset(self) -> Any:
        """The Lance dataset, of the version that was opened, or made last."""
        return self._commits.dataset

    def _open(self) -> None:
        try:
            if _LOCK not in self._before or not _was_cut_at_birth(self.path):
                self._find()
        except BaseException:
            self.release()
            raise

    def _find(self) -> None:
        """Open the newest version that is whole."""
        found = newest_whole(str(self.path))
        if found.has_gaps and not self._repairs:
            raise DataError(f"{found.lost}; {found.remedy}")
        layout = layout_of(found.opened, str(self.path))
        if found.lost and not self._repairs:
            warn(f"{found.lost}; {found.remedy}")
        self.lost, self._commits.torn = found.lost, found.torn
        with reading(str(self.path)):
            self._commits.start_from(found.opened)
            check_fragments(found.opened, layout.columns(layout.sites), str(self.path))
        self._is_empty = not self.rows
        if self.rows:
            self.layout, self.schema = layout, found.opened.schema

    def tidy(self) -> None:
        """Delete what writers left that were killed; see also the note on old versions."""
        with self._writing():
            self._commits.clear()
            self._commits.check()
        with reading(str(self.path)):
            now = datetime.now().astimezone()
            ages = [now - each["timestamp"].astimezone() for each in self.dataset.versions()]
        oldest = min((age for age in ages if age > _KEPT), default=_KEPT)
        with self._writing():
            self.dataset.cleanup_old_versions(
                older_than=oldest + timedelta(seconds=1),  # the age is told by now, a little later
                delete_unverified=self._lock is not None,  # else another may be writing them
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
        """Read where the rows on disk come from, chunk by chunk, beginning at one of them.

        Raises:
            DataError: They cannot be read.

        """
        with reading(str(self.path), "rows of", remedy=REOPEN):
            files = Files(self.dataset, str(self.path))
            for table in files.take_all([*COUNTED, DIGEST], start):
                if empty := [name for name in table.column_names if table[name].null_count]:
                    raise ValueError(f"rows have nothing in its column {empty[0]!r}")
                yield Stored(*(torch.from_numpy(each.to_numpy().copy()) for each in table.columns))

    def create(self, layout: Layout, carried: "pa.Schema") -> None:
        """Make a data set without rows, in the place of one that has none either.

        Raises:
            DataError: The file system refuses it.

        """
        schema = layout.schema(carried)
        try:
            self._commits.create(schema, layout.as_metadata(), anew=self._is_empty)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self.layout, self.schema = layout, schema
        if self._is_empty or self._before - {_LOCK}:
            self.tidy()
        self._is_tidy = True

    def note_finished(self, *, finished: bool) -> None:
        """Record whether more rows are to come."""
        if self.layout is not None and self.layout.finished != finished:
            if not self._is_tidy:  # as where nothing was left to write
                self.tidy()
            self.layout = self.layout.as_finished(finished=finished)
            with self._writing():
                self._commits.describe(self.layout.as_metadata())

    def append(self, batches: Iterator["pa.RecordBatch"]) -> None:
        """Add rows in one commit, and count them.

        Raises:
            DataError: Another writer wrote to the data set.
            OSError: The file system refuses it.

        """
        self._commits.append(batches, self.schema)

    def take_columns(self, other: "Target") -> None:
        """Add the sites of another data set, which has the same rows; see the note on adding."""
        import pyarrow as pa

        assert self.layout is not None  # noqa: S101  both have rows
        assert other.layout is not None  # noqa: S101
        self.tidy()
        self.layout = replace(self.layout, sites=(*self.layout.sites, *other.layout.sites))
        metadata = self.layout.as_metadata()
        added = [other.schema.field(site.column) for site in other.layout.sites]
        schema = pa.schema(added, metadata={KEY: metadata})
        with reading(str(other.path)):
            Files(other.dataset, str(other.path)).check()
            scanner = other.dataset.scanner(columns=schema.names, scan_in_order=True)

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
                f"since what is new lies in '{other.path}': make room, and the same call goes on "
                "with it"
            ) from error

    def drop(self, fragments: list[int]) -> None:
        """Drop what is not whole: torn manifests, and the rows of some fragments.

        The files of the rows are deleted once more is written.
        """
        with self._writing():
            self._commits.clear()
        if fragments:
            self.note_finished(finished=False)
            with self._writing():
                self._commits.drop(fragments)

    def release(self) -> None:
        """Let others write, once the writer has ended, however that goes.

        Where no data set came about, nothing is left of what was made for one.
        """
        try:
            if self.closing is not None:
                self.closing()
        finally:
            with contextlib.suppress(OSError):  # somebody else may have come, or put something in
                made = _names(self.path) - self._before
                if self.layout is None and made <= {_LOCK, DIGESTS}:
                    for name in made:
                        (self.path / name).unlink()
            if self._lock is not None:
                self._lock.release()
            with contextlib.suppress(OSError):
                if self.layout is None and self._is_new:
                    self.path.rmdir()


def _locked(path: Path) -> Any:
    """Lock a data set's directory; None, with a warning, where the file system has no locks.

    Raises:
        DataError: Somebody else holds the lock.
        OSError: The file of the lock cannot be written.

    """
    from filelock import FileLock, Timeout

    options: dict[str, Any] = {"timeout": 0}
    if "fallback_to_soft" in inspect.signature(FileLock).parameters:
        options["fallback_to_soft"] = False  # which a killed process would leave behind
    lock = FileLock(path / _LOCK, **options)
    try:
        lock.acquire()
    except Timeout:
        raise DataError(
            f"'{path}' is being written to by another extraction; wait until it has ended, or "
            "give another path"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        warn(
            f"'{path}' lies on a file system without locks, so a second writer is noticed only "
            "when one of the two commits, and its work is lost: start one at a time"
        )
        return None
    return lock


def _digests_of(other: Target, columns: list[str]) -> list[str]:
    """Write the digests of some columns of another data set, as far as there are any."""
    known = []
    for commit in read_digests(str(other.path)).commits:
        some = {name: each for name, each in commit.columns.items() if name in columns}
        if commit.stop <= other.rows:
            known.append(Commit(commit.start, commit.stop, some).line())
    return known


def _was_cut_at_birth(path: Path) -> bool:
    """Return whether all there is are manifests that are torn, and no rows."""
    has_data = (path / "data").is_dir() and any((path / "data").iterdir())
    return not has_data and all(map(torn_frame, manifests(path).values()))


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
    """Return whether a Lance dataset is at a path, of whomever."""
    return any((path / "_versions").glob("*.manifest"))


def unwritable(path: Path, error: BaseException, rows: int = 0) -> DataError:
    """Explain why nothing can be written."""
    remedy = "give another path"
    if rows:
        remedy = f"{rows} rows are on disk, and running it again goes on after them"
    elif "No space left" in reason_of(error):
        remedy = "make room there and run it again, or give another path"
    elif isinstance(error, FileNotFoundError) and not path.parent.exists():
        remedy = f"make the directory '{path.parent}' first"
    return cannot_write(path, error, remedy)
