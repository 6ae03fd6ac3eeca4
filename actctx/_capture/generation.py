"""Determine which forwards continue each other, from the caches that they are given and return.

# NOTE [Lines]
A forward with a filled cache continues the sequences of the forward that filled it: both belong to
one line, and have its number. It is the same line if it is the same cache object with the content
that the last forward left. A copy of a cache, a cache that was filled outside of captures, and a
cache that was cropped or is frozen for reuse each start a new line. Only `generate()` crops a cache
and continues the same sequences, to take back guessed tokens. Such a forward repeats positions.

A cache is asked for its length before the forward runs, because the forward changes it.
"""

import contextlib
import functools
import inspect
import itertools
import sys
import weakref
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor, nn

CACHES = (
    "past_key_values",
    "past_key_value",
    "past_kv_cache",
    "cache_params",
    "cache",
    "layer_past",
    "mems",
    "state",
)
"""The names of the caches that forwards are given and return."""


class Start(NamedTuple):
    """What is known of a forward before it runs.

    Attributes:
        line: The number of its line.
        before: The number of positions in its cache; None if the cache is filled but does not say
            how far, like those of recurrent models.
        limit: The number of positions that its cache can hold, if fixed.
        repeats: Whether it runs positions again that were taken back.
        is_cached: Whether it was given a filled cache.

    """

    line: int
    before: int | None = 0
    limit: int | None = None
    repeats: bool = False
    is_cached: bool = False


class _Left(NamedTuple):
    cache: "weakref.ref[Any]"
    line: int
    length: int | None


class Lines:
    """The lines of a capture's forwards; see the note above."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._numbers = itertools.count()
        self._left: dict[int, _Left] = {}

    @functools.cached_property
    def _layer(self) -> int:
        """The first layer of the model, or of its part, that a cache belongs to."""
        numbers = (getattr(module, "layer_idx", None) for module in self._model.modules())
        return min((number for number in numbers if type(number) is int), default=0)

    def begin(self, inputs: Mapping[str, Any]) -> Start:
        """Find what the forward that is about to run continues."""
        limit = None
        for cache in _caches(inputs):
            anchor, length = _anchor(cache), _length_of(cache, self._layer)
            limit = _limit_of(cache)
            left = self._left.get(id(anchor))
            known = left is not None and left.cache() is anchor
            if length == 0 or (length is None and not known and not _is_filled(cache)):
                continue
            if left is None or not known:
                return Start(next(self._numbers), length, limit, is_cached=True)
            before = left.length if length is None else length
            if left.length in {None, before} and not _is_frozen(cache):
                return Start(left.line, before, limit, is_cached=True)
            if not _is_frozen(cache) and generating() is not None:
                return Start(left.line, before, limit, repeats=True, is_cached=True)
            return Start(next(self._numbers), before, limit, is_cached=True)
        return Start(next(self._numbers), limit=limit)

    def end(self, start: Start, inputs: Mapping[str, Any], output: Any) -> None:
        """Record which caches a forward has returned."""
        self._left = {
            number: left for number, left in self._left.items() if left.cache() is not None
        }
        for cache in itertools.chain(_caches(inputs), _caches_in(output)):
            anchor, length = _anchor(cache), _length_of(cache, self._layer)
            if length is None and start.before is not None:
                count = positions_of(inputs)
                length = None if count is None else start.before + count
            with contextlib.suppress(TypeError):  # such as a dict
                self._left[id(anchor)] = _Left(weakref.ref(anchor), start.line, length)


def positions_of(inputs: Mapping[str, Any]) -> int | None:
    """Count the positions of a forward, on the cached side."""
    ran = ran_of(inputs)
    return None if ran is None else ran[1]


def ran_of(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """Count the sequences and positions of a forward, on the cached side."""
    for names in (("decoder_input_ids", "decoder_inputs_embeds"), ("input_ids", "inputs_embeds")):
        for name in names:
            if isinstance(inputs.get(name), Tensor) and inputs[name].dim() > 1:
                return int(inputs[name].shape[0]), int(inputs[name].shape[1])
    given = inputs.get("input")  # of TransformerLens
    if isinstance(given, Tensor) and given.dim() > 1:
        return int(given.shape[0]), int(given.shape[1])
    return None


def _caches_in(output: Any) -> Iterator[Any]:
    """List the caches in what a forward returned."""
    if isinstance(output, Mapping):
        yield from _caches(output)
    elif isinstance(output, tuple | list):
        yield from (each for each in output if _is_cache(each))


def _length_of(cache: Any, layer: int) -> int | None:
    """Count the positions in a cache; None if it does not say."""
    if callable(getattr(cache, "get_seq_length", None)):
        try:
            return int(cache.get_seq_length(layer))
        except (ValueError, TypeError, IndexError, AttributeError):
            return None
    if hasattr(cache, "entries"):  # TransformerLens'
        return int(cache[0].past_keys.shape[1])
    if isinstance(cache, tuple | list) and cache:
        first = cache[0]
        if isinstance(first, tuple | list) and first and isinstance(first[0], Tensor):
            return int(first[0].shape[-2])  # keys, `batch head pos d_head`
    return None


def generating() -> FrameType | None:
    """Find the innermost `generate()` of Hugging Face that is running, if there is one."""
    generation = sys.modules.get("transformers.generation.utils")
    if generation is None:
        return None
    code = inspect.unwrap(generation.GenerationMixin.generate).__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def is_batching() -> bool:
    """Return whether the current thread is one of Hugging Face's `generate_batch()`."""
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("transformers.generation.continuous_batching"):
            return True
        frame = frame.f_back
    return False


def _caches(named: Mapping[str, Any]) -> Iterator[Any]:
    given = (named.get(name) for name in CACHES)
    others = int | float | str | Tensor
    return (each for each in given if each is not None and not isinstance(each, others))


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") or hasattr(value, "previous_attention_mask")


def _is_frozen(cache: Any) -> bool:
    return getattr(cache, "frozen", False) is True


def _is_filled(cache: Any) -> bool:
    """Return whether a cache that does not count positions is filled."""
    if isinstance(cache, tuple | list):
        return _anchor(cache) is not None
    if isinstance(cache, Mapping):
        return bool(cache)
    filled = getattr(cache, "has_previous_state", True)
    if not callable(filled):
        return bool(filled)
    try:
        return bool(filled())
    except (TypeError, ValueError, IndexError):
        return True


def _limit_of(cache: Any) -> int | None:
    limit = getattr(cache, "get_max_length", getattr(cache, "get_max_cache_shape", None))
    try:
        found = limit() if callable(limit) else None
    except (TypeError, ValueError, IndexError, NotImplementedError):
        return None
    return found if isinstance(found, int) and found > 0 else None


def _anchor(cache: Any) -> Any:
    """Return the object that identifies a cache: itself, or a tensor in it."""
    while isinstance(cache, tuple | list):
        cache = next((each for each in cache if isinstance(each, tuple | list | Tensor)), None)
    return cache
