"""A tool of tests: an interrupt at a line of choice."""

import linecache
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path

import actctx

PACKAGE = str(Path(actctx.__file__).parent)


class Interrupts:
    """Raises a `KeyboardInterrupt` at the line of actctx that runs as number `at`."""

    def __init__(self, at):
        self.at = at
        self.seen = 0
        self.where = ("", 0, False)
        self._called = None
        self._entered = set()

    def __call__(self, frame, event, _arg):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "call":
            if _is_collected(frame):
                return None
            self._called = frame
            self._entered = {place for place in self._entered if place[0] != id(frame)}
        if event == "line" and not self._leaves_a_block(frame):
            self.seen += 1
            is_first, self._called = self._called is frame, None
            if self.seen == self.at:
                self.where = (frame.f_code.co_qualname, frame.f_lineno, is_first)
                raise KeyboardInterrupt
        return self

    def _leaves_a_block(self, frame):
        # Between a block and its `__exit__`, or its `finally`, Python does not look for signals,
        # but it does tell the line.
        before, line = (
            linecache.getline(frame.f_code.co_filename, frame.f_lineno - back).strip()
            for back in (1, 0)
        )
        if not line.startswith("with "):
            return before.startswith("finally:")
        place = (id(frame), frame.f_lineno)
        self._entered ^= {place}
        return place not in self._entered


def _is_collected(frame):
    """Tell whether a frame runs for the collector, which says that it ignores exceptions."""
    while frame is not None:
        if frame.f_code is weakref.finalize.__call__.__code__:
            return True
        frame = frame.f_back
    return False


@contextmanager
def interrupted(at):
    """Raise a `KeyboardInterrupt` in the block, at the line of actctx that runs as number `at`."""
    interrupts = Interrupts(at)
    sys.settrace(interrupts)
    try:
        yield interrupts
    finally:
        sys.settrace(None)
