"""What a statistic is, and what it is given of each firing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from jaxtyping import Bool, Int, Int64, Shaped
from torch import Tensor

ROW_AXES = ("batch", "pos", "query", "token")
"""The axes along which values come from one sequence and position after the other."""


# Not `Self`, which beartype takes only where it decorates the class.
Kind = TypeVar("Kind", bound="Statistic")
Joint = TypeVar("Joint", bound="JointStatistic")


@dataclass(frozen=True, eq=False, kw_only=True)
class Observation:
    """What one firing of a site left for a statistic.

    A *row* is what lies at one index of the axes `batch`, `pos`, `query` and `token`, as far as
    there are such axes. Where none is known, the first axis has the rows.

    Attributes:
        values: What was selected, masked and mapped. The statistic does not own it: it may be part
            of the model's own memory, so a copy is made of what is kept. It may require a gradient.
        axes: The names of its axes, such as `("batch", "pos", "d_model")`; `"_"` for an axis that
            is not known.
        sequence: The sequence that each row is from, counted over all forwards, in the shape of the
            axes that have the rows, in their order; None where it is not known.
        position: The position in the forward that each row is from, padding included; with a KV
            cache it goes on from the forward before. None where it is not known.
        tokens: The token ids of the forward; None where it was not given any.
        real: Which of them are no padding; None where that is not known.
        first_sequence: The number of the sequence that `tokens[0]` is.
        first_position: The number of the position that `tokens[:, 0]` are at.
        number: How many observations of this site came before, in this forward and earlier ones.
            It tells rows apart whose sequence and position are not known.
        site: The name of the site, for messages.

    """

    values: Shaped[Tensor, "..."]
    axes: tuple[str, ...]
    sequence: Int64[Tensor, "..."] | None = None
    position: Int64[Tensor, "..."] | None = None
    tokens: Int[Tensor, "batch pos"] | None = None
    real: Bool[Tensor, "batch pos"] | None = None
    first_sequence: int = 0
    first_position: int = 0
    number: int = 0
    site: str = ""

    @property
    def row_dims(self) -> tuple[int, ...]:
        """The axes that have the rows, in their order."""
        known = tuple(dim for dim, axis in enumerate(self.axes) if axis in ROW_AXES)
        return known or ((0,) if self.axes[:1] == ("_",) else ())


@runtime_checkable
class Statistic(Protocol):
    """What `reduce=` takes: something that is computed of all forwards, in memory of one size.

    A capture uses the statistic that it is given as a recipe. When a site fires, it makes an
    `empty` one and updates it; when the forward has ended well, it merges this one into that of the
    site. So a forward that raised leaves no trace.
    """

    def empty(self: Kind) -> Kind:  # noqa: PYI019  see above
        """Make a new one of the same options, which has seen nothing."""
        ...

    def update(self, observation: Observation, /) -> None:
        """Add the values of one firing, of which no memory is kept."""
        ...

    def merge(self: Kind, other: Kind, /) -> None:  # noqa: PYI019
        """Add all that another one has seen, which stays as it is.

        The result is that of one statistic that has seen everything, in whatever order.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return all that it holds: tensors, and values that JSON has."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take what `state_dict` returned in place of what it holds."""
        ...


@runtime_checkable
class JointStatistic(Protocol):
    """A statistic of several sites at once, such as how alike layers are.

    A capture makes one `empty` for each forward, and gives it what all sites left in it.
    """

    def empty(self: Joint) -> Joint:  # noqa: PYI019  see above
        """Make a new one of the same options, which has seen nothing."""
        ...

    def update_all(self, observations: Mapping[str, Observation], /) -> None:
        """Add what each site left in one forward, of which no memory is kept.

        Args:
            observations: What each left, by the name under which the site is read, in the order
                in which they ran.

        """
        ...

    def merge(self: Joint, other: Joint, /) -> None:  # noqa: PYI019
        """Add all that another one has seen, which stays as it is."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return all that it holds: tensors, and values that JSON has."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Take what `state_dict` returned in place of what it holds."""
        ...


for _each in (Observation, Statistic, JointStatistic):
    _each.__module__ = "actctx.stats"  # where users find them
del _each
