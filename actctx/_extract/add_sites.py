"""Add sites to the rows of a data set without rewriting what is there.

# NOTE [Adding]
The new sites are extracted to a data set beside the other, `acts.lance.adding`, resumed as any,
which is compared with the rows that are there. Once it has all, the metadata names the new sites;
sites whose columns are missing are ignored. Then their columns are added in one commit,
which writes new files and touches no old one: by it the sites are there, or they are not. What lies
beside is renamed, `acts.lance.adding.done`: what is half deleted is not taken for half done.
If any step is interrupted, the same call resumes the extraction or the deletion.
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from actctx._errors import DataError, OptionError
from actctx._extract.compatibility import Facts
from actctx._extract.plan import ExtractionPlan
from actctx._extract.run import Tally, run
from actctx._files import sync
from actctx._store.contents import Contents
from actctx._store.destination import Destination, delete, found_at


def add_sites(
    plan: ExtractionPlan,
    data: Iterable[Any],
    *,
    destination: Destination,
    most: int | None,
    resume: bool,
    progress: bool,
) -> Tally:
    """Extract sites for the rows that a data set has, and add them to it.

    Args:
        plan: The extraction.
        data: The input that the rows came from.
        destination: Where the data set is.
        most: The number of rows to stop at, which is refused.
        resume: Whether to resume an addition that is half done.
        progress: Whether a progress bar is shown.

    Returns:
        What was written.

    Raises:
        DataError: There is no data set, it has one of the sites, or other rows; or an addition of
            other sites is half done.
        OptionError: A number of rows was given.

    """
    if most is not None:
        raise OptionError(
            f"max_tokens={most} does not work with add=True, which adds to all existing rows; "
            "leave max_tokens out"
        )
    whole, facts = destination.contents, plan.facts
    if whole is None:
        raise DataError(
            f"'{destination.path}' has no rows to add sites to; extract to it without add=True "
            "first"
        )
    facts.check_rows(whole)
    _clear(destination)
    staged = Destination(_beside(whole.path, "adding"), sync=destination.syncs)
    try:
        if staged.contents is not None:
            _check_half(facts, staged.contents, whole)
        if _has_them(facts, whole):
            return Tally(whole.row_count)
        if staged.contents is not None:
            facts.check(staged.contents, resume=resume, otherwise="delete that directory")
        limit = whole.row_count
        tally = run(plan, data, staged, most=limit, progress=progress, whole=whole)
        if tally.row_count != whole.row_count or staged.contents is None:
            raise DataError(
                f"the input leaves {tally.row_count} rows, but '{whole.path}' has "
                f"{whole.row_count}; give the input that they came from"
            )
        whole.take_columns(staged.contents)
    finally:
        staged.release()
        if not staged.row_count:
            with contextlib.suppress(OSError):
                delete(staged.path)
    _clear(destination)
    return tally


def clear_additions(destination: Destination) -> None:
    """Delete what an addition left that was killed when all was done, or before anything was."""
    if destination.contents is not None:
        with contextlib.suppress(DataError, OSError):  # adding sites reports it
            _clear(destination)


def _beside(path: Path, word: str) -> Path:
    return Path(f"{path}.{word}")


def _clear(destination: Destination) -> None:
    """Delete what a finished addition left, or one without rows."""
    adding, done = _beside(destination.path, "adding"), _beside(destination.path, "adding.done")
    if found := found_at(done):
        raise DataError(f"'{done}' {found}, but adding sites needs that path; move it")
    if done.exists():
        delete(done)
    if not adding.exists():
        return
    staged = Destination(adding)
    staged.release()
    if staged.contents is None:
        with contextlib.suppress(OSError):
            delete(adding)
        return
    half, there = staged.contents.layout, destination.contents
    if there is not None and half.finished and {*half.sites} <= {*there.layout.sites}:
        adding.rename(done)
        if destination.syncs:  # or the deletion could reach the disk before the name does
            sync(done.parent)
        delete(done)


def _check_half(facts: Facts, staged: Contents, whole: Contents) -> None:
    """Refuse to resume an addition of other sites, or to other rows."""
    half = [site.name for site in staged.layout.sites]
    asked = facts.names(half)
    if sorted(half) != sorted(asked):
        raise DataError(
            f"'{staged.path}' contains an unfinished addition of {half}, not of {asked}; finish it "
            "first, with its sites, or delete that directory"
        )
    if staged.row_count > whole.row_count:
        raise DataError(
            f"'{staged.path}' holds {staged.row_count} rows of an unfinished addition, but "
            f"'{whole.path}' has {whole.row_count}, so it belongs to another data set; delete that "
            "directory"
        )


def _has_them(facts: Facts, whole: Contents) -> bool:
    """Return whether all that was asked for is there already."""
    there = {site.name for site in whole.layout.sites}
    asked = facts.names(there)
    known = [name for name in asked if name in there]
    if known and known != asked:
        raise DataError(
            f"'{whole.path}' has {known[0]!r} already; leave it out, or give another an alias, "
            "as in {'resid': ...}"
        )
    if known:
        facts.check_added(whole)
    return bool(known)
