"""Slices as they are typed on a line, such as `pos=-1` or `head=0,3`."""

from collections.abc import Sequence

from actctx._errors import OptionError
from actctx._select.slices import Index


def parse_words(asked: Sequence[str]) -> dict[str, Index]:
    """Read `--slice` options, one for an axis.

    Raises:
        OptionError: One of them is none, or an axis is given twice.

    """
    found: dict[str, Index] = {}
    for option in asked:
        axis, _, index = option.partition("=")
        if axis in found:
            raise OptionError(f"--slice selects twice along {axis!r}; give one index for it")
        try:
            found[axis] = _parse_index(index)
        except (TypeError, ValueError):
            raise OptionError(
                f"--slice {option!r} is not AXIS=INDEX, with an int, a range a:b or a:b:c, or "
                "positions a,b,c; give one such as pos=-1, pos=0:10 or head=0,3"
            ) from None
    return found


def _parse_index(index: str) -> Index:
    if ":" in index:
        return slice(*(int(bound) if bound else None for bound in index.split(":")))
    return [int(position) for position in index.split(",")] if "," in index else int(index)
