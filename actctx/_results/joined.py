"""A column whose forwards become one tensor when it is read."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from actctx._errors import AxisError, JoinError
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
from actctx._results.column import Column, ColumnOptions, Origin
from actctx._results.joining import (
    check_alike,
    check_joinable,
    check_not_quantized,
    concatenate,
)
from actctx._results.label import Label
from actctx._results.saved import SavedSite
from actctx._results.sequences import KeptRows
from actctx._results.table import Row
from actctx._select.own import Owned, TokenRows, plain_mode


@dataclass(eq=False)
class JoinedColumn:
    """The tensors of a site, to be joined along an axis; see `Column`.

    Attributes:
        join: The axis along which forwards are joined.
        firings: For each firing of a forward, the tensors of the forwards, in order. Joining
            replaces them by one.
        rows: With a mask, the rows that were kept.
        stack: The stack that its tensor is a layer of, if layers were stacked.

    """

    asks_axes: ClassVar[bool] = False
    copies: ClassVar[bool] = True
    is_tensor: ClassVar[bool] = True

    label: Label
    join: str
    options: ColumnOptions
    firings: list[Chunks] = field(default_factory=list)
    rows: KeptRows = field(default_factory=KeptRows)
    stack: Tensor | None = None

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
        self.stack = None
        if stages[0].rows is not None:
            self.rows.add(stages[0].rows)
        return add_chunks(self.firings, stages)

    @property
    def is_one(self) -> bool:
        """Whether its firings are one tensor: there is one, or a repeated one of equal values."""
        return are_one(self.label, self.firings, self.read)

    @property
    def nbytes(self) -> int:
        """The bytes that it holds."""
        return bytes_of(self.firings)

    def read(self, number: int) -> Shaped[Tensor, "..."]:
        """Join one firing over the forwards.

        Raises:
            AxisError: There are several forwards, and no axis to join them along.
            JoinError: Their shapes, dtypes or devices differ.

        """
        chunks = self.firings[number]
        for chunk in chunks:
            wait_for(chunk)
        if len(chunks) > 1:
            dim = self.join_dim()
            check_not_quantized(self.label.key, chunks[0].value)
            tensors = [chunk.value for chunk in chunks]
            check_joinable(self.label.key, tensors, dim, self.join)
            del tensors  # so that each is freed once it is copied
            check_alike(self.label.key, chunks)
            concatenate(chunks, dim)
        return chunks[0].value.contiguous()

    def positions(self) -> Int64[Tensor, "token 2"] | None:
        """Return where the rows come from that a mask kept."""
        return self.rows.joined()

    def outline(self) -> Shaped[Tensor, "..."]:
        """Return a tensor without values, with the shape and dtype of the joined one.

        Raises:
            AxisError: There are several forwards, and no axis to join them along.
            JoinError: Their shapes differ.

        """
        tensors = [chunk.value for chunk in self.firings[0]]
        shape = list(tensors[0].shape)
        if len(tensors) > 1:
            dim = self.join_dim()
            check_joinable(self.label.key, tensors, dim, self.join)
            shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
        return torch.empty(shape, dtype=tensors[0].dtype, device="meta")

    def shape(self) -> str:
        """Return the joined shape without joining, which would take memory."""
        try:
            return str(tuple(self.outline().shape))
        except (AxisError, JoinError):
            return shapes_of(self.firings[0])

    def fixed_sizes(self) -> Sizes:
        """Return the sizes that do not depend on the number of forwards."""
        try:
            free = self.join_dim()
        except AxisError:
            return self.label.named.sizes
        return tuple(None if dim == free else n for dim, n in enumerate(self.label.named.sizes))

    def spec(self) -> type:
        """Return the annotation of the joined tensor."""
        return spec_of_chunks(self.label, self.firings, self.fixed_sizes())

    def row(self, *, drawn: bool) -> Row:
        """Describe it for the table."""
        shape = self.shape()
        return row_of(self.label, self.firings, shape=shape, nbytes=self.nbytes, drawn=drawn)

    def saved(self) -> SavedSite:
        """Return its joined tensor, for a file."""
        tensor = self.read(0)
        axes = self.label.settle()
        sizes = self.fixed_sizes() or (None,) * tensor.dim()
        return SavedSite(self.label.names, axes, sizes, tensor, self.positions())

    def moved(self, device: torch.device | None, dtype: torch.dtype | None) -> Column[Any]:
        """Return a copy on another device, or of another dtype."""
        return self.with_chunks(moved_chunks(self.firings, device, dtype))

    def copied(self) -> Column[Any]:
        """Return a copy that shares no memory with it."""
        return self.with_chunks(copied_chunks(self.firings))

    def with_chunks(self, firings: list[Chunks]) -> "JoinedColumn":
        """Return a copy with these tensors."""
        label, rows = self.label.copied(), self.rows.copied()
        return JoinedColumn(label, self.join, self.options, firings, rows)

    def settle(self) -> None:
        """Wait until every tensor has arrived."""
        wait_for_all(self.firings)

    def finish(self) -> None:
        """Find the axes, if there are forwards to join."""
        if any(len(chunks) > 1 for chunks in self.firings):
            self.label.settle()

    def clear(self) -> None:
        """Drop the captured tensors. Tensors that were read stay valid."""
        self.stack = None
        self.firings.clear()
        self.rows.clear()

    def join_dim(self) -> int:
        """Find the axis along which forwards are joined; rows of tokens are joined in order.

        Raises:
            AxisError: The tensors do not have it.

        """
        axes = self.label.settle()
        if self.join in axes:
            return axes.index(self.join)
        if self.join == "pos" and "query" in axes:
            return axes.index("query")
        if "token" in axes:
            return axes.index("token")
        if self.join == "batch" and axes[:1] == ("_",) and not self.label.batch_dropped:
            return 0
        raise AxisError(
            f"{self.label.key!r} was captured in several forwards, but has no axis {self.join!r} "
            f"along which to join them; its axes are {' '.join(axes)!r}; keep the axis with a "
            "slice of length one, or capture with join=None for a list"
        )

    def __getstate__(self) -> dict[str, object]:
        """Pickle its own tensors, and not the other layers of a stack that it is a view of."""
        state = dict(self.__dict__)
        if self.stack is not None:
            state |= {"stack": None, "firings": copied_chunks(self.firings)}
        return state


def stack_in_place(columns: Sequence[Column[Any]]) -> Shaped[Tensor, "layer ..."]:
    """Stack columns; their tensors become views of the stack, so that no memory is doubled."""
    tensors = [column.read(0) for column in columns]
    joined = [column for column in columns if isinstance(column, JoinedColumn)]
    if any(tensor.requires_grad for tensor in tensors) or len(joined) < len(columns):
        with torch.enable_grad():  # the graph was requested, whatever the reader's mode
            return torch.stack(tensors)
    whole = joined[0].stack
    if whole is not None and all(column.stack is whole for column in joined):
        return whole
    with plain_mode():
        first = tensors[0]
        shape = (len(tensors), *first.shape)
        whole = torch.empty(shape, dtype=first.dtype, device=first.device)
        del first
    for layer, column in enumerate(joined):
        column.firings[0] = deque([Owned(whole[layer].copy_(tensors.pop(0)))])
        column.stack = whole
    return whole
