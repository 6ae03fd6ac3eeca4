"""The place of a data set on disk, locked for one writer.

# NOTE [The lock]
It is one of the system's, on a file that stays in the data set's directory: the system lets go of
it however a process ends. It is made before all else: a directory without one, and without a
manifest, was not begun here, and nothing in it is touched.

A file system may have none, and somebody may delete the file; see the note on two writers.
"""

import contextlib
import errno
import inspect
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actctx._errors import DataError
from actctx._files import clear_leftovers
from actctx._model.known_faults import warn
from actctx._store.commits import Commits
from actctx._store.contents import Contents, unwritable, writing
from actctx._store.digests import DIGESTS
from actctx._store.layout import Layout, layout_of
from actctx._store.marks import NAME, Marks
from actctx._store.validation import check_fragments, reading
from actctx._store.versions import manifests, newest_whole, torn_frame

if TYPE_CHECKING:
    import pyarrow as pa

_LOCK = "writing.lock"
_OWN = {"_versions", "_transactions", "_deletions", "_indices", _LOCK, DIGESTS, NAME}
"""What a directory holds in which a data set was begun: no `data` before there is a manifest."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What the system says of locks on a file system that has none."""

_OF_THE_SYSTEM = {".DS_Store", "Thumbs.db", "desktop.ini"}
"""What file managers leave in directories, beside files whose names begin with `._`."""


class Destination:
    """The place of a data set, locked for one writer.

    Args:
        path: Where the data set is, or is to be.
        sync: Whether each commit is on the disk itself before more is written.
        repairs: Whether a data set with gaps is opened, of which no older version is whole.

    Attributes:
        contents: The data set that is there. None if there is none, or none with rows, as when its
            first commit failed: such a data set fixes nothing, and is made anew.
        damage: What is damaged of the newest versions; empty if nothing is.

    Raises:
        DataError: There is something else at the path, or it is locked, or cannot be written to.

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
                f"'{path}' {found}, not a data set of actctx; give another path, or remove it"
            )
        self.contents: Contents | None = None
        self.damage = ""
        self._commits = Commits(path, syncs=sync)
        self._repairs = repairs
        try:
            self._is_new = not path.exists()
            path.mkdir(exist_ok=True)
            self._before = _names(path)
            self._lock = _locked(path)
        except OSError as error:
            raise unwritable(path, error) from None
        if _has_manifest(path):
            self._open()

    @property
    def row_count(self) -> int:
        """The number of rows that are on disk."""
        return self._commits.row_count

    @property
    def syncs(self) -> bool:
        """Whether each commit is on the disk itself before more is written."""
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
        self.damage, self._commits.torn = found.lost, found.torn
        with reading(str(self.path)):
            self._commits.start_from(found.opened)
            check_fragments(found.opened, layout.columns(layout.sites), str(self.path))
        if self.row_count:
            self.contents = self._with(layout, found.opened.schema)

    def _with(self, layout: Layout, schema: "pa.Schema") -> Contents:
        return Contents(
            self._commits,
            layout,
            schema,
            marks=Marks(self.path, self.row_count),
            is_locked=self._lock is not None,
        )

    def create(self, layout: Layout, carried: "pa.Schema") -> Contents:
        """Make a data set without rows, in the place of one that has none either.

        Raises:
            DataError: The file system refuses it.

        """
        schema = layout.schema(carried)
        is_there = self.dataset is not None
        try:
            self._commits.create(schema, layout.as_metadata(), anew=is_there)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self.contents = self._with(layout, schema)
        self.contents.tidy(is_needed=is_there or bool(self._before - {_LOCK}))
        return self.contents

    def drop(self, fragments: list[int]) -> None:
        """Drop what is not whole: torn manifests, and the rows of some fragments.

        The files of the rows are deleted once more is written.
        """
        with writing(self.path, self.row_count):
            self._commits.clear()
        if not fragments:
            return
        if self.contents is not None:
            self.contents.record_finished(finished=False)
        with writing(self.path, self.row_count):
            self._commits.drop(fragments)

    def release(self) -> None:
        """Let others write, once the writer has ended, however that goes.

        If no data set came about, nothing is left of what was made for one.
        """
        try:
            if self.contents is not None:
                self.contents.closing()
        finally:
            with contextlib.suppress(OSError):  # somebody else may have come, or put something in
                made = _names(self.path) - self._before
                if self.contents is None and made <= {_LOCK, DIGESTS}:
                    for name in made:
                        (self.path / name).unlink()
            if self._lock is not None:
                self._lock.release()
            with contextlib.suppress(OSError):
                if self.contents is None and self._is_new:
                    self.path.rmdir()


def _locked(path: Path) -> Any:
    """Lock a data set's directory; None, with a warning, where the file system has no locks."""
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
            f"'{path}' is on a file system without locks, so a second writer is noticed only when "
            "one of the two commits, and its work is lost; start one at a time"
        )
        return None
    return lock


def _was_cut_at_birth(path: Path) -> bool:
    """Return whether all there is are manifests that are torn, and no rows."""
    has_data = (path / "data").is_dir() and any((path / "data").iterdir())
    return not has_data and all(map(torn_frame, manifests(path).values()))


def found_at(path: Path) -> str:
    """Return what is at a path if it is not a data set; empty if it is one, or nothing is there."""
    try:
        if not path.is_dir():
            return "is a file" if path.exists() else ""
        if _has_manifest(path):
            return ""
        names = _names(path)
    except OSError as error:
        raise unwritable(path, error) from None
    is_begun = _LOCK in names and names <= _OWN
    return "is a directory with other content" if names and not is_begun else ""


def delete(path: Path) -> None:
    """Delete a data set, in an order that leaves it recognizable if interrupted.

    A directory with `data` but no manifest, or without the lock, is not taken for a data set.
    """
    if (path / "data").exists():
        shutil.rmtree(path / "data")
    for each in path.iterdir():
        if each.is_dir():
            shutil.rmtree(each)
    shutil.rmtree(path)


def _names(path: Path) -> set[str]:
    """List the names in a directory, except those that file managers leave."""
    names = {each.name for each in path.iterdir()} - _OF_THE_SYSTEM
    return {name for name in names if not name.startswith("._")}


def _has_manifest(path: Path) -> bool:
    """Return whether a Lance dataset is at a path, whoever wrote it."""
    return any((path / "_versions").glob("*.manifest"))
