"""The grad mode of a block, given back in whatever order blocks close."""

import threading

import torch


class _Stack(threading.local):
    """The blocks that are open in a thread; torch's grad mode belongs to a thread, too."""

    def __init__(self) -> None:
        self.modes: list[GradMode] = []


_STACK = _Stack()


class GradMode:
    """Sets the grad mode of this thread until it is restored.

    `torch.no_grad()` would leave the wrong mode behind where blocks close in another order than
    the reverse of their opening: the first to close gives back what it found, and the last what
    the first had set. Here a block that closes below another hands down what it found.
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
        """Give back the mode that was found, or hand it to the block above, which will.

        Another thread's mode is out of reach: that thread gets it back with the next block that
        opens or closes in it.
        """
        self._restored = True
        if self._modes is _STACK.modes:
            _settle(self._modes)


def _settle(modes: list[GradMode]) -> None:
    """Give back the modes of the blocks that have closed; those of this thread."""
    for mode in [mode for mode in modes if mode._restored]:
        above = modes[modes.index(mode) + 1 :]
        if above:
            above[0]._before = mode._before
        else:
            torch.set_grad_enabled(mode._before)
        modes.remove(mode)  # last, so that after an interrupt it is all done again
