"""Choose the rows of a data set that each forward leaves, before it runs.

# NOTE [Resuming]
How many rows a batch leaves follows from its tokens and its mask alone. So how far an extraction
has come is told by the number of rows on disk, and by nothing else: to resume, the input is read
from its start, or from a mark with a number of rows, the batches whose rows are all there are not
run, and of the one in whose middle the last commit ended only the rows that are missing are kept.
What is skipped after the mark is compared with what is on disk: the token of each row, and a
digest of all that the model was given of its sequence.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int, Int64, Shaped
from torch import Tensor

from actctx._errors import OptionError
from actctx._extract.batching import Batch
from actctx._select.cast_loss import CastLoss
from actctx._select.padding import RowSelector, find_rows
from actctx._select.slices import Selector
from actctx._store.marks import Mark
from actctx._store.site_columns import not_held

_MOST = 2**63


class Work(NamedTuple):
    """A forward that is to run, and the rows that are kept of it.

    Attributes:
        batch: Its input.
        where: The sequence of the batch and the place in it of each row.
        token: The token id of each row.
        sequence: The number of its sequence in the input.
        position: Its position in the sequence, padding not counted.
        pooled: The row that each token goes into, where rows are pooled; `where` is of tokens then,
            and the others are of the last token of each row.
        is_sliced_away: Whether tokens were left, of which the slice selected none.
        mark: A place in the input, and the rows before it, which are on disk when this is.
        empty: The sequences that leave no rows, of it and before it.

    """

    batch: Batch
    where: Int64[Tensor, "token 2"]
    token: Int[Tensor, " row"]
    sequence: Int64[Tensor, " row"]
    position: Int[Tensor, " row"]
    pooled: Int64[Tensor, " token"] | None = None
    is_sliced_away: bool = False
    mark: Mark | None = None
    empty: int = 0

    @property
    def within(self) -> Int64[Tensor, " row"]:
        """The sequence of the batch that each row comes from."""
        sequences = self.where[:, 0]
        return sequences if self.pooled is None else torch.unique_consecutive(sequences)

    @property
    def digest(self) -> Int64[Tensor, " row"]:
        """The digest of the input of each row; see `Batch.digests`."""
        return self.batch.digests[self.within]

    def without_rows(self, start: int, stop: int) -> int:
        """Count the sequences that leave no rows, about some of those that do."""
        within = self.within
        first = int(within[start - 1]) + 1 if start else 0
        last = int(within[stop]) if stop < len(within) else len(self.batch.tokens)
        behind = {*within[(within >= first) & (within < last)].tolist()}
        before = 0 if start else self.batch.empty
        return last - first - len(behind) + before

    def rows(self, start: int, stop: int) -> "Work":
        """Return a forward that keeps only some of the rows."""
        some = self._replace(
            token=self.token[start:stop],
            sequence=self.sequence[start:stop],
            position=self.position[start:stop],
        )
        if self.pooled is None:
            return some._replace(where=self.where[start:stop])
        kept = (self.pooled >= start) & (self.pooled < stop)
        return some._replace(where=self.where[kept], pooled=self.pooled[kept] - start)


@dataclass(frozen=True, eq=False)
class RowChoice:
    """What decides which tokens are rows.

    Attributes:
        tokens: What is selected along the tokens of each sequence that are left.
        dropped: What is left out: the ids of a `token`, the numbers of a `position`.
        pools: Whether what is left of a sequence is one row.

    """

    tokens: Selector
    dropped: Mapping[str, Int64[Tensor, " _"]]
    pools: bool

    def choose(self, batch: Batch) -> Work:
        """Find the rows of a batch, sequence by sequence; one with no tokens left has none.

        Raises:
            SelectionError: A sequence does not have the token that is to be selected.

        """
        real = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.real is None else batch.real
        positions = real.cumsum(1) - 1
        kept = real if batch.kept is None else real & batch.kept
        for name, values in (("token", batch.tokens), ("position", positions)):
            if name in self.dropped:
                kept = kept & ~torch.isin(values, self.dropped[name])
        if self.tokens.steps:
            selector = RowSelector(self.tokens.site, 1, self.tokens)
            (some,) = kept.any(1).nonzero(as_tuple=True)
            left, numbers = kept[some], batch.sequences[some].tolist()
            shape = (left.shape[0], left.shape[1])
            where = find_rows(selector, left, shape, numbers) if len(some) else kept.nonzero()
            where[:, 0] = some[where[:, 0]]
        else:
            where = kept.nonzero()
        row, place = where.unbind(1)
        token, position = batch.tokens[row, place].int(), positions[row, place].int()
        sliced_away = bool(kept.any()) and not len(where)
        work = Work(batch, where, token, batch.sequences[row], position, None, sliced_away)
        return _by_sequence(work) if self.pools else work


def _by_sequence(work: Work) -> Work:
    """Join the rows of each sequence."""
    _, pooled, counts = torch.unique_consecutive(
        work.where[:, 0], return_inverse=True, return_counts=True
    )
    last = counts.cumsum(0) - 1
    return work._replace(
        token=work.token[last],
        sequence=work.sequence[last],
        position=work.position[last],
        pooled=pooled,
    )


def pool_rows(
    name: str,
    activations: Shaped[Tensor, "token ..."],
    pooled: Int64[Tensor, " token"],
    *,
    how: str,
    dtype: torch.dtype | None,
    loss: CastLoss | None = None,
) -> Shaped[Tensor, "row ..."]:
    """Join the rows of each sequence: their `"mean"`, or along each axis their `"max"`.

    The maximum of integers or bools stays one, and their mean is float32.

    Args:
        name: The name of the site, for messages.
        activations: What its tokens left.
        pooled: The row that each token goes into.
        how: How.
        dtype: The dtype of floating-point rows; by default that of the activations.
        loss: Counts what the cast loses.

    Raises:
        OptionError: They are complex or quantized.

    """
    if activations.is_complex() or activations.is_quantized:
        raise OptionError(not_held(name, activations.dtype))
    is_floating = activations.is_floating_point()
    numbers = activations.float() if is_floating else activations
    if how == "mean" and not is_floating:
        numbers = activations.double()  # in which sums of integers are exact
    parts = torch.split(numbers, pooled.bincount().tolist())
    if how == "max":
        rows = torch.stack([part.amax(0) for part in parts])
    else:
        rows = torch.stack([part.mean(0) for part in parts]).float()
    if not rows.is_floating_point():
        return rows
    if loss is not None:
        loss.add(rows)
    return rows.to(dtype or (activations.dtype if is_floating else torch.float32))


def dropping(drop: Mapping[str, Iterable[int]] | None) -> dict[str, list[int]]:
    """Read which tokens and positions leave no rows.

    Raises:
        OptionError: It names other things than tokens and positions, or no numbers.

    """
    found: dict[str, list[int]] = {}
    if drop is not None and not isinstance(drop, Mapping):
        raise OptionError(
            f"drop={drop!r} does not say what the numbers are; give a dict, such as "
            "drop={'position': [0]}"
        )
    for name, dropped in (drop or {}).items():
        if name not in {"token", "position"}:
            raise OptionError(
                f"drop names {name!r}; give the ids of a 'token' or the numbers of a 'position' "
                "to leave out, such as drop={'position': [0]}"
            )
        given = dropped.tolist() if hasattr(dropped, "tolist") else dropped
        numbers = [*given] if isinstance(given, Iterable) else [given]
        numbers = [each.item() if hasattr(each, "item") else each for each in numbers]
        if not all(type(number) is int and 0 <= number < _MOST for number in numbers):
            raise OptionError(f"drop has {numbers!r} for {name!r}; give ints from 0 to 2**63 - 1")
        if numbers:
            found[name] = sorted({*numbers})
    return found
