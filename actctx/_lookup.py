"""How a name finds what was captured under it, or why it finds nothing."""

from collections.abc import Iterable, Mapping

from actctx._column import Column
from actctx._table import counted, shortened


def find_column(columns: Mapping[str, Column], name: object) -> Column | None:
    """Find what a site left by its key, or by a name that no other site has."""
    if isinstance(name, str) and name in columns:
        return columns[name]
    alike = [column for column in columns.values() if name in column.names]
    return alike[0] if len(alike) == 1 else None


def why_nothing(
    columns: Mapping[str, Column], name: str, fired: Iterable[str], forwards: int
) -> str:
    """Say why nothing is found under a name, though there were forwards."""
    if find_column(columns, name) is not None:
        return f"it never fired in {counted(forwards, 'forward')}"
    alike = [repr(key) for key, each in columns.items() if name in each.names]
    if alike:
        return f"it is captured several times, so read one of {', '.join(alike)}"
    return f"the captured names are {listed(fired)}"


def why_empty(source: str) -> str:
    """Say why there is nothing at all, of a model of this class."""
    model = source or "the model"
    return f"no forward of {model} has run since the block began or the buffer was cleared"


def listed(keys: Iterable[str]) -> str:
    """List some of the names."""
    return shortened([*map(repr, keys)])
