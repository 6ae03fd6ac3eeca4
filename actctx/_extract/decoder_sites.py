"""Refuse sites that leave no rows of a data set: those that run on a decoder's tokens."""

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from actctx._capture.watched import WatchedSite
from actctx._errors import OptionError
from actctx._model.config import innermost
from actctx._model.sides import Sides

_OF_DECODERS = ("decoder", "tgt", "target")
"""How the names of what a forward takes for its decoder begin."""


def check_sides(model: nn.Module, sites: Iterable[WatchedSite]) -> None:
    """Refuse sites that run on a decoder's tokens, since the rows are of the encoder's."""
    sides, inner = Sides(model), innermost(model)
    by_name = not sides.two and _is_named_for_both(inner)
    for site in sites:
        side = sides.of(site.place, io=site.io, output=site.output)
        parts = site.place.name.split(".")
        named = by_name and any(part.startswith(("decoder", "unembed")) for part in parts)
        # Embeddings that both share run for the encoder first.
        later = side == "shared" and site.firing not in {None, 0}
        if side == "decoder" or named or later:
            raise OptionError(
                f"{site.shown} belongs to the decoder, but a row is a token of the encoder's "
                "input; capture it with capture(), or extract from the decoder alone"
            )


def _is_named_for_both(model: Any) -> bool:
    """Return whether a forward also takes the tokens of a decoder, beside its first argument."""
    names = [*inspect.signature(model.forward).parameters][1:]
    is_both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    has_decoder = any("decoder" in name for name, _ in model.named_children())
    return has_decoder and (is_both or any(name.startswith(_OF_DECODERS) for name in names))
