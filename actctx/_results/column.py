"""What one site left over the forwards, and how it becomes one tensor."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from actctx._errors import AxisError, CapacityError, JoinError
from actctx._model.axes import Axes
from actctx._results.annotations import Sizes
from actctx._results.joining import (
    check_alike,
    check_joinable,
    check_not_quantized,
    concatenate,
    give_back_to_system,
)
from actctx._results.sketch import sketch
from actctx._results.table import Row
from actctx._select.own import Owned, TokenRows, cast_dtype, plain_mode
from actctx._text import dtype_name


class Named(NamedTuple):
    """What is known of the axes of what a site left.

    Attributes:
        axes: The axes of each of its tensors.
        sizes: Their sizes, None for those that the forwards need not have in common.
        whole: The sizes that the model's axes have before anything is selected, by name.

    """

    axes: Axes = ()
    sizes: Sizes = ()
    whole: Mapping[str, int] = {}


@dataclass(eq=False)
class Column:
    """What one site left, firing by firing, forward by forward.

    Attributes:
        key: The name under which it is read.
        names: Every name that it answers to.
        join: The axis along which forwards are joined, or None.
        capacity: How many elements along `join` there is room for, made at the first firing.
        named: The axes of each of its tensors, and their sizes.
        firings: For each firing of a forward, the tensors of the forwards, in order. Joining
            replaces them by one.
        rooms: With a capacity, for each firing the tensor that is filled in place.
        rows: With a mask, the sequences and positions of the kept rows, forward by forward.
        sequences: With a mask, the number of sequences of all forwards.
        lines: With a mask, the first sequence of each line of forwards, and the number of them.
        stack: What its one tensor is a layer of, if layers were stacked.
        batch_dropped: Whether a slice dropped the first axis, which is the batch where the axes
            are not known.
        tell: Tells the axes by what the model does, where so far there is only what the name
            proposes.
        repeats: Whether a forward is known to compute the same several times.

    """

    key: str
    names: tuple[str, ...]
    join: str | None
    capacity: int | None = None
    named: Named = field(default_factory=Named)
    firings: list[deque[Owned]] = field(default_factory=list)
    rooms: list[Tensor] = field(default_factory=list)
    rows: deque[Int64[Tensor, "token 2"]] = field(default_factory=deque)
    sequences: int = 0
    lines: dict[int, tuple[int, int]] = field(default_factory=dict)
    stack: Tensor | None = None
    batch_dropped: bool = False
    tell: Callable[[], Named | None] | None = None
    repeats: bool = False

    @property
    def axes(self) -> Axes:
        """The axes of each of its tensors."""
        return self.named.axes

    @property
    def is_one(self) -> bool:
        """Whether its firings are one tensor: there is one, or a repeated one of equal values."""
        if len(self.firings) == 1:
            return True
        if not self.repeats or any(each.value.requires_grad for each in self.firings[0]):
            return False
        first, *others = (self.joined(number) for number in range(len(self.firings)))
        return all(_is_equal(first, other) for other in others)

    @property
    def is_to_join(self) -> bool:
        """Whether it holds several forwards that are to become one tensor."""
        return self.join is not None and any(len(chunks) > 1 for chunks in self.firings)

    @property
    def nbytes(self) -> int:
        """The bytes that it holds; with a capacity, those of the whole room."""
        if self.rooms:
            return sum(room.nbytes for room in self.rooms)
        return sum(chunk.value.nbytes for chunks in self.firings for chunk in chunks)

    def clear(self) -> None:
        """Drop what was captured. Tensors that were read stay valid."""
        self.stack = None
        self.firings.clear()
        self.rooms.clear()
        self.rows.clear()
        self.sequences = 0
        self.lines.clear()

    def write(self, firings: Sequence[Owned]) -> None:
        """Take what the site left in one forward, a tensor for each firing."""
        self.stack = None
        if len(firings) == len(self.firings) == 1 and self.capacity is None:
            (chunk,) = firings
            if chunk.rows is None:  # a shortcut for the usual case
                self.firings[0].append(chunk)
                return
        for number, chunk in enumerate(firings):
            if number == 0 and chunk.rows is not None:
                self._note_rows(chunk.rows)
            if number == len(self.firings):
                self.firings.append(deque())
            if self.capacity is None:
                self.firings[number].append(chunk)
            else:  # it lies behind the others in the room already
                used = self._used(number) + chunk.value.shape[self.join_dim()]
                whole = self.rooms[number].narrow(self.join_dim(), 0, used)
                self.firings[number] = deque([chunk._replace(value=whole)])

    def mapped(self, change: Callable[[Owned], Owned]) -> "Column":
        """Copy it with each tensor changed, and without room for more."""
        firings = [deque(map(change, chunks)) for chunks in self.firings]
        rows, lines = self.rows.copy(), self.lines.copy()
        self.settle_axes()
        return replace(
            self, capacity=None, rooms=[], firings=firings, rows=rows, lines=lines, stack=None
        )

    def settle_axes(self) -> None:
        """Find the axes by running the model, unless they are known."""
        tell, self.tell = self.tell, None
        if tell is not None:
            self.named = tell() or self.named

    def _note_rows(self, rows: TokenRows) -> None:
        """Count sequences over the forwards; those of one line have the same sequences."""
        first, count = self.lines.get(-1 if rows.line is None else rows.line, (0, 0))
        if count != rows.sequences:
            first = self.sequences
            self.sequences += rows.sequences
            if rows.line is not None:
                self.lines[rows.line] = first, rows.sequences
        self.rows.append(rows.where + torch.tensor([first, rows.before]))

    def room(
        self,
        number: int,
        selected: Shaped[Tensor, "..."],
        dtype: torch.dtype | None,
        device: torch.device | None,
    ) -> Shaped[Tensor, "..."] | None:
        """Return the place for the next tensor of a firing, where there is a capacity.

        Raises:
            CapacityError: The room that was made is full.
            JoinError: It does not fit what is there.

        """
        if self.capacity is None:
            return None
        dim = self.join_dim()
        check_not_quantized(self.key, selected)
        if number == len(self.rooms):
            self.rooms.append(_empty(selected, dim, self.capacity, dtype, device))
        room, used = self.rooms[number], self._used(number)
        count = selected.shape[dim]
        check_joinable(self.key, [room, selected], dim, self.join or "")
        if used + count > self.capacity:
            raise CapacityError(
                f"{self.key!r} has room for capacity={self.capacity} along {self.join!r}, of "
                f"which {used} are taken, but a forward left {count} more; give a larger "
                "capacity, or read and clear the buffer in between"
            )
        return room.narrow(dim, used, count)

    def joined(self, number: int) -> Any:
        """Join one firing over the forwards; a list of them where `join` is None.

        Raises:
            AxisError: There are several forwards, and no axis to join them along.
            JoinError: Their shapes, dtypes or devices differ.

        """
        chunks = self.firings[number]
        for chunk in chunks:
            wait_for(chunk)
        if self.join is None:
            return [chunk.value for chunk in chunks]
        if len(chunks) > 1:
            dim = self.join_dim()
            check_not_quantized(self.key, chunks[0].value)
            check_joinable(self.key, [chunk.value for chunk in chunks], dim, self.join)
            check_alike(self.key, chunks)
            concatenate(chunks, dim)
        return chunks[0].value.contiguous()

    def settle(self) -> None:
        """Wait until every tensor has arrived."""
        for chunks in self.firings:
            for _ in range(len(chunks)):
                chunks.append(Owned(wait_for(chunks.popleft())))

    def outline(self) -> Shaped[Tensor, "..."]:
        """Return a tensor without values that has the shape and dtype of the joined one.

        Raises:
            AxisError: There are several forwards, and no axis to join them along.
            JoinError: Their shapes differ.

        """
        tensors = [chunk.value for chunk in self.firings[0]]
        shape = list(tensors[0].shape)
        if len(tensors) > 1 or self.join is None:
            dim = self.join_dim()
            check_joinable(self.key, tensors, dim, self.join or "")
            shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
        return torch.empty(shape, dtype=tensors[0].dtype, device="meta")

    def shape(self) -> str:
        """Return the joined shape without joining, which would take memory."""
        try:
            return str(tuple(self.outline().shape))
        except (AxisError, JoinError):
            shapes = [str(tuple(chunk.value.shape)) for chunk in self.firings[0]]
            alike = len(set(shapes)) == 1
            return f"{len(shapes)} x {shapes[0]}" if alike else f"a list of {len(shapes)}"

    def fixed_sizes(self) -> Sizes:
        """Return the sizes that do not change, however many forwards there are."""
        try:
            free = None if self.join is None else self.join_dim()
        except AxisError:
            free = None
        return tuple(None if dim == free else size for dim, size in enumerate(self.named.sizes))

    def row(self, *, drawn: bool = False) -> Row:
        """Describe it for the table, its values drawn or not."""
        chunks = itertools.chain.from_iterable(self.firings) if drawn else ()
        first = self.firings[0][0].value
        several = f" ({len(self.firings)} firings)" if len(self.firings) > 1 else ""
        return Row(
            site=self.key + several,
            axes=" ".join(self.axes),
            shape=self.shape(),
            dtype=dtype_name(first.dtype),
            device=str(first.device),
            nbytes=self.nbytes,
            values=sketch([wait_for(chunk) for chunk in chunks]),
        )

    def __getstate__(self) -> dict[str, object]:
        """Pickle what it holds, and not the other layers of a stack that it is a view of."""
        self.settle_axes()
        state = dict(self.__dict__)
        if self.stack is not None:
            state["stack"] = None
            state["firings"] = [
                deque(Owned(chunk.value.clone()) for chunk in chunks) for chunks in self.firings
            ]
        return state

    def join_dim(self) -> int:
        """Find the axis along which forwards are joined; rows of tokens are joined as they come.

        Raises:
            AxisError: The tensors do not have it.

        """
        self.settle_axes()
        if self.join in self.axes:
            return self.axes.index(self.join)
        if self.join == "pos" and "query" in self.axes:
            return self.axes.index("query")
        if "token" in self.axes:
            return self.axes.index("token")
        if self.join == "batch" and self.axes[:1] == ("_",) and not self.batch_dropped:
            return 0
        raise AxisError(
            f"{self.key!r} was captured in several forwards, but has no axis {self.join!r} along "
            f"which to join them; its axes are {' '.join(self.axes)!r}; keep the axis with a "
            "slice of length one, or capture with join=None for a list"
        )

    def _used(self, number: int) -> int:
        if number >= len(self.firings) or not self.firings[number]:
            return 0
        return self.firings[number][0].value.shape[self.join_dim()]


def stack_in_place(columns: Sequence[Column]) -> Shaped[Tensor, "layer ..."]:
    """Stack what sites left; what they hold becomes views of it, so that nothing is held twice."""
    tensors = [column.joined(0) for column in columns]
    if any(tensor.requires_grad for tensor in tensors) or any(column.rooms for column in columns):
        with torch.enable_grad():  # the graph was asked for, whatever the reader's mode
            return torch.stack(tensors)
    whole = columns[0].stack
    if whole is not None and all(column.stack is whole for column in columns):
        return whole
    with plain_mode():
        first = tensors[0]
        shape = (len(tensors), *first.shape)
        whole = torch.empty(shape, dtype=first.dtype, device=first.device)
        del first
    for layer, column in enumerate(columns):
        column.firings[0] = deque([Owned(whole[layer].copy_(tensors.pop(0)))])
        column.stack = whole
    return whole


def wait_for(chunk: Owned) -> Tensor:
    """Return a captured tensor once its copy to the host has arrived."""
    if chunk.ready is not None:
        chunk.ready.synchronize()
    return chunk.value


def _empty(
    selected: Tensor,
    dim: int,
    capacity: int,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> Tensor:
    """Reserve memory for what will be selected. On Linux it is used only as it is filled."""
    shape = list(selected.shape)
    shape[dim] = capacity
    target = selected.device if device is None else device
    pinned = selected.is_cuda and target.type == "cpu"
    kind = cast_dtype(selected, dtype)
    return torch.empty(shape, dtype=kind, device=target, pin_memory=pinned)


def _is_equal(first: Any, second: Any) -> bool:
    """Return whether two tensors, or two lists of them, have the same values; NaN is itself."""
    if isinstance(first, list):
        return len(first) == len(second) and all(map(_is_equal, first, second))
    alike = first.shape == second.shape and first.dtype == second.dtype
    return alike and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)


@dataclass
class Kept:
    """Counts the bytes that a buffer keeps on the host, and returns unused memory between them."""

    nbytes: int = 0
    trimmed: int = 0

    def add(self, firings: Iterable[Owned]) -> None:
        """Record what a site left in one forward."""
        for chunk in firings:
            if chunk.value.is_cpu:
                self.nbytes += chunk.value.nbytes

    def trim(self) -> None:
        """Return freed memory to the system once as much has been kept since the last time."""
        if self.nbytes - self.trimmed > max(2**24, self.nbytes // 16):
            self.trimmed = self.nbytes
            give_back_to_system()
