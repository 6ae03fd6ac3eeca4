"""The names of a site, and what is known about the axes of its values."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from actctx._model.axes import Axes
from actctx._results.annotations import Sizes


class Named(NamedTuple):
    """What is known about the axes of a site's values.

    Attributes:
        axes: The axes of each of its tensors.
        sizes: Their sizes, None for those that may differ between forwards.
        whole: The sizes of the model's axes before selection, by name.

    """

    axes: Axes = ()
    sizes: Sizes = ()
    whole: Mapping[str, int] = {}


@dataclass(eq=False)
class Label:
    """The names of a site, and the axes of its values.

    Attributes:
        key: The name under which it is read.
        names: All of its names.
        named: The axes of its values, and their sizes.
        tell: Finds the axes by a run of the model, if so far only the name proposes them.
        batch_dropped: Whether a slice dropped the first axis, which is the batch if the axes are
            unknown.
        repeats: Whether a forward is known to compute the same value several times.

    """

    key: str
    names: tuple[str, ...]
    named: Named = field(default_factory=Named)
    tell: Callable[[], Named | None] | None = None
    batch_dropped: bool = False
    repeats: bool = False

    @property
    def axes(self) -> Axes:
        """The axes of its values, as far as they are known so far; see `settle`."""
        return self.named.axes

    def settle(self) -> Axes:
        """Return the axes, and run the model if they are unknown."""
        tell, self.tell = self.tell, None
        if tell is not None:
            self.named = tell() or self.named
        return self.named.axes

    def copied(self) -> "Label":
        """Return a copy whose axes are known."""
        self.settle()
        return replace(self)

    def __getstate__(self) -> dict[str, object]:
        self.settle()  # while the model exists
        return dict(self.__dict__)
