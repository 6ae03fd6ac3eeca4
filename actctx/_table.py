"""The short table that shows what was captured."""

from dataclasses import astuple, dataclass, fields
from html import escape


@dataclass(frozen=True)
class Row:
    """One captured site, as a person reads it. Its values are drawn in HTML only."""

    site: str
    axes: str
    shape: str
    dtype: str
    device: str
    nbytes: int
    values: str = ""


_HEADER = tuple(column.name.replace("nbytes", "bytes") for column in fields(Row))


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


def shortened(names: list[str], most: int = 8) -> str:
    """List names for a message, the first few of them where there are many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def printable(text: object) -> str:
    r"""Write a text that a file brought so that a terminal shows it, as in `\x1b[31m`.

    Characters that are not seen, but move, colour or reorder what is, are written as in Python.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in shown)


def _cells(row: Row) -> tuple[str, ...]:
    *texts, nbytes, values = astuple(row)
    return (*map(printable, texts), format_bytes(nbytes), values)


def _lines(rows: list[Row], most: int = 24) -> list[tuple[str, ...]]:
    """Write the rows, the first and the last of them where there are many."""
    cells = [_cells(row) for row in rows]
    if len(cells) > most:
        left_out = (f"... {len(cells) - most} more ...", *("" for _ in _HEADER[1:]))
        cells[most // 2 : len(cells) - most // 2] = [left_out]
    return cells


def as_text(title: str, rows: list[Row]) -> str:
    """Draw the table in plain text."""
    lines = [line[:-1] for line in (_HEADER, *_lines(rows))] if rows else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    drawn = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
    return "\n".join([title, *(f"  {line}" for line in drawn)])


def as_html(title: str, rows: list[Row]) -> str:
    """Draw the table in HTML, without colours of its own, so that every theme can show it."""
    style = 'style="text-align:left;padding:0.2em 0.6em;white-space:nowrap"'
    shown = len(_HEADER) if any(row.values for row in rows) else -1
    head = "".join(f"<th {style}>{escape(cell)}</th>" for cell in _HEADER[:shown])
    body = "".join(
        "<tr>" + "".join(f"<td {style}>{escape(cell)}</td>" for cell in line[:shown]) + "</tr>"
        for line in _lines(rows)
    )
    return (
        f'<div style="font-size:0.85em;overflow-x:auto"><div>{escape(title)}</div>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
