"""More sites for the rows of a data set, without rewriting what is there.

# NOTE [Adding]
The new sites are extracted to a data set beside the other, resumed as any, which is held against
the rows that are there. Once it has them all, its columns are added in one commit, which writes new
files and touches no old one; then the metadata is told of them, and the data set beside it is
deleted. What ended in between is gone on with: columns that no metadata tells of are there already,
and a data set beside it whose sites are all told of is done with.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from actctx._errors import DataError
from actctx._extraction import Extraction
from actctx._writer import Target


def add_sites(extraction: Extraction, data: Iterable[Any], whole: Target, *, progress: bool) -> int:
    """Extract sites for the rows that a data set has, and add them to it.

    Args:
        extraction: What is run, and what is kept of it.
        data: The input that the rows came from.
        whole: The data set.
        progress: Whether a progress bar is shown.

    Returns:
        The number of rows.

    Raises:
        DataError: There is no data set, it has one of the sites, or other rows.

    """
    if whole.layout is None or not whole.rows:
        raise DataError(
            f"'{whole.path}' has no rows to add sites to; extract to it without add=True first"
        )
    beside = Path(f"{whole.path}.adding")
    known = [site.name for site in whole.layout.sites if site.name in extraction.names]
    if known and not beside.exists():
        raise DataError(
            f"'{whole.path}' has {known[0]!r} already; leave it out, or give another an alias, "
            "as in {'resid': ...}"
        )
    extraction.check_rows(whole)
    staged = Target(beside)
    try:
        if not known:
            extraction.check(staged, resume=True)
            rows = extraction.run(data, staged, most=whole.rows, progress=progress, against=whole)
            if rows != whole.rows:
                raise DataError(
                    f"the input leaves {rows} rows, but '{whole.path}' has {whole.rows}; give the "
                    "input that they came from"
                )
            whole.take_columns(staged)
    finally:
        staged.release()
    shutil.rmtree(beside)
    return whole.rows
