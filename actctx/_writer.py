"""Writing rows to disk in a thread of its own: whole commits, one writer at a time.

# NOTE [Commits]
Lance streams rows into a file of its own, and makes them part of the data set in one step, by a new
manifest. A commit is made of `_COMMIT_BYTES`, or of what came in `_COMMIT_SECONDS`, so that neither
the number of files nor what a crash costs grows with the data set. What a crash leaves besides is a
file that no manifest knows, which the next writer deletes. The lock is one of the system's, on a
file that stays in the data set's directory: the system lets go of it however a process ends.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from actctx._choosing import Stored, Work
from actctx._column import wait_for
from actctx._errors import DataError
from actctx._layout import COUNTED, Layout, StoredSite, as_array, import_lance
from actctx._pipe import Pipe
from actctx._select import Owned
from actctx._table import dtype_name

if TYPE_CHECKING:
    import pyarrow as pa

_COMMIT_BYTES = 2**28
_COMMIT_SECONDS = 60.0
_WAITING = 4
"""The forwards whose rows wait to be written, at most."""

_OWN = {"_versions", "_transactions", "data", "writing.lock"}
"""What a directory holds in which a data set was begun."""


class Left(NamedTuple):
    """What one forward left: its rows, and the activations of each site."""

    work: Work
    activations: dict[str, Owned]


class Target:
    """The place of a data set, locked, and what is there already.

    Args:
        path: Where the data set is, or is to be.

    Attributes:
        layout: What the data set says about itself; None where there is none yet.
        rows: The number of rows that it has.

    Raises:
        DataError: There is something else, or somebody else is writing, or nobody can.

    """

    def __init__(self, path: Path) -> None:
        from filelock import FileLock, Timeout

        self.path = path
        self._lance = import_lance()
        found = _found_at(path)
        if found:
            raise DataError(
                f"'{path}' {found}, and no data set of actctx; give another path, or remove it"
            )
        try:
            path.mkdir(exist_ok=True)
            self._lock = FileLock(path / "writing.lock", timeout=0)
            self._lock.acquire()
        except Timeout:
            raise DataError(
                f"'{path}' is being written to by another process; wait until it has ended, or "
                "give another path"
            ) from None
        except OSError as error:
            raise unwritable(path, error) from None
        self.layout: Layout | None = None
        self.rows = 0
        self.schema: pa.Schema = None
        self.writer: Writer | None = None
        if (path / "_versions").is_dir() and any((path / "_versions").glob("*.manifest")):
            self._open()

    def _open(self) -> None:
        try:
            dataset = self._lance.dataset(str(self.path))
            self.layout = Layout.of(dataset.schema, self.path)
            self.schema = dataset.schema
            self.rows = dataset.count_rows()
        except BaseException:
            self.release()
            raise

    def tidy(self) -> None:
        """Delete what writers left that were killed, and manifests that were replaced."""
        self._lance.dataset(str(self.path)).cleanup_old_versions(
            older_than=timedelta(0), delete_unverified=True
        )

    def stored(self) -> Iterator[Stored]:
        """Read the tokens that are on disk, chunk by chunk."""
        scanner = self._lance.dataset(str(self.path)).scanner(
            columns=["token", "sequence"], scan_in_order=True
        )
        for batch in scanner.to_batches():
            token, sequence = (torch.from_numpy(each.to_numpy().copy()) for each in batch.columns)
            yield Stored(token, sequence)

    def create(self, layout: Layout, carried: "pa.Schema") -> None:
        """Make a data set without rows.

        Raises:
            DataError: The system does not let it.

        """
        self.layout, self.schema = layout, layout.schema(carried)
        try:
            self._lance.write_dataset([], str(self.path), schema=self.schema, mode="create")
        except OSError as error:
            raise unwritable(self.path, error) from error

    def note_finished(self, *, finished: bool) -> None:
        """Note whether more rows are to come."""
        if self.layout is not None and self.layout.finished != finished:
            self.layout = self.layout.as_finished(finished=finished)
            dataset = self._lance.dataset(str(self.path))
            dataset.update_schema_metadata({"actctx": self.layout.as_metadata()})

    def append(self, batches: Iterator["pa.RecordBatch"]) -> None:
        """Add rows in one commit."""
        import pyarrow as pa

        reader = pa.RecordBatchReader.from_batches(self.schema, batches)
        self._lance.write_dataset(reader, str(self.path), mode="append")

    def take_columns(self, other: "Target") -> None:
        """Add the sites of another data set, which has the same rows; see the note on adding."""
        assert self.layout is not None  # noqa: S101  both have rows
        assert other.layout is not None  # noqa: S101
        dataset = self._lance.dataset(str(self.path))
        added = [site.column for site in other.layout.sites]
        if not set(added) <= set(dataset.schema.names):
            scanner = self._lance.dataset(str(other.path)).scanner(
                columns=added, scan_in_order=True
            )
            try:
                dataset.add_columns(scanner.to_reader())
            except OSError as error:
                raise unwritable(self.path, error, self.rows) from error
        self.layout = replace(self.layout, sites=(*self.layout.sites, *other.layout.sites))
        dataset.update_schema_metadata({"actctx": self.layout.as_metadata()})

    def release(self) -> None:
        """Let others write, once the writer has ended, however that goes."""
        try:
            if self.writer is not None:
                self.writer.close()
        finally:
            self._lock.release()


def look_at(path: Path) -> tuple[int, Layout]:
    """Count the rows of a data set, and tell what it says about itself.

    Raises:
        DataError: There is none at the path.

    """
    try:
        dataset = import_lance().dataset(str(path))
    except ValueError:
        raise DataError(
            f"there is no data set at '{path}'; give the path that extract() wrote to"
        ) from None
    return dataset.count_rows(), Layout.of(dataset.schema, path)


def _found_at(path: Path) -> str:
    """Say what is at a path, where it is no data set and none was begun there."""
    try:
        if not path.is_dir():
            return "is a file" if path.exists() else ""
        others = {each.name for each in path.iterdir()} - _OWN - {"_deletions", "_indices"}
    except OSError as error:
        raise unwritable(path, error) from None
    return "is a directory of other things" if others else ""


def unwritable(path: Path, error: BaseException, rows: int = 0) -> DataError:
    """Say why nothing can be written."""
    reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "")
    kept = f"; {rows} rows are on disk, and running it again goes on behind them" if rows else ""
    return DataError(f"cannot write to '{path}': {reason}{kept}")


class Writer:
    """Writes what forwards leave, in a thread, while others run.

    Args:
        target: The data set, which has a layout.
        finite: Whether values that are no numbers, or infinite, are refused.

    Attributes:
        rows: The number of rows that were committed.
        error: What ended the writing, if something did.

    """

    def __init__(self, target: Target, *, finite: bool) -> None:
        self._target = target
        self._finite = finite
        self._pipe: Pipe[Left] = Pipe(_WAITING)
        self.rows = target.rows
        self.error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="actctx writer", daemon=True)
        target.writer = self
        self._thread.start()

    def put(self, left: Left) -> bool:
        """Hand over what a forward left, once there is room.

        Returns:
            Whether it will be written; not after an error.

        """
        return self._pipe.put(left)

    def close(self) -> None:
        """Write the rest, and wait until it is on disk.

        An interrupt is raised behind that: the lock must not be let go of while a thread writes,
        or whoever writes next writes the same rows.
        """
        interrupt: BaseException | None = None
        while self._thread.ident is not None and not self._ended.is_set():
            try:
                self._pipe.close()
                self._ended.wait()  # a join that was interrupted takes it for ended
            except BaseException as error:  # noqa: BLE001  raised again below
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _run(self) -> None:
        try:
            batches = self._batches()
            for first in batches:
                self._target.append(self._commit(first, batches))
                self.rows += self._pending
        except OSError as error:
            self.error = self.error or unwritable(self._target.path, error, self.rows)
            self.error.__cause__ = error
        except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
            self.error = self.error or error
        finally:
            self._pipe.abandon()
            self._ended.set()

    def _batches(self) -> Iterator["pa.RecordBatch"]:
        """Turn what comes into batches, up to an error, so that what came before is committed."""
        before = self._target.rows
        for left in self._pipe:
            try:
                batch = self._batch(left, before)
            except Exception as error:  # noqa: BLE001  as above
                self.error = error
                return
            before += batch.num_rows
            del left
            yield batch

    def _commit(
        self, first: "pa.RecordBatch", batches: Iterator["pa.RecordBatch"]
    ) -> Iterator["pa.RecordBatch"]:
        self._pending = first.num_rows
        nbytes, end = first.nbytes, time.monotonic() + _COMMIT_SECONDS
        yield first
        del first
        while nbytes < _COMMIT_BYTES and time.monotonic() < end:
            batch = next(batches, None)
            if batch is None:
                return
            self._pending += batch.num_rows
            nbytes += batch.nbytes
            yield batch

    def _batch(self, left: Left, before: int) -> "pa.RecordBatch":
        import pyarrow as pa

        work, layout, schema = left.work, self._target.layout, self._target.schema
        assert layout is not None  # noqa: S101  a writer begins behind it
        columns: list[Any] = [pa.array(getattr(work, name).numpy()) for name in COUNTED]
        rows = pa.array(work.within.numpy())
        kinds = {name: schema.field(name).type for name in layout.carried}
        columns += [carried_array(name, work, kind).take(rows) for name, kind in kinds.items()]
        for site in layout.sites:
            values = _alike(site, left, before)
            if self._finite:
                _check_finite(site.name, values, work, before)
            columns.append(as_array(values))
        return pa.RecordBatch.from_arrays(columns, schema=schema)


def _alike(site: StoredSite, left: Left, before: int) -> Shaped[Tensor, "row ..."]:
    """Return what a site left, of which each row must be as those before it.

    Raises:
        DataError: The site did not fire, or its rows have another shape or dtype.

    """
    if site.name not in left.activations:
        raise DataError(
            f"{site.name!r} did not fire in the forward behind row {before}, so its rows would be "
            "missing; leave it out"
        )
    values = wait_for(left.activations[site.name])
    shape, dtype = tuple(values.shape[1:]), dtype_name(values.dtype)
    if (shape, dtype) != (site.shape, site.dtype):
        raise DataError(
            f"{site.name!r} has rows of {dtype} {shape} from row {before} on, but those before are "
            f"{site.dtype} {site.shape}; give input of one length, or select what is alike with "
            "slice="
        )
    return values


def carried_array(name: str, work: Work, kind: Any = None) -> Any:
    """Make a column of what came along with sequences.

    Raises:
        DataError: It is of several types.

    """
    import pyarrow as pa

    values = work.batch.carried[name]
    try:
        return pa.array(values, type=kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        expected = "" if kind is None else f" {kind}"
        raise DataError(
            f"carry names {name!r}, whose values do not make a column{expected}: {error}; give "
            "ints, floats, bools or strings, of one type throughout"
        ) from None


def _check_finite(name: str, values: Shaped[Tensor, "row ..."], work: Work, before: int) -> None:
    if not values.numel() or all(map(torch.isfinite, torch.aminmax(values))):
        return
    at = int((~torch.isfinite(values)).flatten(1).any(1).nonzero()[0])
    found = values[at][~torch.isfinite(values[at])][0]
    raise DataError(
        f"{name!r} is {float(found)} in row {before + at}: token {int(work.token[at])} of sequence "
        f"{int(work.sequence[at])}, position {int(work.position[at])}; a cast to float16 makes "
        "infinite what is beyond 65504, which dtype=torch.bfloat16 holds; finite=False writes it "
        "as it is"
    )
