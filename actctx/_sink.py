"""Where captured tensors go."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from actctx._select import Owned


@runtime_checkable
class Sink(Protocol):
    """Where captured tensors go, as into `Activations`."""

    def write(self, forward: Mapping[str, Sequence[Owned]]) -> None:
        """Take what one forward left: for each site that fired, a tensor for each firing."""
