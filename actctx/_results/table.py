"""The table of captured sites, with the memory of caching everything."""

from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from html import escape

from actctx._text import format_bytes, printable


@dataclass(frozen=True)
class Row:
    """A line of the table: one captured site. The histogram is only in HTML."""

    site: str
    axes: str
    shape: str
    dtype: str
    device: str
    nbytes: int
    values: str = ""


_HEADER = tuple(column.name.replace("nbytes", "bytes") for column in fields(Row))


def _cells(row: Row) -> tuple[str, ...]:
    *texts, nbytes, values = astuple(row)
    return (*map(printable, texts), format_bytes(nbytes), values)


def _lines(rows: list[Row], most: int = 24) -> list[tuple[str, ...]]:
    """Write the rows, only the first and the last if there are many."""
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
    """Draw the table in HTML, without its own colours, so that it fits every theme."""
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


Estimate = Callable[[int, int], int | None]
"""Estimates the bytes that `run_with_cache` would hold after a forward, from its sequences and
positions; None where that is not known."""


def unknown(_batch: int, _pos: int) -> None:
    """Estimate nothing, for a buffer without a model."""


def spared(estimate: Estimate, tokens: Counter[tuple[int, int]], nbytes: int) -> str:
    """Describe the memory of caching everything, to follow the captured bytes."""
    held = [estimate(*forward) for forward in tokens.elements()]
    known = [each for each in held if each]
    # More may be captured than would be cached, since each site has its own copy.
    if not known or len(known) < len(held) or sum(known) < nbytes:
        return ""
    return f" of about {format_bytes(sum(known))} that run_with_cache would hold"
