"""Parse, check and apply `slice=`."""

import functools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, NamedTuple, SupportsIndex, TypeAlias

import torch
from jaxtyping import Bool, Int64, Integer, Shaped
from torch import Tensor

from actctx._errors import AxisError, OptionError, SelectionError
from actctx._model.axes import Axes

Index: TypeAlias = (
    SupportsIndex | slice | range | Sequence[int] | Integer[Tensor, "i"] | Bool[Tensor, "i"]
)
"""An index along one axis: a position, a slice, positions, or a mask of the whole axis."""

Slice: TypeAlias = Index | Mapping[str, Index] | tuple[Index | EllipsisType, ...] | None
"""The type of `slice=`; see `actctx.capture`."""


@dataclass(frozen=True, eq=False)
class Positions:
    """Positions along one axis, in the order in which they are taken.

    Attributes:
        index: The positions; negative ones count from the end.
        lowest: The smallest position, 0 where there are none.
        highest: The largest position, -1 where there are none.
        length: The size that the axis must have, if the positions came from a mask.

    """

    index: Int64[Tensor, " i"]
    lowest: int
    highest: int
    length: int | None = None

    def on(self, device: torch.device, size: int) -> Int64[Tensor, " i"]:
        """Return the positions for `index_select`: on the device, and not negative."""
        index = self.index.to(device)
        return torch.where(index < 0, index + size, index) if self.lowest < 0 else index


class Step(NamedTuple):
    """What is selected along one axis."""

    dim: int
    pick: int | slice | Positions
    asked: str


@dataclass(frozen=True, eq=False)
class Selector:
    """What to select from every activation of one site.

    Attributes:
        site: The name of the site, for messages.
        steps: What to select, axis by axis.
        axes: The axes of an activation of the site, if known.

    """

    site: str
    steps: tuple[Step, ...]
    axes: Axes | None

    @functools.cached_property
    def copies(self) -> bool:
        """Whether selecting already makes a copy."""
        return any(_gathers(step.pick) for step in self.steps)

    def drops(self, dim: int, rank: int) -> bool:
        """Return whether an int drops this axis of an activation of this rank."""
        return any(step.dim % rank == dim for step in self.steps if isinstance(step.pick, int))

    def axes_after(self, axes: Axes) -> Axes:
        """Return the axes that remain of an activation's `axes`: an int drops its axis."""
        if not self.steps:
            return axes
        return tuple(axis for dim, axis in enumerate(axes) if not self.drops(dim, len(axes)))

    def sizes_after(self, sizes: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the sizes of the remaining axes, as far as they are known beforehand."""
        if not self.steps:
            return sizes
        picks = {step.dim % len(sizes): step.pick for step in self.steps}
        left = (dim for dim in range(len(sizes)) if not isinstance(picks.get(dim), int))
        return tuple(_size_after(picks.get(dim), sizes[dim]) for dim in left)

    def select(self, activation: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Select from a checked activation, as a view, or as a copy if `copies`."""
        if not self.steps:
            return activation
        window = [slice(None)] * activation.dim()
        gathered: list[tuple[int, Int64[Tensor, " i"]]] = []
        dropped: list[int] = []
        for step in self.steps:
            dim, size = step.dim % activation.dim(), activation.shape[step.dim]
            if isinstance(step.pick, int):
                position = step.pick % size
                window[dim] = slice(position, position + 1)
                dropped.append(dim)
            elif isinstance(step.pick, Positions):
                gathered.append((dim, step.pick.on(activation.device, size)))
            elif _gathers(step.pick):
                backwards = torch.arange(size, device=activation.device)
                start, stop, stride = step.pick.indices(size)
                gathered.append((dim, backwards[torch.tensor(range(start, stop, stride)).long()]))
            else:
                window[dim] = step.pick
        selected = activation[tuple(window)]
        for dim, index in gathered:
            selected = selected.index_select(dim, index)
        return selected.squeeze(tuple(dropped)) if dropped else selected

    def check(self, shape: torch.Size) -> None:
        """Refuse an activation that does not have the selected axes or positions.

        Raises:
            AxisError: It has other axes than the site is known to have.
            SelectionError: A position is outside its axis.

        """
        if self.steps and self.axes is not None and len(self.axes) != len(shape):
            raise AxisError(
                f"{self.site!r} fired with the shape {tuple(shape)}, but the slice is along its "
                f"axes {' '.join(self.axes)!r}; select by position with a tuple, or name the axes "
                "it has with Site(axes=...)"
            )
        for step in self.steps:
            if not -len(shape) <= step.dim < len(shape):
                raise AxisError(
                    f"{self.site!r} fired with the shape {tuple(shape)}, which has no axis "
                    f"{step.asked}; give the slice as many entries as there are axes, or fewer"
                )
            check_range(self.site, step, shape[step.dim])


def _size_after(pick: int | slice | Positions | None, size: int | None) -> int | None:
    if isinstance(pick, Positions):
        return len(pick.index)
    if isinstance(pick, slice):
        return None if size is None else len(range(*pick.indices(size)))
    return size


def _gathers(pick: int | slice | Positions) -> bool:
    """Return whether torch cannot select by a view: positions, and slices with a negative step."""
    return isinstance(pick, Positions) or (isinstance(pick, slice) and (pick.step or 1) < 0)


def check_range(site: str, step: Step, size: int) -> None:
    """Refuse positions outside an axis of `size` elements; slices end at its end, as in Python."""
    pick = step.pick
    if isinstance(pick, slice):
        return
    lowest, highest = (pick, pick) if isinstance(pick, int) else (pick.lowest, pick.highest)
    length = pick.length if isinstance(pick, Positions) else None
    if length is not None and length != size:
        raise SelectionError(
            f"{site!r} has the size {size} along {step.asked}, but the mask that selects from it "
            f"has the length {length}; give one entry for each position"
        )
    if not (-size <= lowest and highest < size):
        worst = lowest if lowest < -size else highest
        raise SelectionError(
            f"{site!r} has the size {size} along {step.asked}, so there is no position {worst}; "
            f"choose from {-size} to {size - 1}"
        )


def parse_slice(
    site: str, asked: Slice, axes: Axes | None, sizes: Mapping[str, int] | None = None
) -> Selector:
    """Convert the user's slice into a selector, before any forward.

    Args:
        site: The name of the site, for messages.
        asked: What to select; see `actctx.capture`.
        axes: The axes of the site's activations, or None where they are not known.
        sizes: The sizes of axes that are known beforehand, in elements.

    Raises:
        AxisError: The site has no such axis, or its axes are not known.
        SelectionError: A position is outside an axis of known size.
        OptionError: An index has a type that is not supported.

    """
    sizes = sizes or {}
    if asked is None:
        return Selector(site, (), axes)
    if isinstance(asked, tuple):
        steps = _positional(site, asked, axes)
    else:
        by_axis = asked if isinstance(asked, Mapping) else {"pos": asked}
        steps = [
            Step(_dim(site, axis, axes, sizes), _as_pick(site, index), repr(axis))
            for axis, index in by_axis.items()
        ]
    for step in steps:
        size = sizes.get(axes[step.dim]) if axes and -len(axes) <= step.dim < len(axes) else None
        if size is not None:
            check_range(site, step, size)
    taken = [step.dim for step in steps]
    if len(set(taken)) < len(taken):
        raise AxisError(f"the slice of {site!r} selects twice from one axis; give one index for it")
    # A tuple does not depend on the known axes, so it need not agree with them.
    return Selector(site, tuple(steps), None if isinstance(asked, tuple) else axes)


def _positional(
    site: str, asked: tuple[Index | EllipsisType, ...], axes: Axes | None
) -> list[Step]:
    """Read a tuple such as `np.s_[:, -1]`: axis by axis, from the end after an ellipsis."""
    ellipses = [i for i, entry in enumerate(asked) if entry is Ellipsis]
    if len(ellipses) > 1:
        raise OptionError(f"the slice of {site!r} has more than one '...'; give one")
    count = len(asked) - len(ellipses)
    if axes is not None and count > len(axes):
        raise AxisError(
            f"the slice of {site!r} has {count} entries, but its axes are {' '.join(axes)!r}; "
            "give as many entries as there are axes, or fewer"
        )
    split = ellipses[0] if ellipses else len(asked)
    entries = [*enumerate(asked[:split]), *enumerate(asked[split + 1 :], split + 1 - len(asked))]
    picks = [(dim, _as_pick(site, entry)) for dim, entry in entries]
    return [Step(dim, pick, f"{dim}") for dim, pick in picks if pick != slice(None)]


def _dim(site: str, axis: str, axes: Axes | None, sizes: Mapping[str, int]) -> int:
    """Find an axis by its name. `pos` is the query axis of a pattern, as in TransformerLens."""
    if axes is None:
        raise AxisError(
            f"the axes of the module {site!r} are not known, so there is no {axis!r} to select "
            "from; name them, as in Site(..., axes='batch pos d_model'), or select by position "
            "with a tuple, as in slice=np.s_[:, -1]"
        )
    if axis in axes:
        return axes.index(axis)
    if axis == "pos" and "query" in axes:
        return axes.index("query")
    alike = "head" in sizes and sizes["head"] == sizes.get("kv_head")
    if axis == "head" and "kv_head" in axes and alike:
        return axes.index("kv_head")
    if axis in {"pos", "batch"} and axes[0] == "token":
        raise AxisError(
            f"{site!r} has no axis {axis!r}; its axes are {' '.join(axes)!r}; "
            f"{of_flat_rows(axes)}, else select by position with a tuple"
        )
    grouped = "'kv_head', which several heads share" if axis == "head" and "kv_head" in axes else ""
    raise AxisError(
        f"{site!r} has no axis {axis!r}; its axes are {' '.join(axes)!r}; select along "
        f"{grouped or 'one of these, or by position with a tuple'}"
    )


def of_flat_rows(axes: Axes) -> str:
    """Say how a site that has one row for each token is divided into sequences."""
    named = " ".join(("batch", "pos", *axes[1:]))
    return f"if it has one row for each token, in order, give Site(axes={named!r})"


def _as_pick(site: str, index: Any) -> int | slice | Positions:
    if isinstance(index, bool):
        raise _no_index(site, index)
    if isinstance(index, slice):
        try:
            index.indices(1)
        except (TypeError, ValueError):  # not ints, or a step of 0
            raise _no_index(site, index) from None
        return index
    try:
        return operator.index(index)
    except TypeError:
        pass
    try:
        positions = torch.as_tensor(list(index) if isinstance(index, range) else index)
    except (TypeError, ValueError, RuntimeError):
        raise _no_index(site, index) from None
    return _as_positions(site, positions)


def _as_positions(site: str, index: Shaped[Tensor, "..."]) -> Positions:
    if index.is_meta or index.is_sparse or index.is_quantized:
        raise _no_index(site, index)
    if index.dim() != 1 or (index.numel() and (index.is_floating_point() or index.is_complex())):
        raise _no_index(site, index)
    length = len(index) if index.dtype == torch.bool else None
    positions = index.nonzero().flatten() if length is not None else index.detach().long()
    if not positions.numel():
        return Positions(positions, 0, -1, length)
    lowest, highest = positions.aminmax()
    return Positions(positions.clone(), int(lowest), int(highest), length)


def _no_index(site: str, index: object) -> OptionError:
    return OptionError(
        f"the slice of {site!r} cannot select with {index!r}; give an int, a slice, a range, "
        "a list of ints, a one-dimensional index tensor or a bool mask of the whole axis"
    )


def parse_words(asked: Sequence[str]) -> dict[str, Index]:
    """Read `--slice` options, one per axis.

    Raises:
        OptionError: One of them cannot be read, or an axis is given twice.

    """
    found: dict[str, Index] = {}
    for option in asked:
        axis, _, index = option.partition("=")
        if axis in found:
            raise OptionError(f"--slice selects twice along {axis!r}; give one index for it")
        try:
            found[axis] = _parse_index(index)
        except (TypeError, ValueError):
            raise OptionError(
                f"--slice {option!r} is not AXIS=INDEX, with an int, a range a:b or a:b:c, or "
                "positions a,b,c; give one such as pos=-1, pos=0:10 or head=0,3"
            ) from None
    return found


def _parse_index(index: str) -> Index:
    if ":" in index:
        return slice(*(int(bound) if bound else None for bound in index.split(":")))
    return [int(position) for position in index.split(",")] if "," in index else int(index)
