"""The model of an extraction, described before its first forward and behind it."""

import contextlib
from collections.abc import Collection, Iterator

from torch import nn

from actctx._model.fingerprint import describe_model, settled
from actctx._model.foreign_hooks import noting_changes


class RunModel:
    """What is known of the model that is run.

    Args:
        model: The model.

    Attributes:
        described: What a data set says of it.
        changing: The places whose hooks change what passes, once a forward has run.

    Raises:
        OptionError: Its weights are on the meta device, and nowhere else.

    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._has_run = False
        self.described = describe_model(model)
        self.changing: Collection[str] = ()

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Watch a forward if it is the first: which hooks change something, and what changes."""
        if self._has_run:
            yield
            return
        with noting_changes(self._model) as changing:
            yield
        self._has_run, self.changing = True, changing
        self.described = settled(self.described, self._model, changing)
