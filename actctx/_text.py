"""Words and numbers for messages."""


def format_bytes(nbytes: int) -> str:
    """Write a number of bytes in the unit that fits, as in `6.0 MiB`."""
    if nbytes < 2**10:
        return f"{nbytes} B"
    power = min((nbytes.bit_length() - 1) // 10, 4)
    return f"{nbytes / 2 ** (10 * power):.1f} {' KMGT'[power]}iB"


def dtype_name(dtype: object) -> str:
    """Write a torch dtype without its module, as in `float32`."""
    return str(dtype).removeprefix("torch.")


def counted(count: int, word: str) -> str:
    """Write a number of things, as in `2 forwards`."""
    return f"{count} {word}{'s' * (count != 1)}"


def printable(text: object) -> str:
    r"""Escape a text from a file for a terminal, as in `\x1b[31m`.

    Invisible characters that move, colour or reorder text are written as Python escapes.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in shown)


def shortened(names: list[str], most: int = 8) -> str:
    """List names for a message, only the first few if there are many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def is_utf8(text: str) -> bool:
    """Return whether a text can be written to a file, which lone surrogates cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
