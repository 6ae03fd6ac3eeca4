"""A column that keeps a statistic in place of tensors, as `reduce=` asks."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from actctx._errors import JoinError, NotCapturedError, OptionError
from actctx._results.annotations import Sizes
from actctx._results.column import Column, ColumnOptions, Origin
from actctx._results.label import Label
from actctx._results.saved import SavedSite
from actctx._results.sequences import Sequences
from actctx._results.table import Row
from actctx._select.mapped import version_of
from actctx._select.own import TokenRows, cast_dtype
from actctx._stats.kinds import is_of_actctx
from actctx._stats.statistic import Observation, Statistic
from actctx._text import counted, dtype_name

_MOST_SHAPES = 1024
"""The shapes of activations that are remembered, so that memory does not grow."""


class Partial(NamedTuple):
    """What one firing left: a statistic of it alone, and the sequences that it is of."""

    statistic: Statistic
    sequences: int
    line: int | None


@dataclass(eq=False)
class StatisticColumn:
    """A statistic of what a site yields, for each firing of a forward; see `Column`.

    Attributes:
        recipe: What was given to `reduce=`. It stays as it is.
        firings: For each firing of a forward, the statistic of all forwards.
        sequences: Counts the sequences of the forwards.
        forwards: The number of forwards.
        shapes: The shapes whose statistics are known to merge with the others.

    """

    asks_axes: ClassVar[bool] = True
    copies: ClassVar[bool] = False
    is_tensor: ClassVar[bool] = False

    label: Label
    recipe: Statistic
    options: ColumnOptions
    firings: list[Statistic] = field(default_factory=list)
    sequences: Sequences = field(default_factory=Sequences)
    forwards: int = 0
    shapes: set[tuple[int, tuple[int, ...]]] = field(default_factory=set)

    def keep(
        self,
        selected: Shaped[Tensor, "..."],
        rows: TokenRows | None,  # noqa: ARG002  the origin tells them
        *,
        number: int,
        copied: bool,
        origin: Callable[[], Origin],
    ) -> Partial:
        """Compute the statistic of what was selected.

        Raises:
            AxisError, JoinError, OptionError: The statistic cannot be computed of it, or does not
                merge with those of the forwards before.

        """
        found = origin()
        values = selected.detach().to(self.options.device, cast_dtype(selected, self.options.dtype))
        before = version_of(selected)
        partial = self.recipe.empty()
        with torch.no_grad():
            partial.update(self._observation(values, found))
        if not copied and version_of(selected) != before:
            raise OptionError(
                f"{self._kind} changed in place what it was given of {self.label.key!r}, which "
                "would change the model's own activation; update it without that"
            )
        self._check_merging(number, partial, tuple(values.shape))
        return Partial(partial, found.sequences, found.line)

    def _observation(self, values: Tensor, found: Origin) -> Observation:
        if len(found.axes) != values.dim():
            raise JoinError(
                f"{self.label.key!r} was to be reduced with the axes {' '.join(found.axes)!r}, but "
                f"fired with the shape {tuple(values.shape)}; name its axes with Site(axes=...)"
            )
        first = self.sequences.first(found.sequences, found.line)
        return Observation(
            values=values,
            axes=found.axes,
            sequence=None if found.sequence is None else found.sequence + first,
            position=found.position,
            tokens=found.tokens,
            real=found.real,
            first_sequence=first,
            first_position=found.first_position,
            number=self.forwards,
            site=self.label.key,
        )

    def _check_merging(self, number: int, partial: Statistic, shape: tuple[int, ...]) -> None:
        """Try once for each shape if the statistic merges, so that a forward that ended well does.

        Raises:
            JoinError: It does not.

        """
        if number >= len(self.firings) or (number, shape) in self.shapes:
            return
        trial = self.recipe.empty()
        trial.merge(self.firings[number])
        trial.merge(partial)
        if len(self.shapes) >= _MOST_SHAPES:
            self.shapes.clear()
        self.shapes.add((number, shape))

    def write(self, stages: Sequence[Partial]) -> int:
        """Merge what one forward left into the statistics."""
        self.sequences.add(stages[0].sequences, stages[0].line)
        self.forwards += 1
        for number, stage in enumerate(stages):
            if number == len(self.firings):
                self.firings.append(self.recipe.empty())
            with torch.no_grad():
                self.firings[number].merge(stage.statistic)
        return 0

    @property
    def _kind(self) -> str:
        return type(self.recipe).__name__

    @property
    def is_one(self) -> bool:
        """Whether its firings are one statistic: there is one, or a repeated one of equal state."""
        if len(self.firings) == 1:
            return True
        if not self.label.repeats:
            return False
        first, *others = (each.state_dict() for each in self.firings)
        return all(_is_equal(first, other) for other in others)

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors in the statistics."""
        return sum(each.nbytes for statistic in self.firings for each in _tensors_of(statistic))

    def read(self, number: int) -> Statistic:
        """Return the statistic of one firing."""
        return self.firings[number]

    def positions(self) -> Int64[Tensor, "token 2"] | None:
        """Refuse, since no rows are kept.

        Raises:
            NotCapturedError: Always.

        """
        raise NotCapturedError(
            f"{self.label.key!r} is a {self._kind}, which keeps no rows, so there are no positions "
            "of rows; capture it without reduce="
        )

    def outline(self) -> Shaped[Tensor, "..."]:
        """Refuse, since what is kept is not a tensor.

        Raises:
            OptionError: Always.

        """
        raise OptionError(
            f"{self.label.key!r} is a {self._kind}, not a tensor; read it with acts[name]"
        )

    def fixed_sizes(self) -> Sizes:
        """Return the sizes that the forwards have in common."""
        return self.label.named.sizes

    def spec(self) -> type:
        """Return the class of the statistic."""
        return type(self.recipe)

    def row(self, *, drawn: bool) -> Row:  # noqa: ARG002  a statistic draws itself
        """Describe it for the table."""
        first = next(iter(_tensors_of(self.firings[0])), None)
        several = f" ({len(self.firings)} firings)" if len(self.firings) > 1 else ""
        count = getattr(self.firings[0], "count", None)
        rows = f" of {counted(count, 'row')}" if type(count) is int else ""
        return Row(
            site=self.label.key + several,
            axes=" ".join(self.label.axes),
            shape=self._kind + rows,
            dtype="" if first is None else dtype_name(first.dtype),
            device="" if first is None else str(first.device),
            nbytes=self.nbytes,
        )

    def saved(self) -> SavedSite:
        """Return the state of the statistic, for a file.

        Raises:
            OptionError: It is of a class that a file cannot name.

        """
        if not is_of_actctx(self.firings[0]):
            raise OptionError(
                f"acts.save(path) writes the statistics of actctx.stats, but {self.label.key!r} is "
                f"a {self._kind} of your own; save what its state_dict() returns yourself"
            )
        label = self.label
        sizes = self.fixed_sizes()
        return SavedSite(label.names, label.settle(), sizes, statistic=self.firings[0])

    def moved(self, device: torch.device | None, dtype: torch.dtype | None) -> Column[Any]:  # noqa: ARG002  its numbers are no activations
        """Return a copy on another device. Its numbers keep their dtype."""
        return self._with([moved_statistic(each, device) for each in self.firings])

    def copied(self) -> Column[Any]:
        """Return a copy that shares no memory with it."""
        return self._with([moved_statistic(each, None) for each in self.firings])

    def _with(self, firings: list[Statistic]) -> "StatisticColumn":
        return StatisticColumn(
            self.label.copied(),
            self.recipe,
            self.options,
            firings,
            self.sequences.copied(),
            self.forwards,
        )

    def settle(self) -> None:
        """Do nothing, since what is on its way to the host is part of no statistic."""

    def finish(self) -> None:
        """Do nothing, since the axes were found at the first activation."""

    def clear(self) -> None:
        """Begin anew. Statistics that were read stay as they are."""
        self.firings.clear()
        self.sequences.clear()
        self.shapes.clear()
        self.forwards = 0


def _tensors_of(statistic: Statistic) -> list[Tensor]:
    return [each for each in statistic.state_dict().values() if isinstance(each, Tensor)]


def moved_statistic(statistic: Statistic, device: torch.device | None) -> Statistic:
    """Copy a statistic to a device; None where it stays."""
    state = copy.deepcopy(statistic.state_dict())
    for name, each in state.items():
        if isinstance(each, Tensor):
            state[name] = each.to(device)
    moved = statistic.empty()
    moved.load_state_dict(state)
    return moved


def _is_equal(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Return whether two states are the same; NaN is itself."""
    if first.keys() != second.keys():
        return False
    for name, one in first.items():
        two = second[name]
        if isinstance(one, Tensor) and isinstance(two, Tensor):
            alike = one.shape == two.shape and one.dtype == two.dtype
            if not alike or not torch.allclose(one, two, rtol=0, atol=0, equal_nan=True):
                return False
        elif isinstance(one, Tensor) or isinstance(two, Tensor) or one != two:
            return False
    return True
