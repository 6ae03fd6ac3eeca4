"""What of an observation a statistic reduces, and what it keeps: rows by kept axes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from actctx._errors import AxisError, OptionError
from actctx._stats.statistic import Observation

Over = str | int | Sequence[str | int]
"""The axes that are reduced, as a user names them."""

_USUAL = ("batch", "pos", "token")


def read_over(over: Over | None) -> tuple[str | int, ...] | None:
    """Read which axes are to be reduced; None for those that usually are.

    Raises:
        OptionError: They are not names or numbers of axes.

    """
    if over is None:
        return None
    given = over.split() if isinstance(over, str) else [over] if isinstance(over, int) else over
    is_some = isinstance(given, Sequence) and len(given) > 0
    if not is_some or not all(isinstance(each, str) or type(each) is int for each in given):
        raise OptionError(
            f"over={over!r} does not name axes; give names or numbers, such as over='batch' or "
            "over=('batch', 'pos')"
        )
    if len({*given}) < len(given):
        raise OptionError(f"over={over!r} names an axis twice; name each once")
    return tuple(given)


class Origins(NamedTuple):
    """Where rows come from: -1 where it is not known, or not of one row."""

    sequence: Int64[Tensor, "..."]
    position: Int64[Tensor, "..."]


@dataclass(frozen=True, eq=False)
class Rows:
    """The values of an observation, with all reduced axes as one in front.

    Attributes:
        values: The rows, as a view of the observation's values where torch can.
        axes: The names of the kept axes.
        observation: What they are from.
        reduced: The axes that were reduced.
        kept: The axes that were kept.

    """

    values: Shaped[Tensor, "row ..."]
    axes: tuple[str, ...]
    observation: Observation
    reduced: tuple[int, ...]
    kept: tuple[int, ...]

    def origins(self, index: Int64[Tensor, "*kept n"]) -> Origins:
        """Find where some rows of each kept element come from.

        Args:
            index: The numbers of the rows, along the last axis, for each kept element.

        """
        observation, shape = self.observation, self.observation.values.shape
        coordinates: dict[int, Tensor] = {}
        rest = index
        for dim in reversed(self.reduced):
            coordinates[dim] = rest % shape[dim]
            rest = rest // shape[dim]
        for place, dim in enumerate(self.kept):
            numbers = torch.arange(shape[dim], device=index.device)
            behind = (1,) * (index.dim() - 1 - place)
            coordinates[dim] = numbers.reshape(-1, *behind).expand(index.shape)
        where = tuple(coordinates[dim] for dim in observation.row_dims)
        unknown = torch.full_like(index, -1)
        return Origins(
            *(
                unknown if each is None else each.to(index.device)[where].expand(index.shape)
                for each in (observation.sequence, observation.position)
            )
        )

    @property
    def has_sequences(self) -> bool:
        """Whether each whole row is of one sequence, and it is known which."""
        axes = self.observation.axes
        kept = (axes[dim] for dim in self.observation.row_dims if dim in self.kept)
        return self.observation.sequence is not None and {*kept} <= {"pos", "query"}

    @property
    def has_positions(self) -> bool:
        """Whether each whole row is at one position, and it is known which."""
        is_whole = not any(dim in self.kept for dim in self.observation.row_dims)
        return self.observation.position is not None and is_whole

    def origins_of_rows(self) -> Origins:
        """Find where each whole row comes from."""
        observation, shape = self.observation, self.observation.values.shape
        unknown = torch.full((len(self.values),), -1, device=self.values.device)
        found = []
        for each, is_known in (
            (observation.sequence, self.has_sequences),
            (observation.position, self.has_positions),
        ):
            if each is None or not is_known or not self.values.numel():
                found.append(unknown)
                continue
            sizes = [1] * len(shape)
            for place, dim in enumerate(observation.row_dims):
                sizes[dim] = each.shape[place]
            of_rows = each.to(unknown.device).reshape(sizes).permute(*self.reduced, *self.kept)
            for _ in self.kept:  # along which it is the same
                of_rows = of_rows.select(-1, 0)
            found.append(of_rows.expand([shape[dim] for dim in self.reduced]).reshape(-1))
        return Origins(*found)

    def numbers_within(self) -> Int64[Tensor, " row"]:
        """Number the rows of one sequence and position, such as several heads at one place."""
        axes, shape = self.observation.axes, self.observation.values.shape
        told = {"batch", "token"} if self.has_sequences else set()
        told |= {"pos", "query", "token"} if self.has_positions else set()
        rest = torch.arange(len(self.values), device=self.values.device)
        numbers, stride = torch.zeros_like(rest), 1
        for dim in reversed(self.reduced):
            if axes[dim] not in told:
                numbers = numbers + rest % shape[dim] * stride
                stride *= shape[dim]
            rest = rest // shape[dim]
        return numbers


def arrange(observation: Observation, over: tuple[str | int, ...] | None) -> Rows:
    """Bring the axes that are reduced to the front, as one.

    Raises:
        AxisError: The values do not have these axes, or none that is usually reduced.

    """
    values, axes = observation.values, observation.axes
    reduced = _usual_dims(observation) if over is None else _named_dims(observation, over)
    kept = tuple(dim for dim in range(len(axes)) if dim not in reduced)
    if (*reduced, *kept) != tuple(range(len(axes))):
        values = values.permute(*reduced, *kept)
    if len(reduced) > 1:
        values = values.flatten(0, len(reduced) - 1)
    return Rows(values, tuple(axes[dim] for dim in kept), observation, reduced, kept)


def _usual_dims(observation: Observation) -> tuple[int, ...]:
    axes = observation.axes
    dims = tuple(dim for dim, axis in enumerate(axes) if axis in _USUAL)
    if not dims and axes[:1] == ("_",):
        return (0,)  # along which forwards are joined
    if not dims:
        raise AxisError(
            f"{said_of(observation)} {_shown(axes)}, none of which is 'batch', 'pos' or 'token'; "
            "name those to reduce with over="
        )
    return dims


def _named_dims(observation: Observation, over: tuple[str | int, ...]) -> tuple[int, ...]:
    axes = observation.axes
    names = [*over]
    if "batch" in names and "pos" in names and "token" in axes and not {"batch", "pos"} & {*axes}:
        names = ["token", *(name for name in names if name not in {"batch", "pos", "token"})]
    dims = {dim for name in names if (dim := _dim_of(name, axes)) is not None}
    missing = [name for name in names if _dim_of(name, axes) is None]
    if missing:
        raise AxisError(
            f"{said_of(observation)} {_shown(axes)}, so there is no axis {missing[0]!r} to reduce "
            "as over= asks; name one of these, or give its number"
        )
    return tuple(sorted(dims))


def _dim_of(name: str | int, axes: tuple[str, ...]) -> int | None:
    if isinstance(name, int):
        return name % len(axes) if -len(axes) <= name < len(axes) else None
    if name == "pos" and "pos" not in axes:
        name = "query"
    return axes.index(name) if name in axes and name != "_" else None


def said_of(observation: Observation) -> str:
    """Begin a message about the axes of an observation."""
    return f"{observation.site!r} has the axes" if observation.site else "the values have the axes"


def _shown(axes: tuple[str, ...]) -> str:
    return repr(" ".join(axes))
