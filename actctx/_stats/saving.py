"""A statistic in a safetensors file: its tensors, and all else that it holds as metadata."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from actctx._errors import DataError, OptionError
from actctx._files import describe, read_safetensors, unreadable, write_safetensors
from actctx._text import is_utf8

_KEY = "statistic"
_TAKEN = {"axes", "model", "actctx", "torch", _KEY}
_INSTEAD = "give a file that the save of a statistic wrote"


def write_statistic(
    state: Mapping[str, Any], path: str | PathLike[str], metadata: Mapping[str, str]
) -> None:
    """Write the state of a statistic to a file; see `Moments.save`."""
    for key, value in metadata.items():
        if key in _TAKEN or not all(
            isinstance(each, str) and is_utf8(each) for each in (key, value)
        ):
            raise OptionError(
                f"metadata has {value!r} under {key!r}; give text under text, and none of the "
                f"names {', '.join(sorted(_TAKEN))}, which the file has itself"
            )
    tensors = {name: each for name, each in state.items() if isinstance(each, Tensor)}
    rest = {name: each for name, each in state.items() if name not in tensors}
    whole = {name: each.detach().contiguous() for name, each in tensors.items()}
    write_safetensors(whole, path, {**metadata, **describe({}, ""), _KEY: json.dumps(rest)})


def read_state(path: str | PathLike[str]) -> tuple[Path, dict[str, Any]]:
    """Read the state of a statistic from a file, whose tensors are mapped into memory.

    Raises:
        DataError: There is no such file, or it does not hold one.

    """
    place, tensors, metadata = read_safetensors(path, _INSTEAD)
    try:
        rest = json.loads(metadata[_KEY])
        state = {**rest, **tensors}
    except (KeyError, ValueError, TypeError, RecursionError):
        raise unreadable(place, "it does not hold a statistic", _INSTEAD) from None
    return place, state


def damaged(place: Path) -> DataError:
    """Make the error of a file whose state makes no sense."""
    return unreadable(place, "what it says of the statistic is damaged", _INSTEAD)
