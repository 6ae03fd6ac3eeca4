"""End an extraction cleanly at signals that end the process: what is complete is committed."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

_ENDING = [
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
]  # Windows has no SIGHUP


@contextlib.contextmanager
def signals_raised() -> Iterator[None]:
    """Raise `SystemExit` in the block in place of ending the process at once.

    It has the status that a shell gives a process that the signal ended, such as 143. Only the
    main thread can do so. Signals that somebody else handles, or ignores, are left alone.
    """
    owner, had = os.getpid(), list[int]()

    def end(number: int, _frame: Any) -> None:
        if os.getpid() != owner:  # a forked worker, which has nothing to commit
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not had:  # once it ends, it is not interrupted again
            had.append(number)
            raise SystemExit(128 + number)

    is_main = threading.current_thread() is threading.main_thread()
    free = [each for each in _ENDING if is_main and signal.getsignal(each) is signal.SIG_DFL]
    try:
        for each in free:
            signal.signal(each, end)
        yield
    finally:
        for each in free:
            if signal.getsignal(each) is end:
                signal.signal(each, signal.SIG_DFL)
