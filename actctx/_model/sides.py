"""Determine which tokens a place of a model runs on: the encoder's or the decoder's.

# NOTE [How a side is determined]
By structure, not by names: modules inside `get_encoder()` run on the encoder's tokens, modules
inside `get_decoder()` run on the decoder's, and so do heads and the whole model after them. Keys
and values of cross-attention are the encoder's. Names are used only for these, and for models that
do not say what their encoder is. Embeddings that both sides look up are `"shared"`: the number of
positions of a firing may decide. Image and audio towers of a composite model run on patches or
frames.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias

from torch import nn

from actctx._model.places import Place, uncompiled

Side: TypeAlias = Literal["encoder", "decoder", "shared", "tower"]

_MODALITIES = ("image", "audio")
_NOT_TOKENS = ("pixel_values", "input_values", "input_features", "audio_values")
_CROSS = re.compile(
    r"(^|[._])(cross_?att\w*|enc(oder)?_?(dec(oder)?_?)?att\w*)($|\.)", re.IGNORECASE
)
_KEYS = re.compile(
    r"\.(k|v|kv|key|value|k_proj|v_proj|kv_proj|key_value|c_attn|hook_[kv](_input)?)($|\.)"
)
_OF_ENCODER = re.compile(r"(^|_)(encoder|key_value_states)")


class Sides:
    """The sides of a model, determined once from its structure; see the note above.

    Attributes:
        two: Whether the model has an encoder and a decoder.

    """

    def __init__(self, model: nn.Module) -> None:
        core = core_of(model)
        encoder, decoder = _part(core, "get_encoder"), _part(core, "get_decoder")
        while decoder is not None and id(encoder) in _inside(decoder):  # it holds both
            decoder = _part(decoder, "get_decoder")
        config = getattr(core, "config", None)
        self.two = bool(
            getattr(config, "is_encoder_decoder", False)
            and encoder is not None
            and decoder is not None
            and encoder is not decoder
        )
        self._encoder = _inside(encoder) if self.two else set()
        self._decoder = _inside(decoder) if self.two else set()
        self._shared = _inside(_part(core, "get_input_embeddings")) if self.two else set()
        self._towers = in_towers(core)
        self._root = {id(model), id(core)}

    def of(self, place: Place, *, io: str = "out", output: int | str | None = None) -> Side | None:
        """Return whose tokens a place runs on; see `side_of`."""
        number = id(place.module)
        if number in self._towers:
            return "tower"
        cross = _CROSS.search(place.name)
        if cross and _KEYS.search(place.name, cross.start()):
            return "encoder"
        if isinstance(output, str) and (self.two or number not in self._root):
            if output.startswith("decoder_"):
                return "decoder"
            if _OF_ENCODER.search(output):
                return "encoder"
        return self._by_structure(place.module, io, output) if self.two else None

    def _by_structure(self, module: nn.Module, io: str, output: int | str | None) -> Side:
        in_encoder, in_decoder = id(module) in self._encoder, id(module) in self._decoder
        if in_encoder != in_decoder:
            return "encoder" if in_encoder else "decoder"
        several = isinstance(output, int) and output > 0  # which may be of the other
        if in_encoder or several or id(module) in self._shared:
            return "shared"
        return "encoder" if io == "in" and self._holds_encoder(module) else "decoder"

    def _holds_encoder(self, module: nn.Module) -> bool:
        return any(id(inner) in self._encoder for inner in module.modules())


def side_of(
    place: Place, model: nn.Module, *, io: str = "out", output: int | str | None = None
) -> Side | None:
    """Return whose tokens a place of a model runs on.

    Args:
        place: The place, such as a hook point or a module.
        model: The model that holds it.
        io: Whether the input (`"in"`) or the output (`"out"`) of the place is meant.
        output: Which of several values is meant, by position or name; see `Site`.

    Returns:
        `"encoder"` or `"decoder"`; `"shared"` if both run it, so that only the number of positions
        of an activation may decide; `"tower"` for the part of a composite model that runs on images
        or sound; None in a model that has one sequence of tokens.

    Example:
        >>> from actctx._model.places import Places
        >>> side_of(Places(model)["blocks.0.hook_resid_post"], model) is None
        True

    """
    return Sides(model).of(place, io=io, output=output)


def core_of(model: nn.Module) -> nn.Module:
    """Return the model that a bridge or a compiled model wraps, or the model itself."""
    model = uncompiled(model)
    inner = getattr(model, "original_model", None)
    return inner if isinstance(inner, nn.Module) else model


def encoder_of(core: nn.Module) -> nn.Module | None:
    """Return the encoder of an encoder-decoder."""
    has_decoder = getattr(getattr(core, "config", None), "is_encoder_decoder", False)
    return _part(core, "get_encoder") if has_decoder else None


def in_towers(core: nn.Module) -> set[int]:
    """Return the `id` of each module in the parts of a model for images and sound."""
    towers = _towers(core, _part(core, "get_encoder"))
    return {number for tower in towers for number in _inside(tower)}


def _part(core: nn.Module, getter: str, *args: Any) -> nn.Module | None:
    """Return a part of a model, unless it has none or returns itself."""
    get: Callable[..., Any] | None = getattr(core, getter, None)
    if not callable(get):
        return None
    try:
        found = get(*args)
    except (AttributeError, TypeError, NotImplementedError, ValueError):
        return None
    return found if isinstance(found, nn.Module) and found is not core else None


def _towers(core: nn.Module, encoder: nn.Module | None) -> Iterator[nn.Module]:
    """List the parts for images and sound."""
    for modality in _MODALITIES:
        tower = _part(core, "get_encoder", modality)
        if tower is not None and tower is not encoder:
            yield tower
    if input_of(core) is not None and reads_tokens(core):
        decoder = _part(core, "get_decoder")  # a wrapper of it may say what its encoder reads
        parts = (part for part in core.modules() if input_of(part) in _NOT_TOKENS)
        yield from (part for part in parts if id(decoder) not in _inside(part))


def reads_tokens(model: nn.Module) -> bool:
    """Return whether a model reads tokens; it does unless it says otherwise."""
    return input_of(model) not in _NOT_TOKENS


def input_of(part: nn.Module) -> str | None:
    """Return the name of the input that a part of a Hugging Face model declares."""
    read = getattr(type(part), "main_input_name", None)
    return read if isinstance(read, str) else None


def _inside(part: nn.Module | None) -> set[int]:
    return set() if part is None else set(map(id, part.modules()))
