"""A column that keeps the tensors of forwards apart, for `join=None`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from actctx._errors import OptionError
from actctx._results.annotations import Sizes
from actctx._results.chunks import (
    Chunks,
    add_chunks,
    are_one,
    bytes_of,
    chunk_of,
    copied_chunks,
    moved_chunks,
    row_of,
    shapes_of,
    spec_of_chunks,
    wait_for,
    wait_for_all,
)
from actctx._results.column import ColumnOptions, Origin
from actctx._results.label import Label
from actctx._results.saved import SavedSite
from actctx._results.sequences import KeptRows
from actctx._results.table import Row
from actctx._select.own import Owned, TokenRows


@dataclass(eq=False)
class ListColumn:
    """The tensors of a site, one for each forward; see `Column`."""

    asks_axes: ClassVar[bool] = False
    copies: ClassVar[bool] = True
    is_tensor: ClassVar[bool] = False

    label: Label
    options: ColumnOptions
    firings: list[Chunks] = field(default_factory=list)
    rows: KeptRows = field(default_factory=KeptRows)

    def keep(
        self,
        selected: Shaped[Tensor, "..."],
        rows: TokenRows | None,
        *,
        number: int,  # noqa: ARG002  only preallocated columns use it
        copied: bool,
        origin: Callable[[], Origin],  # noqa: ARG002  the rows tell it
    ) -> Owned:
        """Make an owned tensor of the selection."""
        return chunk_of(selected, rows, self.options, copied=copied)

    def write(self, stages: Sequence[Owned]) -> int:
        """Take the tensors of one forward, and return their bytes on the host."""
        if stages[0].rows is not None:
            self.rows.add(stages[0].rows)
        return add_chunks(self.firings, stages)

    @property
    def is_one(self) -> bool:
        """Whether its firings are one list: there is only one, or all are equal."""
        return are_one(self.label, self.firings, self.read)

    @property
    def nbytes(self) -> int:
        """The bytes that it holds."""
        return bytes_of(self.firings)

    def read(self, number: int) -> list[Tensor]:
        """List the values of one firing, forward by forward."""
        return [wait_for(chunk) for chunk in self.firings[number]]

    def positions(self) -> Int64[Tensor, "token 2"] | None:
        """Return where the rows come from that a mask kept, over all forwards."""
        return self.rows.joined()

    def outline(self) -> Shaped[Tensor, "..."]:
        """Return a tensor without values, like its tensors."""
        first = self.firings[0][0].value
        return torch.empty(first.shape, dtype=first.dtype, device="meta")

    def fixed_sizes(self) -> Sizes:
        """Return the sizes that its tensors have in common."""
        return self.label.named.sizes

    def spec(self) -> type:
        """Return the annotation of its tensors."""
        return spec_of_chunks(self.label, self.firings, self.fixed_sizes())

    def row(self, *, drawn: bool) -> Row:
        """Describe it for the table."""
        shape = shapes_of(self.firings[0])
        return row_of(self.label, self.firings, shape=shape, nbytes=self.nbytes, drawn=drawn)

    def saved(self) -> SavedSite:
        """Refuse, since a file stores one tensor per site.

        Raises:
            OptionError: Always.

        """
        raise OptionError(
            "acts.save(path) writes one tensor per site, but join=None keeps a list of them; "
            "capture with join='batch', or save the tensors of the lists yourself"
        )

    def moved(self, device: torch.device | None, dtype: torch.dtype | None) -> "ListColumn":
        """Return a copy on another device, or of another dtype."""
        return self._with(moved_chunks(self.firings, device, dtype))

    def copied(self) -> "ListColumn":
        """Return a copy that shares no memory with it."""
        return self._with(copied_chunks(self.firings))

    def _with(self, firings: list[Chunks]) -> "ListColumn":
        return ListColumn(self.label.copied(), self.options, firings, self.rows.copied())

    def settle(self) -> None:
        """Wait until every tensor has arrived."""
        wait_for_all(self.firings)

    def finish(self) -> None:
        """Do nothing, since nothing is joined."""

    def clear(self) -> None:
        """Drop the captured tensors."""
        self.firings.clear()
        self.rows.clear()
