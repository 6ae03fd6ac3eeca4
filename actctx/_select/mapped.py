"""What `map=` computes of an activation, checked."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Shaped
from torch import Tensor

from actctx._errors import OptionError
from actctx._model.axes import Axes
from actctx._select.values import check_capturable

MapFunction = Callable[[Tensor], Tensor]
"""What `map=` takes: it gets what was selected, and returns what is kept instead."""

AXIS = "feature"
"""The name of the last axis of what `map=` returns, unless another is given."""


@dataclass(frozen=True, eq=False)
class Mapped:
    """What is computed of a site's activations.

    Attributes:
        site: The name of the site, for messages.
        function: Computes it of what was selected.
        axis: The name of the last axis of what it returns; None where it drops the last axis.

    """

    site: str
    function: Callable[[Tensor], Any]
    axis: str | None

    def axes_after(self, axes: Axes) -> Axes:
        """Name the axes of what the function returns."""
        return axes[:-1] if self.axis is None else (*axes[:-1], self.axis)

    def sizes_after(self, sizes: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the sizes of the axes of what the function returns, as far as they are known."""
        return sizes[:-1] if self.axis is None else (*sizes[:-1], None)

    def of(self, selected: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Return what the function computes of an activation.

        Raises:
            OptionError: It raises, changes what it is given, or returns no tensor or one with other
                leading axes.

        """
        given = f"map= of {self.site} was given a tensor of the shape {tuple(selected.shape)}"
        before = version_of(selected)
        try:
            found = self.function(selected)
        except Exception as error:
            raise OptionError(
                f"{given} and raised {type(error).__name__}: {error}; give a function of one tensor"
            ) from error
        if version_of(selected) != before:
            raise OptionError(
                f"{given} and changed it in place, which would change the model's own activation; "
                "give a function that makes a new tensor"
            )
        if not isinstance(found, Tensor):
            raise OptionError(
                f"{given} and returned a {type(found).__name__}; give a function that returns one "
                "tensor"
            )
        self._check(given, selected, found)
        return found

    def _check(self, given: str, selected: Tensor, found: Tensor) -> None:
        check_capturable(f"map= of {self.site}", found, dtype=None, device=None)
        leading = selected.shape[:-1]
        rank = len(leading) + (self.axis is not None)
        if found.dim() == rank and found.shape[: len(leading)] == leading and selected.dim():
            return
        returned = f"{given} and returned one of the shape {tuple(found.shape)}"
        if self.axis is not None and found.shape == leading:
            raise OptionError(f"{returned}; where it drops the last axis, give map_axis=None")
        if self.axis is None and found.shape[:-1] == leading and found.dim() == selected.dim():
            raise OptionError(
                f"{returned}, but map_axis=None says that it drops the last axis; name the axis, "
                f"as in map_axis={AXIS!r}"
            )
        raise OptionError(
            f"{returned}, but the axes before the last have to stay as they are, "
            f"{tuple(leading)}; give a function of the last axis alone"
        )


def version_of(tensor: Tensor) -> int:
    """Return what changes when a tensor, or one that shares its memory, is changed in place."""
    return 0 if tensor.is_inference() else tensor._version


def read_map(site: str, function: object, axis: object) -> Mapped | None:
    """Read what is to be computed of a site's activations; None where they are kept as they are.

    Args:
        site: The name of the site, for messages.
        function: What `map=` was given.
        axis: What `map_axis=` was given.

    Raises:
        OptionError: It is not a function, or the axis has no valid name.

    """
    if function is None:
        return None
    if not callable(function) or isinstance(function, type):
        raise OptionError(
            f"map={function!r} of {site} is not a function; give one that takes what was selected "
            "and returns a tensor, such as sae.encode"
        )
    if axis is not None and not (isinstance(axis, str) and len(axis.split()) == 1):
        raise OptionError(
            f"map_axis={axis!r} of {site} is not the name of one axis; give one, such as {AXIS!r}, "
            "or None where map= drops the last axis"
        )
    return Mapped(site, function, axis)
