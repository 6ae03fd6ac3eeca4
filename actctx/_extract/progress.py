"""What a bar of an extraction shows, and what an interrupted one says of its rows."""

import logging
from pathlib import Path
from typing import Any

from actctx._errors import ActctxError
from actctx._text import counted, format_bytes

_LOG = logging.getLogger("actctx")


def advance(bar: Any, rows: int) -> None:
    """Move a bar on by some rows, and show their bytes."""
    bar.update(rows)
    if not bar.disable:
        bar.set_postfix_str(format_bytes(bar.n * bar.row_bytes), refresh=False)


def add_note_of_rows(error: BaseException, path: Path, rows: int) -> None:
    """Add to an error which rows are on disk; not if the extraction was refused."""
    if isinstance(error, ActctxError):
        return
    note = f"'{path}' keeps {counted(rows, 'row')}; the same call resumes after them"
    if not rows:
        note = f"no rows are in '{path}' yet; the same call starts from the beginning"
    error.add_note(note)
    if isinstance(error, SystemExit):  # whose notes are not shown
        _LOG.warning(note)
