"""Which rows of a data set each forward leaves, which is known before it runs.

# NOTE [Resuming]
How many rows a batch leaves follows from its tokens and its mask alone. So how far an extraction
has come is told by the number of rows on disk, and by nothing else: to go on, the input is read
from its start, the batches whose rows are all there are not run, and of the one in whose middle the
last commit ended only the rows that are missing are kept. The tokens of what is skipped are held
against those on disk.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from actctx._errors import DataError, OptionError
from actctx._inputs import Batch
from actctx._rows import RowSelector, find_rows
from actctx._select import Selector


class Work(NamedTuple):
    """A forward that is to run, and the rows that are kept of it.

    Attributes:
        batch: Its input.
        where: The sequence of the batch and the place in it of each row.
        token: The token id of each row.
        sequence: The number of its sequence in the input.
        position: Its position in the sequence, padding not counted.

    """

    batch: Batch
    where: Int64[Tensor, "row 2"]
    token: Int[Tensor, " row"]
    sequence: Int64[Tensor, " row"]
    position: Int[Tensor, " row"]

    def rows(self, start: int, stop: int | None) -> "Work":
        """Return it with some of its rows only."""
        return Work(self.batch, *(each[start:stop] for each in self[1:]))


@dataclass(frozen=True, eq=False)
class Choosing:
    """What decides which tokens are rows.

    Attributes:
        tokens: What is selected along the tokens of each sequence that are left.
        dropped_tokens: The token ids that are left out.
        dropped_positions: The positions that are left out.

    """

    tokens: Selector
    dropped_tokens: Int64[Tensor, " _"]
    dropped_positions: Int64[Tensor, " _"]

    def choose(self, batch: Batch) -> Work:
        """Find the rows of a batch, sequence by sequence.

        Raises:
            SelectionError: A sequence does not have the token that is to be selected.

        """
        real = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.real is None else batch.real
        positions = real.cumsum(1) - 1
        kept = real if batch.kept is None else real & batch.kept
        if len(self.dropped_tokens):
            kept = kept & ~torch.isin(batch.tokens, self.dropped_tokens)
        if len(self.dropped_positions):
            kept = kept & ~torch.isin(positions, self.dropped_positions)
        if self.tokens.steps:
            selector = RowSelector(self.tokens.site, 1, self.tokens)
            where = find_rows(selector, kept, (kept.shape[0], kept.shape[1]))
        else:
            where = kept.nonzero()
        row, place = where.unbind(1)
        token, position = batch.tokens[row, place].int(), positions[row, place].int()
        return Work(batch, where, token, batch.sequences[row], position)


def dropping(drop: Mapping[str, Iterable[int]] | None) -> dict[str, list[int]]:
    """Read what is to be left out.

    Raises:
        OptionError: It names other things than tokens and positions, or no numbers.

    """
    found: dict[str, list[int]] = {}
    for name, dropped in (drop or {}).items():
        if name not in {"token", "position"}:
            raise OptionError(
                f"drop names {name!r}; give the ids of a 'token' or the numbers of a 'position' "
                "to leave out, such as drop={'position': [0]}"
            )
        numbers = [dropped] if isinstance(dropped, int) else [*dropped]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise OptionError(f"drop has {numbers!r} for {name!r}; give ints from 0 on")
        found[name] = sorted(numbers)
    return found


def remaining(
    works: Iterable[Work], stored: "Iterator[Stored]", most: int | None, skip: int
) -> Iterator[Work]:
    """Leave out what is on disk, and what is beyond the number of rows that was asked for.

    Args:
        works: All there is, from the start of the input.
        stored: The rows on disk, chunk by chunk.
        most: The number of rows, at most.
        skip: The number of rows on disk.

    Raises:
        DataError: What is on disk came from another input.

    """
    known = _Known(stored)
    count = 0
    for work in works:
        here = len(work.where) if most is None else min(len(work.where), most - count)
        there = min(max(0, skip - count), here)
        if there:
            known.check(work.rows(0, there), count)
        if there < here:
            yield work.rows(there, here)
        count += here
        if most is not None and count >= most:
            return
    if count < skip:
        raise DataError(
            f"the input leaves {count} rows, but {skip} are on disk already, so they came from "
            "another one; give the same input, or another path"
        )


def held_against(works: Iterable[Work], stored: "Iterator[Stored]", rows: int) -> Iterator[Work]:
    """Pass on what leaves the rows that are on disk.

    Raises:
        DataError: What is on disk came from another input.

    """
    known = _Known(stored)
    count = 0
    for work in works:
        here = min(len(work.where), rows - count)
        known.check(work.rows(0, here), count)
        count += here
        yield work


class Stored(NamedTuple):
    """Rows on disk, without their activations."""

    token: Int[Tensor, " row"]
    sequence: Int64[Tensor, " row"]


class _Known:
    """The rows on disk, as they are held against the input that they should have come from."""

    def __init__(self, stored: Iterator[Stored]) -> None:
        self._stored = stored
        self._here: Any = Stored(torch.empty(0, dtype=torch.int32), torch.empty(0).long())

    def check(self, work: Work, before: int) -> None:
        token, sequence = work.token, work.sequence
        while len(token):
            if not len(self._here.token):
                self._here = next(self._stored)
            most = min(len(token), len(self._here.token))
            other = (token[:most] != self._here.token[:most]) | (
                sequence[:most] != self._here.sequence[:most]
            )
            if bool(other.any()):
                at = int(other.nonzero()[0])
                raise DataError(
                    f"the rows on disk came from another input: row {before + at} is token "
                    f"{int(self._here.token[at])} of sequence {int(self._here.sequence[at])} "
                    f"there, but token {int(token[at])} of sequence {int(sequence[at])} in the "
                    "input; give the same input in the same order, or another path"
                )
            before += most
            token, sequence = token[most:], sequence[most:]
            self._here = Stored(self._here.token[most:], self._here.sequence[most:])
