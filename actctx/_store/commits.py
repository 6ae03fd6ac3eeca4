"""Commit the rows of one writer in an order that survives a cut of power.

# NOTE [Order]
A commit is on the disk in an order by which a cut of power leaves it whole or not at all: data
files and their directory, their digests, then the manifest, which makes them part of the data set,
and its directory. What a cut left that is not whole is deleted before more is written.

# NOTE [Two writers]
Where the lock fails, two writers may be at work. So before each commit the newest version has to
be the one that this writer made or opened, to the byte, and the commit has to come right behind
it: the second of two writers ends with an error, and no row is there twice.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actctx._errors import DataError
from actctx._files import sync
from actctx._store.digests import (
    DIGESTS,
    Commit,
    Digest,
    add_lines,
    digest_file,
    digested,
    line_of_manifest,
    line_of_metadata,
    read_manifest_digests,
)
from actctx._store.libraries import import_lance
from actctx._store.versions import manifests, torn_frame

if TYPE_CHECKING:
    import pyarrow as pa


class Commits:
    """What one writer commits.

    Args:
        path: Where the data set is.
        syncs: Whether each commit is on the disk itself before more is written.

    Attributes:
        dataset: The Lance dataset, of the version that this writer opened or made last; None
            where there is none yet.
        path: As above.
        row_count: The number of rows that it has.
        torn: The manifests that are damaged, to be deleted before more is written.

    """

    def __init__(self, path: Path, *, syncs: bool) -> None:
        self.syncs = syncs
        self.dataset: Any = None
        self.row_count = 0
        self.torn: tuple[Path, ...] = ()
        self.path = path
        self._lance = import_lance()
        self._manifest = ""

    def start_from(self, dataset: Any) -> None:
        """Set the version that the next commit follows."""
        self.dataset, self.row_count = dataset, dataset.count_rows()
        self._manifest = _digest_of_manifest(self.path, dataset.version)

    def check(self, version: int | None = None) -> None:
        """Make sure that nobody else wrote since the last commit.

        Args:
            version: The version that is about to be made, where that is known.

        Raises:
            DataError: Another writer committed since.

        """
        own = self.dataset.version
        newest = next(iter(manifests(self.path)), 0)
        is_next = version in {None, own + 1}
        if newest != own or not is_next or _digest_of_manifest(self.path, own) != self._manifest:
            raise DataError(
                f"'{self.path}' was written to by another process: its newest version is {newest}, "
                f"but the last of this writer is {own}, of {self.row_count} rows, so nothing more "
                "is added; let one writer end, then the same call resumes after the rows on disk"
            )

    def clear(self) -> None:
        """Delete the manifests that a cut of power left torn, on which Lance fails."""
        there = manifests(self.path)
        torn = {
            number: file for number, file in there.items() if file in self.torn or torn_frame(file)
        }
        noted = read_manifest_digests(self.path)
        newest = next(iter(there), 0)
        reused = {*torn, *(number for number in noted if noted[number] and number > newest)}
        if reused:
            self._record([line_of_manifest(number, "") for number in sorted(reused)])
        if torn:
            for file in torn.values():
                file.unlink(missing_ok=True)
            self._sync(self.path / "_versions")
        self.torn = ()

    def create(self, schema: "pa.Schema", metadata: str, *, anew: bool) -> None:
        """Make a data set without rows, or one anew."""
        self.clear()
        if anew:
            self.check()
        self._record([line_of_metadata(metadata)])
        mode = "overwrite" if anew else "create"
        made = self._lance.write_dataset([], str(self.path), schema=schema, mode=mode)
        self._end(made)
        self._sync(self.path.parent)

    def describe(self, metadata: str) -> None:
        """Replace the metadata of the data set."""
        self.clear()
        self.check()
        self._record([line_of_metadata(metadata)])
        self.dataset.update_schema_metadata({"actctx": metadata})
        self._end(self.dataset)

    def append(self, batches: Iterable["pa.RecordBatch"], schema: "pa.Schema") -> None:
        """Add rows.

        Raises:
            DataError: Another writer wrote to the data set.
            OSError: The file system refuses it.

        """
        import pyarrow as pa
        from lance.fragment import write_fragments

        digests = {name: Digest() for name in schema.names}
        reader = pa.RecordBatchReader.from_batches(schema, digested(batches, digests))
        written = write_fragments(reader, self.dataset, mode="append", return_transaction=True)
        fragments = written.operation.fragments
        rows = self.row_count + sum(fragment.physical_rows for fragment in fragments)
        columns = {name: digest.hex() for name, digest in digests.items()}
        files = self._settle([file.path for each in fragments for file in each.files])
        self._record([Commit(self.row_count, rows, columns, files).line()])
        self._commit(written)
        if self.row_count != rows or not all(
            (self.path / "data" / name).exists() for name in files
        ):
            raise DataError(
                f"another process also writes to '{self.path}', and deleted what was just "
                "committed; let one writer end, then call again"
            )

    def _commit(self, transaction: Any) -> None:
        """Make what was written part of the data set, right after the last version."""
        refused: list[DataError] = []

        @contextlib.contextmanager
        def checked(version: int) -> Iterator[None]:
            try:
                self.check(version)
            except DataError as error:
                refused.append(error)
                raise
            yield

        try:
            self.check()
            made = self._lance.LanceDataset.commit(
                self.dataset, transaction, commit_lock=checked, max_retries=1
            )
        except (OSError, RuntimeError, ValueError):  # Lance's, of ours
            if refused:
                raise refused[0] from None
            raise
        self._end(made)

    def add_columns(
        self, batches: Iterable["pa.RecordBatch"], schema: "pa.Schema", lines: list[str]
    ) -> None:
        """Add columns to all rows, with their digests."""
        import pyarrow as pa

        before = {file.path for each in self._fragments() for file in each.files}
        self._record(lines)
        self.check()
        self.dataset.add_columns(pa.RecordBatchReader.from_batches(schema, batches))
        start, lines = 0, []
        for fragment in self._fragments():
            files = self._settle([file.path for file in fragment.files if file.path not in before])
            lines.append(Commit(start, start + fragment.num_rows, {}, files).line())
            start += fragment.num_rows
        self._end(self.dataset)
        self._record(lines)

    def drop(self, fragments: list[int]) -> None:
        """Drop the rows of some fragments, of which no file is deleted yet."""
        self.check()
        dropped = self._lance.LanceOperation.Delete([], fragments, "true")
        version = self.dataset.version
        self._end(self._lance.LanceDataset.commit(self.dataset, dropped, read_version=version))

    def _fragments(self) -> Iterator[Any]:
        return (fragment.metadata for fragment in self.dataset.get_fragments())

    def _settle(self, names: list[str]) -> dict[str, str]:
        """Sync data files that were written, and make their digests."""
        data = self.path / "data"
        try:
            for name in names:
                self._sync(data / name)
            if names:
                self._sync(data)
            return {name: digest_file(data / name) for name in names}
        except FileNotFoundError:
            self.check()
            raise

    def _record(self, lines: list[str]) -> None:
        """Write lines of digests, before the commit that they describe."""
        if not (self.path / DIGESTS).exists():
            self._sync(self.path)  # or it could be there without the lock, as of somebody else
        self._sync(add_lines(self.path, lines))
        self._sync(self.path)

    def _end(self, made: Any) -> None:
        """Sync what makes a commit part of the data set."""
        self.start_from(made)
        self._sync(add_lines(self.path, [line_of_manifest(made.version, self._manifest)]))
        if not self.syncs:
            return
        self._sync(manifests(self.path)[made.version])
        for name in ("_transactions", "_versions"):
            if (self.path / name).is_dir():
                self._sync(self.path / name)
        self._sync(self.path)

    def _sync(self, path: Path) -> None:
        if self.syncs:
            sync(path)


def _digest_of_manifest(path: Path, version: int) -> str:
    """Digest the manifest of a version; empty if there is none."""
    file = manifests(path).get(version)
    try:
        return "" if file is None else digest_file(file)
    except FileNotFoundError:
        return ""
