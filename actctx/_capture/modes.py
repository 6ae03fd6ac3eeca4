"""What an open capture sets besides its hooks: the grad mode, and eager runs of compiled models.

Both are restored in whatever order blocks close.

# NOTE [Compiled models run eagerly]
A hook that is added after the first call of a compiled model may silently not fire, and one that is
added before is compiled in. `torch.compiler.set_stance("force_eager")` makes compiled models run
eagerly, without recompiling anything afterwards. There is one stance for the whole process, so the
first capture to open sets it and the last to close restores it.
"""

import sys
import threading
from typing import Any

import torch


class _Stack(threading.local):
    """The open blocks of a thread; torch's grad mode belongs to a thread too."""

    def __init__(self) -> None:
        self.modes: list[GradMode] = []


_STACK = _Stack()


class GradMode:
    """Sets the grad mode of this thread until it is restored.

    `torch.no_grad()` would leave the wrong mode behind if blocks do not close in reverse order: the
    first to close restores the mode that it found, and the last the mode that the first had set.
    Here, a block that closes below another one passes on the mode that it found.
    """

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._before = enabled
        self._restored = False
        self._modes: list[GradMode] = []

    def set(self) -> None:
        """Set the mode."""
        self._modes = _STACK.modes
        _settle(self._modes)
        self._before = torch.is_grad_enabled()
        self._modes.append(self)
        torch.set_grad_enabled(self._enabled)

    def restore(self) -> None:
        """Restore the mode that was found, or pass it to the block above, which will.

        Another thread's mode cannot be set: it is restored with the next block that opens or closes
        in that thread.
        """
        self._restored = True
        if self._modes is _STACK.modes:
            _settle(self._modes)


def _settle(modes: list[GradMode]) -> None:
    """Restore the modes of the closed blocks of this thread."""
    for mode in [mode for mode in modes if mode._restored]:
        above = modes[modes.index(mode) + 1 :]
        if above:
            above[0]._before = mode._before
        else:
            torch.set_grad_enabled(mode._before)
        modes.remove(mode)  # last, so that everything is repeated after an interrupt


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
    """Make compiled models run eagerly, until the holder calls `run_compiled`.

    If nothing was compiled yet in this process, the compiler is not imported, which would take
    seconds.
    """
    if "torch._dynamo" in sys.modules:
        _STANCE.hold(holder)


def run_compiled(holder: int) -> None:
    """Let compiled models run compiled again, unless another holder needs them eager."""
    _STANCE.release(holder)
