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
        self._modes = _STACK.modes
        self._before = torch.is_grad_enabled()
        self._modes.append(self)
        torch.set_grad_enabled(enabled)

    def restore(self) -> None:
        """Give back the mode that was found, or hand it to the block above, which will."""
        place = self._modes.index(self)
        above = self._modes[place + 1 :]
        del self._modes[place]
        if above:
            above[0]._before = self._before
        elif self._modes is _STACK.modes:  # another thread's mode is out of reach
            torch.set_grad_enabled(self._before)
