"""The names of a site, and what is known of the axes of what it leaves."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from actctx._model.axes import Axes
from actctx._results.annotations import Sizes


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
class Label:
    """The names of a site, and the axes of what it leaves.

    Attributes:
        key: The name under which it is read.
        names: Every name that it answers to.
        named: The axes of what it leaves, and their sizes.
        tell: Finds the axes by what the model does, where so far there is only what the name
            proposes.
        batch_dropped: Whether a slice dropped the first axis, which is the batch where the axes
            are not known.
        repeats: Whether a forward is known to compute the same several times.

    """

    key: str
    names: tuple[str, ...]
    named: Named = field(default_factory=Named)
    tell: Callable[[], Named | None] | None = None
    batch_dropped: bool = False
    repeats: bool = False

    @property
    def axes(self) -> Axes:
        """The axes of what it leaves, as far as they are known so far; see `settle`."""
        return self.named.axes

    def settle(self) -> Axes:
        """Return the axes, for which the model is run unless they are known."""
        tell, self.tell = self.tell, None
        if tell is not None:
            self.named = tell() or self.named
        return self.named.axes

    def copied(self) -> "Label":
        """Return a copy whose axes are known."""
        self.settle()
        return replace(self)

    def __getstate__(self) -> dict[str, object]:
        self.settle()  # while the model is alive
        return dict(self.__dict__)
