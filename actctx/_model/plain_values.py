"""Settings as JSON values, and functions identified by what they compute with.

Equal values are written identically in any process: without ids, addresses or paths.
"""

import functools
import hashlib
import inspect
import json
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actctx._model.digest import sketched

SKIPPED: Any = object()
"""Stands for a value that is not a setting, such as a tokenizer."""

LIBRARIES = {
    *("torch", "transformers", "transformer_lens", "accelerate", "peft", "sentence_transformers"),
    "actctx",
}
"""Libraries that add hooks and functions to models themselves."""

_LONGEST = 2000  # characters of JSON; longer values are replaced by a digest
_DEEPEST = 4
_WRITTEN: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    (Enum, lambda value: value.name),
    (str, lambda value: SKIPPED if {"/", "\\"} & {*value} else str(value)),  # a path, or a name
    (bool | int | None, lambda value: value),
    (float, lambda value: float(value) if math.isfinite(value) else str(value)),
    (np.generic, lambda value: plain(value.item(), tensors=False)),
    (torch.dtype | complex | range | slice, str),
    (type, lambda value: value.__qualname__),
)


def package_of(value: Any) -> str:
    """Name the package that a class or a function is from."""
    return str(getattr(value, "__module__", None) or "").partition(".")[0]


def plain(value: Any, *, tensors: bool) -> Any:
    """Convert a value to JSON, or return `SKIPPED`.

    Args:
        value: The value of an attribute.
        tensors: Whether tensors are settings; in libraries they are copies and caches.

    """
    found = _plain(value, tensors=tensors)
    written = "" if found is SKIPPED else json.dumps(found)
    return found if len(written) <= _LONGEST else f"{type(value).__name__} {_short(written)}"


def _plain(value: Any, *, tensors: bool) -> Any:
    write = next((write for kind, write in _WRITTEN if isinstance(value, kind)), None)
    if write is not None:
        return write(value)
    if isinstance(value, Tensor | np.ndarray):
        return _of_tensor(value) if tensors else SKIPPED
    if isinstance(value, Mapping):
        found = _of_list(value.values(), tensors=tensors)
        return found if found is SKIPPED else dict(zip(map(str, value), found, strict=True))
    if isinstance(value, list | tuple | AbstractSet):
        found = _of_list(value, tensors=tensors)
        is_sorted = found is not SKIPPED and isinstance(value, AbstractSet)
        return sorted(found, key=str) if is_sorted else found
    is_function = inspect.isroutine(value) or isinstance(value, functools.partial)
    return name_function(value) if is_function else SKIPPED


def _of_tensor(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub":
            return SKIPPED
        value = torch.tensor(value)
    return SKIPPED if value.is_meta else sketched(value)


def _of_list(values: Iterable[Any], *, tensors: bool) -> Any:
    found = [_plain(value, tensors=tensors) for value in values]
    return SKIPPED if any(each is SKIPPED for each in found) else found


def is_foreign(function: Any) -> bool:
    """Return whether a function, or what a library wrapped, is not from a library."""
    return any(map(_is_own, _wrapped(function)))


def name_function(function: Any) -> str:
    """Name a function, with a digest unless it is an unchanged library function."""
    name, digest = describe_function(function)
    is_known = inspect.isroutine(function) and not is_foreign(function)
    return name if is_known else f"{name} {digest}"


def describe_function(function: Any) -> tuple[str, str]:
    """Name a function, and digest its code and closure.

    Lists are left out, since hooks collect values in them.
    """
    inner = next(filter(_is_own, _wrapped(function)), function)
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = getattr(inner, "__qualname__", type(inner).__qualname__)
    return name, _short(str([*_told(function, 0)]))


def _wrapped(function: Any) -> Iterator[Any]:
    """Find the functions that a partial, or a closure of a library, calls."""
    if isinstance(function, functools.partial):
        yield from _wrapped(function.func)
    elif isinstance(function, types.FunctionType) and package_of(function) in LIBRARIES:
        within = [each for each in _cells(function) if callable(each) and not _is_model(each)]
        yield function
        for each in within:
            yield from _wrapped(each)
    else:
        yield function


def _is_own(function: Any) -> bool:
    """Return whether a function, or the class of an object, is not a library's."""
    kind = getattr(function, "__func__", function)
    return package_of(kind if inspect.isroutine(kind) else type(kind)) not in LIBRARIES


def _is_model(value: Any) -> bool:
    return isinstance(value, nn.Module | type)


def _cells(function: types.FunctionType) -> list[Any]:
    found = []
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # it is empty yet
            continue
    return found


def _told(value: Any, depth: int) -> Iterator[str]:
    """Yield what a function computes with."""
    if depth > _DEEPEST or isinstance(value, list | nn.Module):
        return
    parts: list[Any] = []
    if isinstance(value, functools.partial):
        parts = [value.func, *value.args, *value.keywords, *value.keywords.values()]
    elif isinstance(value, types.MethodType):
        parts = [value.__func__, value.__self__]
    elif isinstance(value, types.FunctionType):
        inner = inspect.unwrap(value)
        yield from _of_code(inner.__code__)
        parts = _used_by(inner)
    elif inspect.isroutine(value):
        yield value.__name__
    elif (found := plain(value, tensors=True)) is not SKIPPED:
        yield str(found)
    elif isinstance(value, tuple):
        parts = [*value]
    elif not isinstance(value, type):
        yield type(value).__qualname__
        parts = [type(value).__call__] if inspect.isfunction(type(value).__call__) else []
        parts += [part for item in getattr(value, "__dict__", {}).items() for part in item]
    for part in parts:
        yield from _told(part, depth + 1)


def _used_by(function: types.FunctionType) -> list[Any]:
    known = (function.__globals__.get(name) for name in function.__code__.co_names)
    numbers = [each for each in known if isinstance(each, float | int | Tensor)]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*_cells(function), *defaults, *numbers]


def _of_code(code: types.CodeType) -> Iterator[str]:
    yield str((code.co_code.hex(), code.co_names))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _of_code(constant)
        elif isinstance(constant, frozenset):
            yield str(sorted(map(repr, constant)))
        else:
            yield repr(constant)


def _short(written: str) -> str:
    return hashlib.blake2b(written.encode(), digest_size=4).hexdigest()
