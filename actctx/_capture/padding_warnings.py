"""Warn of padding that a capture is likely to mistake for tokens, each kind once."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from actctx._capture.generation import Start, generating
from actctx._capture.watched import WatchedSite
from actctx._model.known_faults import warn
from actctx._model.sides import core_of


class PaddingWarnings:
    """The warnings of one capture about padding, each given once.

    Args:
        model: The model that is captured from.

    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._given: set[str] = set()

    def has_given(self, kind: str) -> bool:
        """Return whether a kind of warning was given."""
        return kind in self._given

    def give(self, kind: str, said: str | None) -> None:
        """Give a warning, unless there is none or its kind was given."""
        if said is None or kind in self._given:
            return
        self._given.add(kind)
        warn(said)

    def left(self) -> None:
        """Warn of padding on the left that the model counts as positions."""
        takes = "position_ids" in _parameters(self._model)
        ids = ", or pass position_ids that start at the first token of each" if takes else ""
        self.give(
            "left",
            f"the sequences are padded on the left, and {type(self._model).__name__} counts the "
            "padding as positions, so the activations differ from those of the sequences alone; "
            f"pad on the right{ids}",
        )

    def selected(self) -> None:
        """Warn of a slice that selects padding."""
        self.give(
            "slice",
            "a slice along 'pos' selects padding, by the mask that the forward was given; capture "
            "with mask='attention', so that positions count real tokens and -1 is the last",
        )

    def positions(self, site: WatchedSite) -> None:
        """Warn that positions of a site are not the tokens that the forward was given."""
        self.give(
            "positions",
            f"{site.shown} does not have one position per token of the forward, so a slice along "
            "'pos' may select what the model adds, such as patches or padding to a multiple; look "
            "at the whole site first, or select by position with a tuple, as in "
            "slice=np.s_[:, -1], which does not count tokens",
        )

    def repeats(self) -> None:
        """Warn of positions that `generate()` runs again."""
        self.give(
            "repeats",
            "generate() takes back wrong guesses and runs their positions again, but the guesses "
            "are captured too; if acts.positions() has several rows of one position, keep only the "
            "last, and drop those after the end of the text; or generate without an assistant "
            "model or a prompt lookup",
        )

    def joined(self, start: Start, previous: Start) -> None:
        """Warn of a forward that is joined to one that it does not continue."""
        if start.line == previous.line and not start.repeats:
            return
        if start.is_cached or previous.is_cached or generating() is not None:
            self.give(
                "joined",
                "join='pos' joins a forward to one that it does not continue, so positions repeat "
                "or belong to other sequences, as with guidance, with assisted decoding, without a "
                "KV cache, or in a second generate(); capture with join=None for a list, or with "
                "mask='attention', where acts.positions() gives the sequence and position of each "
                "row",
            )


def _parameters(model: nn.Module) -> tuple[str, ...]:
    return (*_signature(model.forward), *_signature(core_of(model).forward))


def _signature(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()
