"""Compiled models run eagerly while a capture is open.

A hook that is put on after the first call of a compiled model may silently not fire, and one that
is put on before it is compiled in. `torch.compiler.set_stance("force_eager")` has compiled models
run as they were written, without recompiling anything afterwards. The stance is one for the whole
process, so the first capture to open sets it and the last to close gives it back.
"""

import sys
import threading
from typing import Any

import torch


class _Stance:
    """The captures that need compiled models to run eagerly, in all threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holders: set[int] = set()
        self._eager: Any = None

    def hold(self, holder: int) -> None:
        with self._lock:
            self._holders.add(holder)
            if self._eager is None:
                self._eager = torch.compiler.set_stance("force_eager")

    def release(self, holder: int) -> None:
        with self._lock:
            self._holders.discard(holder)
            if not self._holders and self._eager is not None:
                self._eager.__exit__(None, None, None)
                self._eager = None


_STANCE = _Stance()


def run_eagerly(holder: int) -> None:
    """Have compiled models run eagerly, until the holder calls `run_compiled`.

    Where nothing was compiled yet in this process, importing the compiler to tell it so would take
    seconds for nothing.
    """
    if "torch._dynamo" in sys.modules:
        _STANCE.hold(holder)


def run_compiled(holder: int) -> None:
    """Let compiled models run compiled again, as far as this holder is concerned."""
    _STANCE.release(holder)
