"""The place of a data set on disk: one writer at a time, and what is there already.

# NOTE [The lock]
It is one of the system's, on a file that stays in the data set's directory: the system lets go of
it however a process ends. It is made before all else: a directory without one, and without a
manifest, was not begun here, and nothing in it is touched.

A file system without locks, or somebody who deletes the file, lets two writers in. So before each
commit the newest version has to be the one that this writer made or opened, to the byte, and the
commit has to come right behind it: the second of two writers ends with an error.

# NOTE [Power cuts]
A commit is on the disk in an order by which a cut of power leaves it whole or not at all: data
files and their directory, digests, then the manifest, which makes them part of the data set, and
its directory. What a cut left that is not whole is deleted before more is written; see `_versions`.

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
from actctx._files import cannot_write, reason_of, sync
from actctx._model.known_faults import warn
from actctx._store.digests import (
    DIGESTS,
    Commit,
    Digest,
    add_lines,
    digest_file,
    line_of_metadata,
    read_digests,
)
from actctx._store.layout import (
    COUNTED,
    DIGEST,
    KEY,
    Layout,
    import_lance,
    layout_of,
    newest_whole,
)
from actctx._store.origins import Stored
from actctx._store.versions import manifests, torn_frame

if TYPE_CHECKING:
    import pyarrow as pa

_KEPT = timedelta(hours=1)
"""How long a version can be read after it was replaced, at least."""

_LOCK = "writing.lock"
_OWN = {"_versions", "_transactions", "_deletions", "_indices", _LOCK, DIGESTS}
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
        repairs: Whether a data set with gaps, which no older version is without, is opened.

    Attributes:
        layout: What the data set says about itself; None where there is none yet, or one without
            rows, as where the first commit failed: that fixes nothing, and is made anew.
        rows: The number of rows that it has.
        syncs: Whether what is committed is on the disk itself before more is written.
        damage: What is not whole of later versions, or of this one.
        dataset: The Lance dataset, of the version that this writer opened or made last.
        closing: What waits until all is written that was handed over.

    Raises:
        DataError: There is something else, or somebody else is writing, or nobody can.

    """

    def __init__(self, path: Path, *, sync: bool = True, repairs: bool = False) -> None:
        self.path = path
        self.syncs = sync
        self._repairs = repairs
        self._lance = import_lance()
        found = found_at(path)
        if found:
            raise DataError(
                f"'{path}' {found}, and no data set of actctx; give another path, or remove it"
            )
        try:
            self._is_new = not path.exists()
            path.mkdir(exist_ok=True)
            self._before = _names(path)
            self._lock = _locked(path)
        except OSError as error:
            raise unwritable(path, error) from None
        self.layout: Layout | None = None
        self.rows = 0
        self.schema: pa.Schema = None
        self.dataset: Any = None
        self.closing: Callable[[], None] | None = None
        self._is_empty = False
        self._newest = ""
        self._torn: tuple[Path, ...] = ()
        self.damage: tuple[str, ...] = ()
        if _has_manifest(path):
            self._open()

    def _open(self) -> None:
        try:
            self._find()
        except BaseException:
            self.release()
            raise

    def _find(self) -> None:
        """Open the newest version that is whole."""
        if _LOCK in self._before and _was_cut_at_birth(self.path):
            return
        found = newest_whole(str(self.path))
        if found.has_gaps and not self._repairs:
            raise DataError(f"cannot go on with it: {found.lost}; {found.remedy}")
        layout = layout_of(found.opened.schema, str(self.path))
        if found.lost and not self._repairs:
            warn(f"{found.lost}; {found.remedy}")
        self.damage = (found.lost,) if found.lost else ()
        self._torn = found.torn
        self._own(found.opened)
        self._is_empty = not self.rows
        if self.rows:
            self.layout, self.schema = layout, found.opened.schema

    def _own(self, dataset: Any) -> None:
        """Take note of the newest version, which this writer opened, or made."""
        self.dataset, self.rows = dataset, dataset.count_rows()
        self._newest = _fingerprint(self.path, dataset.version)

    def _check_own(self, version: int | None = None) -> None:
        """Make sure that nobody else wrote since the last commit.

        Args:
            version: The version that is about to be made, where that is known.

        Raises:
            DataError: Somebody did.

        """
        own = self.dataset.version
        newest = next(iter(manifests(self.path)), 0)
        if (
            newest != own
            or version not in {None, own + 1}
            or _fingerprint(self.path, own) != self._newest
        ):
            raise DataError(
                f"'{self.path}' was written to by somebody else: its newest version is {newest}, "
                f"but {own}, of {self.rows} rows, was the last of this writer; nothing of it is "
                "added: let one writer end, then call it again, and it goes on after what is there"
            )

    def _settle(self) -> None:
        """Delete the manifests that a cut of power left torn, which Lance fails on."""
        torn = [each for each in manifests(self.path).values() if torn_frame(each)]
        for file in {*torn, *self._torn}:
            file.unlink(missing_ok=True)
        if torn or self._torn:
            self._sync(self.path / "_versions")
        self._torn = ()

    def tidy(self) -> None:
        """Delete what writers left that were killed; see also the note on old versions."""
        with self._writing():
            self._settle()
            self._check_own()
            dataset, now = self.dataset, datetime.now().astimezone()
            ages = [now - version["timestamp"].astimezone() for version in dataset.versions()]
            oldest = min((age for age in ages if age > _KEPT), default=_KEPT)
            dataset.cleanup_old_versions(
                older_than=oldest + timedelta(seconds=1),  # the age is told by now, a little later
                delete_unverified=self._lock is not None,  # else another may be writing them
                error_if_tagged_old_versions=False,
            )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritable(self.path, error, self.rows) from error

    def stored(self) -> Iterator[Stored]:
        """Read where the rows on disk come from, chunk by chunk."""
        scanner = self.dataset.scanner(columns=[*COUNTED, DIGEST], scan_in_order=True)
        for batch in scanner.to_batches():
            yield Stored(*(torch.from_numpy(each.to_numpy().copy()) for each in batch.columns))

    def create(self, layout: Layout, carried: "pa.Schema") -> None:
        """Make a data set without rows, in the place of one that has none either.

        Raises:
            DataError: The system does not let it.

        """
        schema = layout.schema(carried)
        try:
            self._settle()
            if self._is_empty:
                self._check_own()
            self._note([line_of_metadata(layout.as_metadata())])
            mode = "overwrite" if self._is_empty else "create"
            made = self._lance.write_dataset([], str(self.path), schema=schema, mode=mode)
            self._own(made)
            self._sync_commit()
            self._sync(self.path.parent)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self.layout, self.schema = layout, schema
        if self._is_empty:
            self.tidy()

    def note_finished(self, *, finished: bool) -> None:
        """Note whether more rows are to come."""
        if self.layout is not None and self.layout.finished != finished:
            self.layout = self.layout.as_finished(finished=finished)
            with self._writing():
                self._settle()
                self._note_metadata(self.layout)

    def _note_metadata(self, layout: Layout) -> None:
        """Write anew what the data set says about itself."""
        self._check_own()
        metadata = layout.as_metadata()
        self._note([line_of_metadata(metadata)])
        self.dataset.update_schema_metadata({"actctx": metadata})
        self._own(self.dataset)
        self._sync_commit()

    def append(self, batches: Iterator["pa.RecordBatch"]) -> None:
        """Add rows in one commit, and count them.

        Raises:
            DataError: Somebody else wrote to the data set, too.
            OSError: The system does not let it.

        """
        import pyarrow as pa
        from lance.fragment import write_fragments

        digests = {name: Digest() for name in self.schema.names}
        reader = pa.RecordBatchReader.from_batches(self.schema, _digested(batches, digests))
        written = write_fragments(reader, self.dataset, mode="append", return_transaction=True)
        fragments = written.operation.fragments
        rows = self.rows + sum(fragment.physical_rows for fragment in fragments)
        columns = {name: digest.hex() for name, digest in digests.items()}
        files = self._settled_files([file.path for each in fragments for file in each.files])
        self._note([Commit(self.rows, rows, columns, files).line()])
        self._commit(written)
        if self.rows != rows or not all((self.path / "data" / name).exists() for name in files):
            raise DataError(
                f"somebody else writes to '{self.path}', too, and took files of {rows} rows for "
                "left over, or added others: let one writer end, then call it again"
            )

    def _settled_files(self, names: list[str]) -> dict[str, str]:
        """Sync data files that were written, and make their digests.

        Raises:
            OSError: One is missing, as where another writer took it for one that was left over.

        """
        data = self.path / "data"
        try:
            for name in names:
                self._sync(data / name)
            self._sync(data)
            return {name: digest_file(data / name) for name in names}
        except FileNotFoundError:
            self._check_own()
            raise

    def _commit(self, transaction: Any) -> None:
        """Make what was written part of the data set, right behind this writer's last version."""
        refused: list[DataError] = []

        @contextlib.contextmanager
        def checked(version: int) -> Iterator[None]:
            try:
                self._check_own(version)
            except DataError as error:
                refused.append(error)
                raise
            yield

        try:
            self._check_own()
            made = self._lance.LanceDataset.commit(
                self.dataset, transaction, commit_lock=checked, max_retries=1
            )
        except (OSError, RuntimeError, ValueError):
            if refused:
                raise refused[0] from None
            raise
        self._own(made)
        self._sync_commit()

    def _note(self, lines: list[str]) -> None:
        """Write lines of digests, which are on the disk before what they are of."""
        self._sync(add_lines(self.path, lines))
        self._sync(self.path)

    def _sync_commit(self) -> None:
        """Sync what makes the last commit part of the data set."""
        if not self.syncs:
            return
        self._sync(manifests(self.path)[self.dataset.version])
        for name in ("_transactions", "_versions"):
            if (self.path / name).is_dir():
                self._sync(self.path / name)
        self._sync(self.path)

    def _sync(self, path: Path) -> None:
        if self.syncs:
            sync(path)

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
        scanner = other.dataset.scanner(columns=schema.names, scan_in_order=True)
        batches = (
            pa.RecordBatch.from_arrays(batch.columns, schema=schema)
            for batch in scanner.to_batches()
        )
        try:
            self._note_metadata(self.layout)
            self._note(_lines_of(other, schema.names))
            before = {file.path for file in _data_files(self.dataset)}
            self.dataset.add_columns(pa.RecordBatchReader.from_batches(schema, batches))
            self._own(self.dataset)
            self._settle_columns(before)
        except OSError as error:
            raise DataError(
                f"cannot add the sites to '{self.path}': {reason_of(error)}; nothing is lost, "
                f"since what is new lies in '{other.path}': make room, and the same call goes on "
                "with it"
            ) from error

    def _settle_columns(self, before: set[str]) -> None:
        """Sync the files of columns that were added, and note their digests."""
        start, lines = 0, []
        for fragment in self.dataset.get_fragments():
            added = [file.path for file in fragment.metadata.files if file.path not in before]
            stop = start + fragment.metadata.num_rows
            lines.append(Commit(start, stop, {}, self._settled_files(added)).line())
            start = stop
        self._sync_commit()
        self._note(lines)

    def drop(self, fragments: list[int]) -> None:
        """Drop what is not whole: torn manifests, and the rows of fragments, in one commit each.

        The files of the rows are deleted once something is written.
        """
        with self._writing():
            self._settle()
            if not fragments:
                return
            if self.layout is not None:
                self.note_finished(finished=False)
            dropped = self._lance.LanceOperation.Delete([], fragments, "true")
            made = self._lance.LanceDataset.commit(
                self.dataset, dropped, read_version=self.dataset.version
            )
            self._own(made)
            self._sync_commit()

    def release(self) -> None:
        """Let others write, once the writer has ended, however that goes.

        Where no data set came about, nothing is left of what was made for one.
        """
        try:
            if self.closing is not None:
                self.closing()
        finally:
            with contextlib.suppress(OSError):  # somebody else may have come, or put something in
                if self.layout is None and _names(self.path) - self._before <= {_LOCK, DIGESTS}:
                    for name in _names(self.path) - self._before:
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


def _fingerprint(path: Path, version: int) -> str:
    """Tell one manifest of a version from another; empty where there is none."""
    file = manifests(path).get(version)
    try:
        return "" if file is None else digest_file(file)
    except FileNotFoundError:
        return ""


def _digested(
    batches: Iterator["pa.RecordBatch"], digests: dict[str, Digest]
) -> Iterator["pa.RecordBatch"]:
    for batch in batches:
        for digest, column in zip(digests.values(), batch.columns, strict=True):
            digest.add(column)
        yield batch


def _lines_of(other: Target, columns: list[str]) -> list[str]:
    """Write the digests of some columns of another data set."""
    commits = read_digests(str(other.path)).commits
    known = [
        replace(each, columns={name: each.columns[name] for name in columns}, files={})
        for each in commits
        if each.stop <= other.rows and {*columns} <= {*each.columns}
    ]
    return [commit.line() for commit in known]


def _data_files(dataset: Any) -> Iterator[Any]:
    for fragment in dataset.get_fragments():
        yield from fragment.metadata.files


def _was_cut_at_birth(path: Path) -> bool:
    """Tell whether all there is are manifests that are torn, and no rows."""
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
