"""Report how much an extraction will write, and refuse what does not fit on the disk."""

import logging
import shutil
import sys
from pathlib import Path
from typing import Any

from actctx._errors import DataError
from actctx._extract.plan import COUNTED_BYTES
from actctx._text import format_bytes

_LOG = logging.getLogger("actctx")


class Room:
    """The room for rows that are still to be written.

    Args:
        path: Where they are written.
        row_count: The rows that are on disk.
        expected: The rows that there will be; None if that is not known.
        is_copied: Whether they are then copied to another data set, and deleted.

    """

    def __init__(
        self, path: Path, *, row_count: int, expected: int | None, is_copied: bool
    ) -> None:
        self._path = path
        self._row_count = row_count
        self._expected = expected
        self._is_copied = is_copied
        self._is_checked = False

    def check(self, row_bytes: int, bar: Any) -> None:
        """Report once how much will be written.

        Raises:
            DataError: It does not fit.

        """
        if self._expected is None or self._expected <= self._row_count or self._is_checked:
            return
        self._is_checked = True
        free = shutil.disk_usage(self._path).free
        row_count = self._expected - self._row_count
        needed = row_count * row_bytes
        plan = f"{row_count} rows of {row_bytes} bytes are {format_bytes(needed)}"
        if self._is_copied:
            copied = self._expected * (row_bytes - COUNTED_BYTES)
            needed += copied
            plan += f", with {format_bytes(copied)} more while they are added"
        if needed > free:
            raise DataError(
                f"'{self._path}' has too little space: {plan}, but {format_bytes(free)} are free; "
                "give a smaller dtype, fewer sites or tokens, or another disk"
            )
        plan += f", {format_bytes(free)} are free"
        _LOG.info(plan)
        if not bar.disable:
            bar.write(plan, file=sys.stderr)
