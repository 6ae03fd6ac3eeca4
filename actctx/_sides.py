"""The side of a site in a model with an encoder and a decoder, whose tokens are not the same."""

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from actctx._errors import OptionError
from actctx._reading import innermost
from actctx._watched import WatchedSite

_OF_DECODERS = ("decoder", "tgt", "target")
"""How the names of what a forward takes for its decoder begin."""


def check_sides(model: nn.Module, sites: Iterable[WatchedSite]) -> None:
    """Refuse sites that run on a decoder's tokens, since the rows are of the encoder's.

    The encoder is what the model itself says it is. All that lies outside of it, such as the
    logits, runs on what the decoder is given, which may be as long.

    Raises:
        OptionError: There is one.

    """
    inner = innermost(model)
    encoder, decoder = _sides_of(inner)
    if encoder is None and not _is_named_for_both(inner):
        return
    for site in sites:
        if _is_of_decoder(site, encoder, decoder):
            raise OptionError(
                f"{site.shown} is of the decoder, but a row is a token of what the encoder is "
                "given; capture it by capture(), or extract from the decoder by itself"
            )


def _sides_of(model: Any) -> tuple[nn.Module | None, nn.Module | None]:
    """Find the encoder and the decoder within a model of transformers'."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None, None
    found = [
        getattr(model, name)() if hasattr(model, name) else None
        for name in ("get_encoder", "get_decoder")
    ]
    # An encoder, or a decoder, by itself says that it is both.
    encoder, decoder = (each if isinstance(each, nn.Module) else None for each in found)
    return (None, None) if encoder is model or encoder is decoder else (encoder, decoder)


def _is_named_for_both(model: Any) -> bool:
    """Tell whether a forward takes the tokens of a decoder beside those that it is given first."""
    names = [*inspect.signature(model.forward).parameters][1:]
    is_both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    has_decoder = any("decoder" in name for name, _ in model.named_children())
    return has_decoder and (is_both or any(name.startswith(_OF_DECODERS) for name in names))


def _is_of_decoder(site: WatchedSite, encoder: nn.Module | None, decoder: nn.Module | None) -> bool:
    if encoder is None:
        parts = site.place.name.split(".")
        return any(part.startswith(("decoder", "unembed")) for part in parts)
    if isinstance(site.output, str) and site.output.startswith("encoder"):
        return False  # what the whole model returns of it
    module = site.place.module
    if not any(module is each for each in encoder.modules()):
        return True
    # Embeddings that both share run for the encoder first.
    is_shared = decoder is not None and any(module is each for each in decoder.modules())
    return is_shared and site.firing not in {None, 0}
