"""Add sites to the rows of a data set without rewriting what is there.

# NOTE [Adding]
The new sites are extracted to a data set beside the other, `acts.lance.adding`, resumed as any,
which is held against the rows that are there. Once it has them all, the metadata is told of them;
of sites whose columns are missing, nobody takes notice. Then their columns are added in one commit,
which writes new files and touches no old one: by it the sites are there, or they are not. What lies
beside is renamed, `acts.lance.adding.done`: what is half deleted is not taken for half done.
Whatever ended in between, the same call goes on: with the data set beside it, or with its deletion.
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from actctx._errors import DataError, OptionError
from actctx._extract.compatibility import Facts
from actctx._extract.run import Extraction
from actctx._files import sync
from actctx._store.destination import Target, delete, found_at


def add_sites(
    extraction: Extraction,
    data: Iterable[Any],
    *,
    whole: Target,
    most: int | None,
    resume: bool,
    progress: bool,
) -> int:
    """Extract sites for the rows that a data set has, and add them to it.

    Args:
        extraction: One extraction: what is run, and what is kept of it.
        data: The input that the rows came from.
        whole: The data set.
        most: The number of rows to stop at, which nobody may give.
        resume: Whether to go on with an addition that is half done.
        progress: Whether a progress bar is shown.

    Returns:
        The number of rows.

    Raises:
        DataError: There is no data set, it has one of the sites, or other rows; or an addition of
            other sites is half done.
        OptionError: A number of rows was given.

    """
    if most is not None:
        raise OptionError(
            f"max_tokens={most} does not go with add=True, which adds to all rows that are there; "
            "leave max_tokens out"
        )
    if whole.layout is None or not whole.rows:
        raise DataError(
            f"'{whole.path}' has no rows to add sites to; extract to it without add=True first"
        )
    facts = extraction.facts
    facts.check_rows(whole)
    _clear(whole)
    staged = Target(_beside(whole, "adding"), sync=whole.syncs)
    try:
        _check_half(facts, staged, whole)
        if _has_them(facts, whole):
            return whole.rows
        facts.check(staged, resume=resume, otherwise="delete that directory")
        rows = extraction.run(data, staged, most=whole.rows, progress=progress, against=whole)
        if rows != whole.rows:
            raise DataError(
                f"the input leaves {rows} rows, but '{whole.path}' has {whole.rows}; give the "
                "input that they came from"
            )
        whole.take_columns(staged)
    finally:
        staged.release()
        if not staged.rows:
            with contextlib.suppress(OSError):
                delete(staged.path)
    _clear(whole)
    return whole.rows


def clear_additions(whole: Target) -> None:
    """Delete what an addition left that was killed when all was done, or before anything was."""
    if whole.layout is not None:
        with contextlib.suppress(DataError, OSError):  # whoever adds is told
            _clear(whole)


def _beside(whole: Target, word: str) -> Path:
    return Path(f"{whole.path}.{word}")


def _clear(whole: Target) -> None:
    """Delete what an addition left that was done with, or had come to nothing.

    Raises:
        DataError: There is something else in its place.

    """
    adding, done = _beside(whole, "adding"), _beside(whole, "adding.done")
    if found := found_at(done):
        raise DataError(f"'{done}' {found}, but sites are added by way of that path; move it")
    if done.exists():
        delete(done)
    if not adding.exists():
        return
    staged = Target(adding)
    staged.release()
    if staged.layout is None or not staged.rows:
        with contextlib.suppress(OSError):
            delete(adding)
        return
    assert whole.layout is not None  # noqa: S101  as it has rows
    if staged.layout.finished and {*staged.layout.sites} <= {*whole.layout.sites}:
        adding.rename(done)
        if whole.syncs:  # or the deletion could reach the disk before the name does
            sync(done.parent)
        delete(done)


def _check_half(facts: Facts, staged: Target, whole: Target) -> None:
    """Refuse to go on with an addition of others.

    Raises:
        DataError: It is of other sites, or to other rows.

    """
    if staged.layout is None:
        return
    half = [site.name for site in staged.layout.sites]
    asked = facts.names(half)
    if sorted(half) != sorted(asked):
        raise DataError(
            f"'{staged.path}' holds a half-done addition of {half}, not of {asked}; finish it "
            "first, with the sites that it has, or delete that directory"
        )
    if staged.rows > whole.rows:
        raise DataError(
            f"'{staged.path}' holds {staged.rows} rows of a half-done addition, but "
            f"'{whole.path}' has {whole.rows}, so it is one to another data set; delete that "
            "directory"
        )


def _has_them(facts: Facts, whole: Target) -> bool:
    """Return whether all that was asked for is there already.

    Raises:
        DataError: Some of it is, or a site is there as another.

    """
    assert whole.layout is not None  # noqa: S101  as it has rows
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
