"""Read the options of statistics that are numbers."""

from actctx._errors import OptionError


def read_count(kind: str, name: str, value: int, *, least: int = 1) -> int:
    """Read a number of things.

    Raises:
        OptionError: It is not a whole number, or too small.

    """
    if type(value) is not int or value < least:
        raise OptionError(f"{kind} takes {name}= a whole number from {least} up, not {value!r}")
    return value
