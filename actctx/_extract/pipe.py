"""A bounded queue between two threads that also passes on errors.

# NOTE [Waiting in steps]
Python runs the handlers of signals in the main thread, between two instructions. One that arrives
just before the thread blocks on a lock is handled only when the lock is released, which may be
never. So a wait is cut into steps.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

STEP_SECONDS = 1.0
"""How long a signal waits for its handler at most. See the note above."""


class Pipe(Generic[T]):
    """What one thread puts in, another takes out, in the same order.

    Args:
        most: The number of items that wait at most. Then the first thread waits.

    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._is_closed = self._is_abandoned = False
        self._error: BaseException | None = None

    def put(self, item: T) -> bool:
        """Put an item in, once there is room for it.

        Returns:
            Whether it will be taken out.

        """
        with self._changed:
            self._wait_for(lambda: len(self._items) < self._most or self._is_abandoned)
            if not self._is_abandoned:
                self._items.append(item)
                self._changed.notify_all()
            return not self._is_abandoned

    def close(self, error: BaseException | None = None) -> None:
        """Announce that nothing more will come, and the error that ended it."""
        with self._changed:
            self._is_closed, self._error = True, error
            self._changed.notify_all()

    def abandon(self) -> None:
        """Announce that nothing more will be taken out."""
        with self._changed:
            self._is_abandoned = True
            self._items.clear()
            self._changed.notify_all()

    def take(self, timeout: float | None = None) -> T | None:
        """Take out the next item, once there is one.

        Args:
            timeout: How many seconds to wait, at most; by default as long as it takes.

        Returns:
            None where none came in time, or none will.

        """
        with self._changed:
            self._wait_for(
                lambda: bool(self._items) or self._is_closed or self._is_abandoned, timeout
            )
            if self._items:
                self._changed.notify_all()
                return self._items.popleft()
        if self._error is not None:
            raise self._error
        return None

    def _wait_for(self, is_met: Callable[[], bool], timeout: float | None = None) -> None:
        end = None if timeout is None else time.monotonic() + timeout
        while not is_met():
            left = STEP_SECONDS if end is None else end - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(min(left, STEP_SECONDS))

    def __iter__(self) -> Iterator[T]:
        """Take out items until the pipe is closed; then raise its error, if there was one."""
        while (item := self.take()) is not None:
            yield item
            del item  # so that only the consumer keeps its memory
