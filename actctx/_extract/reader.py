"""What is still to run: an input from where the rows on disk end, as forwards with their rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from actctx._extract.batching import Batch
from actctx._extract.compatibility import check_padding
from actctx._extract.inputs import Reading
from actctx._extract.resume import held_against, remaining
from actctx._extract.row_choice import Work
from actctx._extract.source import Source
from actctx._store.destination import Target
from actctx._store.marks import Mark


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads what is still to run.

    Attributes:
        reading: How the input is read.
        choose: Finds the rows of a batch.
        model: The model.
        target: The data set.
        against: The data set that sites are added to, whose rows the input must leave; None where
            none are added.
        most: The number of rows, at most.

    """

    reading: Reading
    choose: Callable[[Batch], Work]
    model: nn.Module
    target: Target
    against: Target | None
    most: int | None

    def works(self, data: Iterable[Any]) -> Iterator[Work]:
        """Go through an input, from its start or from a mark.

        Raises:
            DataError: What is on disk came from another input.

        """
        skip, marks = self.target.rows, [*self.target.marks.there]
        for source, at in self.reading.ways(data, marks):
            works = self._from(source, at, skip)
            try:
                first = [*_first(works)]  # behind all that is compared with rows on disk
            except OSError:
                raise
            except Exception:
                if not source.is_trusted:
                    raise
                continue
            yield from first
            yield from works
            return

    def _from(self, source: Source, at: Mark, skip: int) -> Iterator[Work]:
        there = self.against or self.target
        works: Iterable[Work] = map(self.choose, self.reading.batches_of(source, at))
        works = check_padding(works, there, self.model, before=at.rows)
        if self.against is not None:
            stored = self.against.stored(at.rows)
            works = held_against(works, stored, rows=self.against.rows, before=at.rows)
        stored = self.target.stored(at.rows) if skip else iter(())
        return remaining(works, stored, most=self.most, skip=skip, before=at.rows)

    def count(self, data: Iterable[Any]) -> int | None:
        """Count the rows there will be, where all batches are at hand; else as many as can be."""
        if not self.reading.is_at_hand(data):
            return None if self.most is None else self.reading.bound(data, self.most)
        marks: Sequence[Mark] = [mark for mark in self.target.marks.there if mark.kind == "batches"]
        batches: Any = data
        rows = 0
        if marks:
            rows, at = marks[-1].rows, marks[-1]
            batches = data[at.items if isinstance(data, list | tuple) else at.sequences :]  # type: ignore[index]
        if len(batches):
            rows += sum(len(self.choose(batch).token) for batch in self.reading.batches(batches))
        return rows if self.most is None else min(rows, self.most)


def _first(works: Iterator[Work]) -> Iterator[Work]:
    for work in works:
        yield work
        return
