"""What a capture does to a model, done and undone safely: an interrupt can come at any time.

A step is registered with what undoes it before it is done, and undoing a step that was never done,
or done by half, or undone already, does no harm.
"""

import threading
from collections.abc import Callable, Iterable

Action = Callable[[], object]

# Captures of several threads open and close on one model; reentrant, since one that is collected as
# garbage closes while another opens.
_LOCK = threading.RLock()


def do(steps: Iterable[tuple[Action, Action]], undo: list[Action]) -> None:
    """Do steps, each given as what undoes it and what does it; put what undoes them on a list."""
    with _LOCK:
        for undoing, doing in steps:
            undo.append(undoing)
            doing()


def take_back(undo: list[Action]) -> None:
    """Undo what was done, the last first, until nothing is left on the list.

    What fails does not keep the rest from being undone, and after an interrupt it goes on; the
    error comes out in the end.
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
