"""The contract of what one site leaves over the forwards. Its kinds are chosen in `kinds.py`.

# NOTE [The life of a column]
Each firing passes what was selected to `keep`, which makes a stage of it: all that is needed of it
later, sharing memory with nothing. When the forward ends, `write` takes its stages. Of a forward
that raised, stages are dropped and `write` is never called, so `keep` must leave nothing behind
that counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from actctx._results.annotations import Sizes
from actctx._results.label import Label
from actctx._results.saved import SavedSite
from actctx._results.table import Row
from actctx._select.own import TokenRows

S = TypeVar("S")
"""What is staged of one firing until the forward ends."""


@dataclass(frozen=True)
class ColumnOptions:
    """What becomes of what a site yields.

    Attributes:
        join: The axis along which forwards are joined, or None for a list of them.
        capacity: How many elements along `join` there is room for, made at the first firing.
        dtype: The dtype that floating-point activations are cast to.
        device: The device that activations move to.

    """

    join: str | None = "batch"
    capacity: int | None = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None


@runtime_checkable
class Column(Protocol[S]):
    """What one site leaves over the forwards, firing by firing. See the note above.

    Attributes:
        asks_axes: Whether the axes are asked for at the first activation, and not when read.
        copies: Whether the stage of an activation that is kept whole, as it is and where it is, is
            an `Owned` copy of it.
        stacks: Whether what is read is one tensor, which can be a layer of a stack.

    """

    asks_axes: ClassVar[bool]
    copies: ClassVar[bool]
    stacks: ClassVar[bool]

    @property
    def label(self) -> Label:
        """The names of the site, and the axes of what it leaves."""

    @property
    def firings(self) -> Sequence[Any]:
        """What it left, for each firing of a forward; empty before the first forward."""

    def keep(
        self, selected: Shaped[Tensor, "..."], rows: TokenRows | None, *, number: int, copied: bool
    ) -> S:
        """Stage what was selected of one firing.

        Args:
            selected: What was selected of the activation.
            rows: With a mask, where its rows come from.
            number: Which of the stages of its forward it will be.
            copied: Whether selecting made a copy already.

        """

    def write(self, stages: Sequence[S]) -> int:
        """Take the stages of one forward, and return the bytes that it keeps of them on the host.

        What was reserved before is not counted.
        """

    @property
    def is_one(self) -> bool:
        """Whether its firings are one result: there is one, or a repeated one of equal values."""

    @property
    def nbytes(self) -> int:
        """The bytes that it holds."""

    def read(self, number: int) -> Any:
        """Return what one firing left, over all forwards."""

    def positions(self) -> Int64[Tensor, "token 2"] | None:
        """Return the sequence and the position of each row that a mask kept; None without one."""

    def outline(self) -> Shaped[Tensor, "..."]:
        """Return a tensor without values, of the shape and dtype of what `read` would return."""

    def fixed_sizes(self) -> Sizes:
        """Return the sizes of what is read, None for those that grow with the forwards."""

    def spec(self) -> type:
        """Return the annotation of what is read."""

    def row(self, *, drawn: bool) -> Row:
        """Describe it for the table, its values drawn or not."""

    def saved(self) -> SavedSite:
        """Return what a file keeps of it."""

    def moved(self, device: torch.device | None, dtype: torch.dtype | None) -> "Column[Any]":
        """Return a copy on another device, or of another dtype."""

    def copied(self) -> "Column[Any]":
        """Return a copy that shares no memory with it."""

    def settle(self) -> None:
        """Prepare for pickling: wait until every tensor has arrived."""

    def finish(self) -> None:
        """Prepare for reading while the model is still alive, when the block ends."""

    def clear(self) -> None:
        """Drop what was captured. What was read stays valid."""
