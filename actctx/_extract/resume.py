"""Resume an extraction: find what is still to run, and compare the rest with the rows on disk."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from actctx._errors import DataError
from actctx._extract.compatibility import check_padding
from actctx._extract.inputs import Reader
from actctx._extract.row_choice import RowChoice, Work
from actctx._extract.source import Source
from actctx._store.contents import Contents
from actctx._store.marks import Mark
from actctx._store.origins import Origins


@dataclass(frozen=True, eq=False)
class Remainder:
    """What is still to run of an input.

    Attributes:
        reader: Reads the input.
        row_choice: Chooses the rows of a batch.
        model: The model.
        contents: The data set; None if it is new.
        whole: The data set that sites are added to, whose rows the input must leave; None if none
            are added.
        most: The number of rows, at most.

    """

    reader: Reader
    row_choice: RowChoice
    model: nn.Module
    contents: Contents | None
    whole: Contents | None
    most: int | None

    def works(self, data: Iterable[Any]) -> Iterator[Work]:
        """Go through an input, from its start or from a mark.

        Raises:
            DataError: What is on disk came from another input.

        """
        for source, at in self.reader.ways(data, self._marks):
            works = self._from(source, at)
            try:
                first = [*_first(works)]  # after all that is compared with rows on disk
            except OSError:
                raise
            except Exception:
                if not source.is_trusted:
                    raise
                continue
            yield from first
            yield from works
            return

    @property
    def _marks(self) -> list[Mark]:
        return [] if self.contents is None else [*self.contents.marks.there]

    def _from(self, source: Source, at: Mark) -> Iterator[Work]:
        here, there = self.contents, self.whole or self.contents
        batches = self.reader.batches_of(source, at)
        works: Iterable[Work] = map(self.row_choice.choose, batches)
        if there is not None:
            works = check_padding(works, there, self.model, before=at.rows)
        if self.whole is not None:
            origins = self.whole.origins(at.rows)
            works = compared(works, origins, row_count=self.whole.row_count, before=at.rows)
        skip = 0 if here is None else here.row_count
        origins = iter(()) if here is None or not skip else here.origins(at.rows)
        return remaining(works, origins, most=self.most, skip=skip, before=at.rows)

    def count(self, data: Iterable[Any]) -> int | None:
        """Count the rows there will be, if all batches are at hand; else as many as can be."""
        if not self.reader.is_at_hand(data):
            return None if self.most is None else self.reader.bound(data, self.most)
        marks: Sequence[Mark] = [mark for mark in self._marks if mark.kind == "batches"]
        batches: Any = data
        rows = 0
        if marks:
            rows, at = marks[-1].rows, marks[-1]
            batches = data[at.items if isinstance(data, list | tuple) else at.sequences :]  # type: ignore[index]
        if len(batches):
            choose = self.row_choice.choose
            rows += sum(len(choose(batch).token) for batch in self.reader.batches(batches))
        return rows if self.most is None else min(rows, self.most)


def _first(works: Iterator[Work]) -> Iterator[Work]:
    for work in works:
        yield work
        return


def remaining(
    works: Iterable[Work],
    origins: Iterator[Origins],
    *,
    most: int | None,
    skip: int,
    before: int = 0,
) -> Iterator[Work]:
    """Leave out what is on disk, and what is beyond the number of rows that was asked for.

    Args:
        works: All there is, from a mark in the input on.
        origins: Where the rows on disk come from, from there on, chunk by chunk.
        most: The number of rows, at most.
        skip: The number of rows on disk.
        before: The number of rows before the mark.

    Raises:
        DataError: What is on disk came from another input.

    """
    known = _RowsOnDisk(origins)
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
            f"the input leaves {count} rows, but {skip} are already on disk, so they came from "
            "another input; give the same input, or another path"
        )


def compared(
    works: Iterable[Work], origins: Iterator[Origins], *, row_count: int, before: int = 0
) -> Iterator[Work]:
    """Pass on forwards, once their rows are known to be those on disk.

    Raises:
        DataError: What is on disk came from another input.

    """
    known = _RowsOnDisk(origins)
    count = before
    for work in works:
        here = min(len(work.token), row_count - count)
        known.check(work.rows(0, here), count)
        count += here
        yield work


class _RowsOnDisk:
    """The rows on disk, compared with the input that they should have come from."""

    def __init__(self, origins: Iterator[Origins]) -> None:
        self._origins = origins
        none = torch.empty(0, dtype=torch.int32)
        self._here: Any = Origins(none, none.long(), none, none.long())

    def check(self, work: Work, before: int) -> None:
        rows = Origins(work.token, work.sequence, work.position, work.digest)
        while len(rows.token):
            if not len(self._here.token):
                self._here = next(self._origins)
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
                        f"{here} in both, but its sequence has other tokens, other arguments of "
                        "the forward, or other carried values"
                    )
                raise DataError(
                    f"the rows on disk came from another input: row {before + at} is {differs}; "
                    "give the same input in the same order, or another path"
                )
            before += most
            rows, self._here = rows.rows(most), self._here.rows(most)
