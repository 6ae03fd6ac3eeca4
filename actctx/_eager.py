"""Compiled models run eagerly while a capture is open.

A hook that is put on after the first call of a compiled model may silently not fire, and one that
is put on before it is compiled in. `torch.compiler.set_stance("force_eager")` has compiled models
run as they were written, without recompiling anything afterwards. The stance is one for the whole
process, so the first capture to open sets it and the last to close gives it back.
"""

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch


class _Stance:
    """The captures that need compiled models to run eagerly, in all threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._held = 0
        self._eager: Any = None

    def hold(self) -> None:
        with self._lock:
            if self._held == 0:
                self._eager = torch.compiler.set_stance("force_eager")
                self._eager.__enter__()
            self._held += 1

    def release(self) -> None:
        with self._lock:
            self._held -= 1
            if self._held == 0:
                self._eager.__exit__(None, None, None)


_STANCE = _Stance()


def run_eagerly() -> Callable[[], None]:
    """Have compiled models run eagerly, until the returned function is called.

    Where nothing was compiled yet in this process, importing the compiler to tell it so would take
    seconds for nothing.
    """
    if "torch._dynamo" not in sys.modules:
        return _nothing
    _STANCE.hold()
    return _STANCE.release


def _nothing() -> None:
    """Stand in for giving back a stance that was not taken."""
