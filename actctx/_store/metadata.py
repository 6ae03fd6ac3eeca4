"""Read what a data set says of itself, as the classes annotate it that it becomes.

# NOTE [Trust]
The metadata is text that anybody can edit, and the columns are Arrow's, which other tools alter and
disks damage. So the metadata is read by the annotations of the classes that it becomes, the schema
is compared with it when a data set is opened, and each column that is read is compared with it
again: an address in memory is made from a size only if Arrow's own buffer is as long.
"""

import json
import reprlib
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

_DEEPEST = 16
"""The depth of nesting that no metadata of ours has."""

_EXPECTED = {
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    tuple: "a list",
    Mapping: "an object",
}


class LaterError(ValueError):
    """The metadata has something that a later version wrote."""


def read_json(text: bytes) -> dict[str, Any]:
    """Read an object of JSON, in which no name comes twice.

    Raises:
        ValueError: It is not an object, or a name comes twice.

    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("it has a duplicate name")
        return found

    try:
        found = json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is not an object, but {_shown(found)}")  # noqa: TRY004  as all are
    return found


def from_json(kind: type[T], found: Any, where: str = "") -> T:
    """Make a dataclass of an object of JSON, each of whose values is as the class annotates it.

    Args:
        kind: The class.
        found: The object.
        where: What messages call it.

    Raises:
        ValueError: A value is missing, or is something else.
        LaterError: There is a value that the class does not have.

    """
    if not isinstance(found, dict):
        raise ValueError(f"{where!r} is {_shown(found)}, not an object")  # noqa: TRY004
    before = f"{where}." if where else ""
    hints = get_type_hints(kind)
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    for name, each in known.items():
        has_default = each.default is not MISSING or each.default_factory is not MISSING
        if name not in found and not has_default:
            raise ValueError(f"{before + name!r} is missing")
    if more := [name for name in found if name not in known]:
        raise LaterError(f"field {before + more[0]!r}")
    return kind(**{name: _read(each, hints[name], before + name) for name, each in found.items()})


def _read(value: Any, hint: Any, where: str) -> Any:
    """Read a value as it is annotated; lists become tuples."""
    origin, inner = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value, where)
    if hint is Any:
        _check_text(value, where)
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_read(each, inner[0], f"{where}[{k}]") for k, each in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        _check_text([*value], where)
        return {name: _read(each, inner[1], f"{where}.{name}") for name, each in value.items()}
    if origin is types.UnionType and (value is None or len(inner) == 2):  # noqa: PLR2004  X | None
        return None if value is None else _read(value, inner[0], where)
    if type(value) is not hint:
        expected = _EXPECTED.get(origin or hint, "something else")
        raise ValueError(f"{where!r} is {_shown(value)}, not {expected}")
    _check_text(value, where)
    return value


def _check_text(value: Any, where: str, depth: int = 0) -> None:
    """Refuse halves of characters, which JSON can write and nothing can show."""
    if depth > _DEEPEST:
        raise ValueError(f"{where!r} is nested too deeply")
    if isinstance(value, list | dict):
        inner = value if isinstance(value, list) else [*value, *value.values()]
        for each in inner:
            _check_text(each, where, depth + 1)
    try:
        _ = value.encode() if isinstance(value, str) else value
    except UnicodeEncodeError:
        raise ValueError(f"{where!r} is {_shown(value)}, which is not text") from None


def _shown(value: object) -> str:
    return reprlib.repr(value)


# The columns.
