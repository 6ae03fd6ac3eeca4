"""The model of an extraction, described before and after its first forward."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from actctx._model.fingerprint import settled
from actctx._model.foreign_hooks import noting_changes


class RunModel:
    """What is known of the model that is run.

    Args:
        model: The model.
        described: What is known of it before.

    Attributes:
        described: What a data set says of it.
        changing: The places whose hooks change what passes, once a forward has run.

    """

    def __init__(self, model: nn.Module, described: Mapping[str, Any]) -> None:
        self._model = model
        self._has_run = False
        self.described = described
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
