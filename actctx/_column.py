"""What one site left, and how it becomes one tensor."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from actctx._axes import Axes
from actctx._errors import AxisError, JoinError
from actctx._select import Owned


@dataclass(eq=False)
class Column:
    """What one site left, firing by firing, forward by forward.

    Attributes:
        key: The name under which it is read.
        names: Every name that it answers to.
        axes: The axes of each of its tensors.
        firings: For each firing of a forward, the tensors of the forwards, in order. Joining
            replaces them by one.

    """

    key: str
    names: tuple[str, ...]
    axes: Axes = ()
    firings: list[deque[Owned]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """The bytes that its tensors hold."""
        return sum(chunk.value.nbytes for chunks in self.firings for chunk in chunks)

    def write(self, firings: Sequence[Owned]) -> None:
        """Take what the site left in one forward, a tensor for each firing."""
        self.firings.extend(deque() for _ in range(len(firings) - len(self.firings)))
        for chunks, chunk in zip(self.firings, firings, strict=False):
            chunks.append(chunk)

    def joined(self, firing: int, join: str | None) -> Any:
        """Join one firing over the forwards; a list of them where `join` is None.

        Raises:
            AxisError: There are several forwards, and no axis `join` to join them along.
            JoinError: Their shapes, dtypes or devices differ.

        """
        chunks = self.firings[firing]
        for chunk in chunks:
            wait_for(chunk)
        if join is None:
            return [chunk.value for chunk in chunks]
        if len(chunks) > 1:
            dim = self._join_dim(join)
            _check_joinable(self.key, chunks, dim, join)
            _concatenate(chunks, dim)
        return chunks[0].value

    def settle(self) -> None:
        """Wait until every tensor has arrived, and forget how it was waited for."""
        for chunks in self.firings:
            for _ in range(len(chunks)):
                chunks.append(Owned(wait_for(chunks.popleft())))

    def shape(self, join: str | None) -> str:
        """Tell the joined shape without joining, since showing it must not cost memory."""
        shapes = [tuple(chunk.value.shape) for chunk in self.firings[0]]
        if len(shapes) == 1:
            return str(shapes[0])
        try:
            dim = self._join_dim(join or "")
        except AxisError:
            return f"{len(shapes)} x {shapes[0]}"
        total = sum(shape[dim] for shape in shapes)
        return str((*shapes[0][:dim], total, *shapes[0][dim + 1 :]))

    def _join_dim(self, join: str) -> int:
        if join in self.axes:
            return self.axes.index(join)
        if join == "pos" and "query" in self.axes:
            return self.axes.index("query")
        if join == "batch" and self.axes and self.axes[0] in {"_", "token"}:
            return 0
        raise AxisError(
            f"{self.key!r} was captured in several forwards, but has no axis {join!r} along "
            f"which to join them; its axes are {' '.join(self.axes)!r}; keep the axis with a "
            "slice of length one, or capture with join=None for a list"
        )


def wait_for(chunk: Owned) -> Tensor:
    """Return a captured tensor once its copy to the host has arrived."""
    if chunk.ready is not None:
        chunk.ready.synchronize()
    return chunk.value


def _check_joinable(key: str, chunks: Sequence[Owned], dim: int, join: str) -> None:
    first = chunks[0].value
    for chunk in chunks:
        other = chunk.value
        if _others(first, dim) != _others(other, dim):
            raise JoinError(
                f"{key!r} was captured with the shapes {tuple(first.shape)} and "
                f"{tuple(other.shape)}, which do not join along {join!r}; give the forwards one "
                "length (by padding, or with a slice), or capture with join=None for a list"
            )
        if (first.dtype, first.device) != (other.dtype, other.device):
            raise JoinError(
                f"{key!r} was captured as {first.dtype} on {first.device} and as {other.dtype} "
                f"on {other.device}; give capture a dtype= and a device="
            )


def _others(tensor: Tensor, dim: int) -> list[int]:
    return [size for axis, size in enumerate(tensor.shape) if axis != dim]


def _concatenate(chunks: deque[Owned], dim: int) -> None:
    """Replace chunks by their concatenation, releasing each as soon as it is copied."""
    if any(chunk.value.requires_grad for chunk in chunks):
        joined = torch.cat([chunk.value for chunk in chunks], dim)
        chunks.clear()
        chunks.append(Owned(joined))
        return
    first = chunks[0].value
    shape = list(first.shape)
    shape[dim] = sum(chunk.value.shape[dim] for chunk in chunks)
    with torch.inference_mode(mode=False):
        joined = torch.empty(shape, dtype=first.dtype, device=first.device)
    del first
    done = 0
    try:
        while chunks:
            size = chunks[0].value.shape[dim]
            joined.narrow(dim, done, size).copy_(chunks[0].value)
            done += size
            chunks.popleft()
    finally:  # an interrupt between two chunks loses neither those behind nor those before it
        chunks.appendleft(Owned(joined.narrow(dim, 0, done) if chunks else joined))
