"""The protocol of a column: the values of one site over forwards. See `kinds.py` for its kinds.

# NOTE [The life of a column]
Each firing passes its selection to `keep`, which makes a stage of it: everything that is needed
later, sharing memory with nothing. When the forward ends, `write` takes its stages. If a forward
raised, stages are dropped and `write` is never called, so `keep` must not change what can be read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Int, Int64, Shaped
from torch import Tensor

from actctx._model.axes import Axes
from actctx._results.annotations import Sizes
from actctx._results.label import Label
from actctx._results.saved import SavedSite
from actctx._results.table import Row
from actctx._select.own import TokenRows
from actctx._stats.statistic import Statistic

S = TypeVar("S")
"""The staged value of one firing, until the forward ends."""


@dataclass(frozen=True, eq=False)
class Origin:
    """Where the values of one firing come from, in its own forward.

    Attributes:
        axes: The axes of what was selected; `"_"` for those that are not known.
        sequence: The sequence that each row is from, in the shape of the axes that have the rows;
            None where it is not known.
        position: The position that each row is from, what a KV cache holds included.
        sequences: The number of sequences of the forward; 0 where it is not known.
        line: What forwards that continue each other have in common.
        tokens: The token ids of the forward.
        real: Which of them are no padding.
        first_position: The position of the first of them.

    """

    axes: Axes
    sequence: Int64[Tensor, "..."] | None = None
    position: Int64[Tensor, "..."] | None = None
    sequences: int = 0
    line: int | None = None
    tokens: Int[Tensor, "batch pos"] | None = None
    real: Bool[Tensor, "batch pos"] | None = None
    first_position: int = 0


@dataclass(frozen=True)
class ColumnOptions:
    """The options of a column.

    Attributes:
        join: The axis along which forwards are joined, or None for a list of them.
        capacity: The number of elements along `join`, allocated at the first firing.
        dtype: The dtype that floating-point activations are cast to.
        device: The device that activations move to.
        reduce: The statistic that is computed in place of keeping tensors.

    """

    join: str | None = "batch"
    capacity: int | None = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    reduce: Statistic | None = None


@runtime_checkable
class Column(Protocol[S]):
    """The values of one site over forwards, firing by firing. See the note above.

    Attributes:
        asks_axes: Whether the axes are needed at the first activation, and not only when read.
        copies: Whether the stage of an activation that is kept whole, without a cast or a move, is
            an `Owned` copy of it.
        is_tensor: Whether it is read as one tensor, which can be a layer of a stack.

    """

    asks_axes: ClassVar[bool]
    copies: ClassVar[bool]
    is_tensor: ClassVar[bool]

    @property
    def label(self) -> Label:
        """The names of the site, and the axes of its values."""

    @property
    def firings(self) -> Sequence[Any]:
        """The values for each firing of a forward; empty before the first forward."""

    def keep(
        self,
        selected: Shaped[Tensor, "..."],
        rows: TokenRows | None,
        *,
        number: int,
        copied: bool,
        origin: Callable[[], Origin],
    ) -> S:
        """Stage the selection of one firing.

        Args:
            selected: The selection from the activation.
            rows: With a mask, where its rows come from.
            number: The index of the stage in its forward.
            copied: Whether selecting made a copy already.
            origin: Finds where the values come from.

        """

    def write(self, stages: Sequence[S]) -> int:
        """Take the stages of one forward, and return the bytes that they take on the host.

        Memory that was allocated before is not counted.
        """

    @property
    def is_one(self) -> bool:
        """Whether its firings are one result: there is only one, or all are equal."""

    @property
    def nbytes(self) -> int:
        """The size of its values in bytes."""

    def read(self, number: int) -> Any:
        """Return the values of one firing, over all forwards."""

    def positions(self) -> Int64[Tensor, "token 2"] | None:
        """Return the sequence and the position of each row that a mask kept; None without one."""

    def outline(self) -> Shaped[Tensor, "..."]:
        """Return a tensor without values, with the shape and dtype of the result of `read`."""

    def fixed_sizes(self) -> Sizes:
        """Return the sizes of the result, None for those that grow with forwards."""

    def spec(self) -> type:
        """Return the annotation of the result."""

    def row(self, *, drawn: bool) -> Row:
        """Describe it for the table, with a histogram of its values or without."""

    def saved(self) -> SavedSite:
        """Return its part of a file."""

    def moved(self, device: torch.device | None, dtype: torch.dtype | None) -> "Column[Any]":
        """Return a copy on another device, or of another dtype."""

    def copied(self) -> "Column[Any]":
        """Return a copy that shares no memory with it."""

    def settle(self) -> None:
        """Prepare for pickling: wait until every tensor has arrived."""

    def finish(self) -> None:
        """Prepare for reading while the model is still alive, when the block ends."""

    def clear(self) -> None:
        """Drop the captured values. Values that were read stay valid."""
