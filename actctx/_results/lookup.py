"""How a name finds what was captured under it, or why it finds nothing."""

from collections.abc import Iterable, Mapping

from actctx._results.column import Column
from actctx._errors import HookNameError, NotCapturedError
from actctx._model.globs import meant
from actctx._results.layers import layers_of
from actctx._results.table import counted, shortened


def find_column(columns: Mapping[str, Column], name: object) -> Column | None:
    """Find what a site left that a name means, if it means one.

    Raises:
        HookNameError: It is a pattern that means nothing.

    """
    if not isinstance(name, str):
        return None
    if name in columns:
        return columns[name]
    found = _meant(columns, name)
    return columns[next(iter(found))] if len(found) == 1 else None


def why_nothing(
    columns: Mapping[str, Column], name: str, fired: Iterable[str], forwards: int
) -> str:
    """Say why nothing is found under a name, though there were forwards."""
    if find_column(columns, name) is not None:
        return f"it never fired in {counted(forwards, 'forward')}"
    found = _meant(columns, name)
    if not found:
        names = [*fired]
        return f"the captured names are {listed(names)}" if names else "nothing else was, either"
    # By the names that were meant, where these tell them apart.
    alike = listed(found.values() if len({*found.values()}) == len(found) else found)
    if any(name in columns[key].names for key in found):
        return f"it is captured several times, so read one of {alike}"
    stacked = f", or acts.stack({name!r}) for its layers" if are_layers(columns, name) else ""
    return f"it means {len(found)} of the captured sites, so read one of {alike}{stacked}"


def are_layers(columns: Mapping[str, Column], name: str) -> bool:
    """Tell whether what a name means can be stacked over layers."""
    fired = {key: column for key, column in columns.items() if column.firings}
    if any(column.join is None for column in fired.values()):
        return False
    try:
        return bool(layers_of({key: column.names for key, column in fired.items()}, name))
    except (HookNameError, NotCapturedError):
        return False


def why_empty(source: str, silent: int = 0) -> str:
    """Say why there is nothing at all, of a model of this class.

    Args:
        source: The class of the model.
        silent: The forwards that have run and left nothing.

    """
    model = source or "the model"
    if silent:
        return f"none of the sites fired in {counted(silent, 'forward')} of {model}"
    return f"no forward of {model} has run since the block began or the buffer was cleared"


def listed(keys: Iterable[str]) -> str:
    """List some of the names."""
    return shortened([*map(repr, keys)])


def _meant(columns: Mapping[str, Column], name: str) -> dict[str, str]:
    """Find what a name means, of what has fired if some has; see `meant`."""
    found = meant(name, {key: column.names for key, column in columns.items()})
    return {key: each for key, each in found.items() if columns[key].firings} or found
