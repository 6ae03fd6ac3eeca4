"""Find the captured tensor in what a site yields."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from actctx._errors import OutputError


class Inputs(NamedTuple):
    """What a module is given."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def tensor_of(site: str, value: Any, output: int | str | None) -> Tensor:
    """Return the tensor in what a site yields.

    Args:
        site: The name of the site, as it is shown.
        value: What it yields: a tensor, or a tuple, a mapping, a dataclass or `Inputs` of them.
        output: The position or the name of the tensor in it, by default the first.

    Raises:
        OutputError: It yields no tensor at `output`.

    """
    if output is None and isinstance(value, Tensor):
        return value
    named = _by_name(value, by_position=not isinstance(output, str))
    try:
        found = named[output] if isinstance(output, str) else list(named.values())[output or 0]
    except (LookupError, TypeError):
        found = None
    if isinstance(found, Tensor):
        return found
    where = "" if output is None else f" at output={output!r}"
    raise OutputError(
        f"{site} yields no tensor{where} but {_described(value)}; choose one with "
        "Site(output=...), a position or a name, or capture from one of the modules inside it"
    )


def _by_name(value: Any, *, by_position: bool) -> Mapping[Any, Any]:
    """List the values in a structure, by name or position."""
    if isinstance(value, Inputs):
        return listed_inputs(value, by_position=by_position)
    if isinstance(value, Mapping):
        return value
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, tuple | list):
        names = getattr(value, "_fields", None) if not by_position else None
        return dict(zip(names or range(len(value)), value, strict=True))
    return {0: value}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """List the tensors in a structure, also in structures inside of it."""
    if isinstance(value, Tensor):
        yield value
        return
    if isinstance(value, Mapping | tuple | list) or is_dataclass(value):
        for inner in _by_name(value, by_position=True).values():
            yield from tensors_in(inner)


def listed_inputs(inputs: Inputs, *, by_position: bool) -> Mapping[Any, Any]:
    """List a module's inputs: as it was called, or by the names of its parameters."""
    module, args, kwargs = inputs
    if not by_position:
        try:
            return inspect.signature(module.forward).bind(*args, **kwargs).arguments
        except (TypeError, ValueError):  # its signature does not match, or cannot be read
            return kwargs
    return {**dict(enumerate(args)), **kwargs}


def _described(value: Any) -> str:
    """Describe a structure by the types of its values."""
    name = type(value).__name__
    if isinstance(value, Mapping | Inputs) or is_dataclass(value):
        by_position = isinstance(value, Inputs)
        inside = [
            f"{key}: {type(inner).__name__}"
            for key, inner in _by_name(value, by_position=by_position).items()
        ]
        return f"{name}({', '.join(inside)})"
    if isinstance(value, tuple | list):
        return f"{name}({', '.join(type(inner).__name__ for inner in value)})"
    return name
