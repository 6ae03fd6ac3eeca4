"""A column whose forwards fill one tensor in place, as `capacity=` asks."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from actctx._errors import CapacityError
from actctx._results.annotations import Sizes
from actctx._results.chunks import Chunks, copied_chunks, moved_chunks, row_of
from actctx._results.column import Column, ColumnOptions
from actctx._results.joined import JoinedColumn
from actctx._results.joining import check_joinable, check_not_quantized
from actctx._results.label import Label
from actctx._results.saved import SavedSite
from actctx._results.table import Row
from actctx._select.own import Owned, TokenRows, cast_dtype, own


@dataclass(eq=False)
class PreallocatedColumn:
    """The tensors of a site, each put behind those before it; see `Column`.

    Attributes:
        filled: The part of each room that is filled, as if it had been joined.
        capacity: How many elements along the axis there is room for, made at the first firing.
        options: What the tensors are cast and moved to.
        rooms: For each firing of a forward, the tensor that is filled.

    """

    asks_axes: ClassVar[bool] = True
    copies: ClassVar[bool] = False
    stacks: ClassVar[bool] = True

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
        """For each firing of a forward, one tensor: what is filled of its room."""
        return self.filled.firings

    def keep(
        self, selected: Shaped[Tensor, "..."], rows: TokenRows | None, *, number: int, copied: bool
    ) -> Owned:
        """Put what was selected where it will lie if the forward ends well.

        Raises:
            CapacityError: The room that was made is full.
            JoinError: It does not fit what is there.

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
                f"{key!r} has room for capacity={self.capacity} along {join!r}, of which {used} "
                f"are taken, but a forward left {count} more; give a larger capacity, or read and "
                "clear the buffer in between"
            )
        return room.narrow(dim, used, count)

    def _used(self, number: int) -> int:
        if number >= len(self.firings):
            return 0
        return self.firings[number][0].value.shape[self.filled.join_dim()]

    def write(self, stages: Sequence[Owned]) -> int:
        """Count what one forward left as filled."""
        dim = self.filled.join_dim()
        if stages[0].rows is not None:
            self.filled.rows.add(stages[0].rows)
        for number, chunk in enumerate(stages):  # it lies behind the others in the room already
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
        """The bytes of the whole room."""
        return sum(room.nbytes for room in self.rooms)

    def read(self, number: int) -> Shaped[Tensor, "..."]:
        """Return what is filled of a room."""
        return self.filled.read(number)

    def positions(self) -> Int64[Tensor, "token 2"] | None:
        """Return where the rows come from that a mask kept."""
        return self.filled.positions()

    def outline(self) -> Shaped[Tensor, "..."]:
        """Return a tensor without values that has the shape and dtype of what is filled."""
        return self.filled.outline()

    def fixed_sizes(self) -> Sizes:
        """Return the sizes that do not change, however many forwards there are."""
        return self.filled.fixed_sizes()

    def spec(self) -> type:
        """Return the annotation of what is filled."""
        return self.filled.spec()

    def row(self, *, drawn: bool) -> Row:
        """Describe it for the table."""
        shape = self.filled.shape()
        return row_of(self.label, self.firings, shape=shape, nbytes=self.nbytes, drawn=drawn)

    def saved(self) -> SavedSite:
        """Return what is filled, for a file."""
        return self.filled.saved()

    def moved(self, device: torch.device | None, dtype: torch.dtype | None) -> Column[Any]:
        """Return a copy, without room for more, on another device or of another dtype."""
        return self.filled.with_chunks(moved_chunks(self.firings, device, dtype))

    def copied(self) -> Column[Any]:
        """Return a copy, without room for more, that shares no memory with it."""
        return self.filled.with_chunks(copied_chunks(self.firings))

    def settle(self) -> None:
        """Wait until every tensor has arrived."""
        self.filled.settle()

    def finish(self) -> None:
        """Do nothing, since the axes were found at the first activation."""

    def clear(self) -> None:
        """Drop what was captured, and the room."""
        self.filled.clear()
        self.rooms.clear()


def _empty(selected: Tensor, dim: int, capacity: int, options: ColumnOptions) -> Tensor:
    """Reserve memory for what will be selected. On Linux it is used only as it is filled."""
    shape = list(selected.shape)
    shape[dim] = capacity
    target = selected.device if options.device is None else options.device
    pinned = selected.is_cuda and target.type == "cpu"
    kind = cast_dtype(selected, options.dtype)
    return torch.empty(shape, dtype=kind, device=target, pin_memory=pinned)
