"""A column whose forwards fill one tensor in place, for `capacity=`."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from actctx._errors import CapacityError
from actctx._results.annotations import Sizes
from actctx._results.chunks import Chunks, copied_chunks, moved_chunks, row_of
from actctx._results.column import Column, ColumnOptions, Origin
from actctx._results.joined import JoinedColumn
from actctx._results.joining import check_joinable, check_not_quantized
from actctx._results.label import Label
from actctx._results.saved import SavedSite
from actctx._results.table import Row
from actctx._select.own import Owned, TokenRows, cast_dtype, own


@dataclass(eq=False)
class PreallocatedColumn:
    """The tensors of a site, each written after the ones before it; see `Column`.

    Attributes:
        filled: The filled part of each preallocated tensor, as if it had been joined.
        capacity: The number of elements along the axis, allocated at the first firing.
        options: The dtype and device of the tensors.
        rooms: For each firing of a forward, the preallocated tensor.

    """

    asks_axes: ClassVar[bool] = True
    copies: ClassVar[bool] = False
    is_tensor: ClassVar[bool] = True

    filled: JoinedColumn
    capacity: int
    options: ColumnOptions
    rooms: list[Tensor] = field(default_factory=list)

    @property
    def label(self) -> Label:
        """The names of the site, and the axes of what it leaves."""
        return self.filled.label

    @property
    def firings(self) -> list[Chunks]:
        """For each firing of a forward, one tensor: the filled part."""
        return self.filled.firings

    def keep(
        self,
        selected: Shaped[Tensor, "..."],
        rows: TokenRows | None,
        *,
        number: int,
        copied: bool,
        origin: Callable[[], Origin],  # noqa: ARG002  the rows tell it
    ) -> Owned:
        """Write the selection to its place, where it counts once the forward has ended.

        Raises:
            CapacityError: There is no space left.
            JoinError: It does not fit the tensors before it.

        """
        room = self._room(number, selected)
        return own(selected, copied=copied, room=room)._replace(rows=rows)

    def _room(self, number: int, selected: Tensor) -> Tensor:
        key, join, dim = self.label.key, self.filled.join, self.filled.join_dim()
        check_not_quantized(key, selected)
        if number == len(self.rooms):
            self.rooms.append(_empty(selected, dim, self.capacity, self.options))
        room, used, count = self.rooms[number], self._used(number), selected.shape[dim]
        check_joinable(key, [room, selected], dim, join)
        if used + count > self.capacity:
            raise CapacityError(
                f"{key!r} has space for capacity={self.capacity} along {join!r}, of which {used} "
                f"are used, but a forward yielded {count} more; give a larger capacity, or read "
                "and clear the buffer in between"
            )
        return room.narrow(dim, used, count)

    def _used(self, number: int) -> int:
        if number >= len(self.firings):
            return 0
        return self.firings[number][0].value.shape[self.filled.join_dim()]

    def write(self, stages: Sequence[Owned]) -> int:
        """Count the values of one forward as filled."""
        dim = self.filled.join_dim()
        if stages[0].rows is not None:
            self.filled.rows.add(stages[0].rows)
        for number, chunk in enumerate(stages):  # it is already in its place after the others
            used = self._used(number) + chunk.value.shape[dim]
            whole = chunk._replace(value=self.rooms[number].narrow(dim, 0, used))
            self.firings[number : number + 1] = [deque([whole])]
        return 0

    @property
    def is_one(self) -> bool:
        """Whether its firings are one tensor: there is one, or a repeated one of equal values."""
        return self.filled.is_one

    @property
    def nbytes(self) -> int:
        """The size of all preallocated tensors in bytes."""
        return sum(room.nbytes for room in self.rooms)

    def read(self, number: int) -> Shaped[Tensor, "..."]:
        """Return the filled part of a tensor."""
        return self.filled.read(number)

    def positions(self) -> Int64[Tensor, "token 2"] | None:
        """Return where the rows come from that a mask kept."""
        return self.filled.positions()

    def outline(self) -> Shaped[Tensor, "..."]:
        """Return a tensor without values, with the shape and dtype of the filled part."""
        return self.filled.outline()

    def fixed_sizes(self) -> Sizes:
        """Return the sizes that do not depend on the number of forwards."""
        return self.filled.fixed_sizes()

    def spec(self) -> type:
        """Return the annotation of the filled part."""
        return self.filled.spec()

    def row(self, *, drawn: bool) -> Row:
        """Describe it for the table."""
        shape = self.filled.shape()
        return row_of(self.label, self.firings, shape=shape, nbytes=self.nbytes, drawn=drawn)

    def saved(self) -> SavedSite:
        """Return the filled part, for a file."""
        return self.filled.saved()

    def moved(self, device: torch.device | None, dtype: torch.dtype | None) -> Column[Any]:
        """Return a copy without further space, on another device or of another dtype."""
        return self.filled.with_chunks(moved_chunks(self.firings, device, dtype))

    def copied(self) -> Column[Any]:
        """Return a copy without further space that shares no memory with it."""
        return self.filled.with_chunks(copied_chunks(self.firings))

    def settle(self) -> None:
        """Wait until every tensor has arrived."""
        self.filled.settle()

    def finish(self) -> None:
        """Do nothing, since the axes were found at the first activation."""

    def clear(self) -> None:
        """Drop the captured values, and the preallocated tensors."""
        self.filled.clear()
        self.rooms.clear()


def _empty(selected: Tensor, dim: int, capacity: int, options: ColumnOptions) -> Tensor:
    """Allocate memory. On Linux it is used only as it is filled."""
    shape = list(selected.shape)
    shape[dim] = capacity
    target = selected.device if options.device is None else options.device
    pinned = selected.is_cuda and target.type == "cpu"
    kind = cast_dtype(selected, options.dtype)
    return torch.empty(shape, dtype=kind, device=target, pin_memory=pinned)
