"""Change a model for a capture and change it back, even if an interrupt comes at any time.

The undo of a step is registered before the step is done. It is safe to undo a step that was never
done, was half done, or is already undone.
"""

import threading
from collections.abc import Callable, Iterable

Action = Callable[[], object]

# Captures of several threads open and close on one model. Reentrant, since a garbage-collected
# capture may close while another opens.
_LOCK = threading.RLock()


def do(steps: Iterable[tuple[Action, Action]], undo: list[Action]) -> None:
    """Do steps, each given as (undo, do), and put their undos on a list."""
    with _LOCK:
        for undoing, doing in steps:
            undo.append(undoing)
            doing()


def take_back(undo: list[Action]) -> None:
    """Undo everything on the list, the last first.

    The rest is undone even after an error or an interrupt. The first error is raised at the end.
    """
    try:
        _take_back(undo)
    finally:
        _take_back(undo)


def _take_back(undo: list[Action]) -> None:
    failed: list[Exception] = []
    with _LOCK:
        while undo:
            failed += _errors_of(undo[-1])
            undo.pop()
    if failed:
        raise failed[0]


def _errors_of(undoing: Action) -> list[Exception]:
    try:
        undoing()
    except Exception as error:  # noqa: BLE001  it is raised once all is undone
        return [error]
    return []
