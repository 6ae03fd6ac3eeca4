"""Resume an extraction: what of the input is still to run, and whether the rest is on disk."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from actctx._errors import DataError
from actctx._extract.row_choice import Work
from actctx._store.origins import Stored


def remaining(
    works: Iterable[Work],
    stored: "Iterator[Stored]",
    *,
    most: int | None,
    skip: int,
    before: int = 0,
) -> Iterator[Work]:
    """Leave out what is on disk, and what is beyond the number of rows that was asked for.

    Args:
        works: All there is, from a mark in the input on.
        stored: The rows on disk from there on, chunk by chunk.
        most: The number of rows, at most.
        skip: The number of rows on disk.
        before: The number of rows before the mark.

    Raises:
        DataError: What is on disk came from another input.

    """
    known = _Known(stored)
    count, mark = before, None
    for work in works:
        here = len(work.token) if most is None else min(len(work.token), most - count)
        there = min(max(0, skip - count), here)
        if work.batch.mark is not None:
            mark = replace(work.batch.mark, rows=count)
        if there:
            known.check(work.rows(0, there), count)
        if there < here or (not here and count >= skip):
            yield work.rows(there, here)._replace(
                mark=mark if here else None, empty=work.without_rows(there, here)
            )
        count += here
        mark = None if here else mark
        if most is not None and count >= most:
            return
    if count < skip:
        raise DataError(
            f"the input leaves {count} rows, but {skip} are on disk already, so they came from "
            "another one; give the same input, or another path"
        )


def held_against(
    works: Iterable[Work], stored: "Iterator[Stored]", *, rows: int, before: int = 0
) -> Iterator[Work]:
    """Pass on what leaves the rows that are on disk, of which so many are before it.

    Raises:
        DataError: What is on disk came from another input.

    """
    known = _Known(stored)
    count = before
    for work in works:
        here = min(len(work.token), rows - count)
        known.check(work.rows(0, here), count)
        count += here
        yield work


class _Known:
    """The rows on disk, as they are held against the input that they should have come from."""

    def __init__(self, stored: Iterator[Stored]) -> None:
        self._stored = stored
        none = torch.empty(0, dtype=torch.int32)
        self._here: Any = Stored(none, none.long(), none, none.long())

    def check(self, work: Work, before: int) -> None:
        rows = Stored(work.token, work.sequence, work.position, work.digest)
        while len(rows.token):
            if not len(self._here.token):
                self._here = next(self._stored)
            most = min(len(rows.token), len(self._here.token))
            now, was = rows.rows(0, most), self._here.rows(0, most)
            *others, digest = (a != b for a, b in zip(now, was, strict=True))
            seen = torch.stack(others).any(0)
            if bool((seen | digest).any()):
                at = int((seen if bool(seen.any()) else digest).nonzero()[0])
                there, here = was.shown(at), now.shown(at)
                differs = f"{there} there, but {here} in the input"
                if there == here:
                    differs = (
                        f"{here} in both, but its sequence has other tokens, or other arguments of "
                        "the forward, or other values of what is carried"
                    )
                raise DataError(
                    f"the rows on disk came from another input: row {before + at} is {differs}; "
                    "give the same input in the same order, or another path"
                )
            before += most
            rows, self._here = rows.rows(most), self._here.rows(most)
