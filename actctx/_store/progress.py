"""Progress that fits where it is shown: a bar on a terminal or in a notebook, lines elsewhere."""

import contextlib
import logging
import sys
import threading
import time
from datetime import datetime
from importlib.util import find_spec
from typing import Any

from actctx._text import format_bytes

_LOG = logging.getLogger("actctx")
_MANY = 10_000
_SECONDS = 60.0
"""How often a line comes."""


def progress_bar(*, shown: bool, name: str, total: int | None, **options: Any) -> Any:
    """Make a bar of tqdm's: with widgets in a notebook that has them, otherwise of characters.

    Where there is neither a notebook nor a terminal, as in a batch job, it is a line a minute.

    Args:
        shown: Whether anything is shown.
        name: What a line begins with.
        total: How far it goes; None where that is not known.
        options: What else tqdm takes: `unit` and `initial`.

    """
    from tqdm import tqdm

    if shown and not _is_in_a_notebook() and not _is_terminal():
        return Lines(name=name, total=total, **options)
    # Of a few it would make fractions.
    options |= {"total": total, "unit_scale": total is None or total >= _MANY}
    if not shown:
        return tqdm(disable=True, **options)
    if not _is_in_a_notebook() or find_spec("ipywidgets") is None:
        return tqdm(**options)
    from tqdm.notebook import tqdm as tqdm_of_widgets

    return tqdm_of_widgets(**options)


class Lines:
    """A line a minute, also where nothing moves, in the place of a bar.

    Args:
        name: What a line begins with.
        total: How far it goes; None where that is not known.
        unit: What is counted.
        initial: How many of them there are already.

    Attributes:
        n: How many there are.
        row_bytes: The bytes of one; 0 where they are not known yet.
        disable: Whether messages beside the bar are left out, as for tqdm.

    """

    disable = True

    def __init__(self, *, name: str, total: int | None, unit: str, initial: int) -> None:
        self.n, self.row_bytes = initial, 0
        self._name, self._total, self._unit = name, total, unit
        self._first, self._before = initial, initial
        self._begun: float | None = None
        self._is_shown = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="actctx progress", daemon=True)

    def __enter__(self) -> "Lines":  # noqa: PYI034  which beartype does not take
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def update(self, rows: int) -> None:
        """Count more of them."""
        if self._begun is None:  # what came before was reading
            self._begun = time.monotonic()
        self.n += rows

    def _run(self) -> None:
        then = time.monotonic()
        while not self._ended.wait(_SECONDS):
            now = time.monotonic()
            say(self._line(now, now - then))
            then, self._before = now, self.n

    def _line(self, now: float, seconds: float) -> str:
        from tqdm import tqdm

        rows = self.n
        many = f"{rows:,}" if self._total is None else f"{rows:,} of {self._total:,}"
        parts = [f"{many}{self._unit}", f"{(rows - self._before) / seconds:,.1f} a second"]
        if self.row_bytes:
            parts.append(format_bytes(rows * self.row_bytes))
        if self._total is not None and self._begun is not None and rows > self._first:
            left = (self._total - rows) * (now - self._begun) / (rows - self._first)
            parts.append(f"{tqdm.format_interval(max(left, 0))} left")
        return f"{self._name}: {', '.join(parts)}"


def say(text: str) -> None:
    """Log a text at INFO where somebody listens to that, and write it to stderr elsewhere."""
    if _LOG.isEnabledFor(logging.INFO) and _LOG.hasHandlers():
        _LOG.info(text)
    elif sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # its reader may have gone
            sys.stderr.write(f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S} {text}\n")
            sys.stderr.flush()


def _is_in_a_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def _is_terminal() -> bool:
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()
