"""Where in an input the rows of a data set end, so that resuming need not run that part again.

# NOTE [Marks]
A mark says that the input before a place leaves so many rows. It is written after the commit of
these rows, as a line of a file, and nothing depends on it: where a line is missing, or damaged, the
input is read from an earlier mark, or from its start. A mark is used only if rows on disk follow
it, which the input has to leave again. Marks beyond the rows on disk may be those of another input,
and are deleted before more rows are written.
"""

import base64
import contextlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

NAME = "resume.jsonl"
"""The file, in the directory of the data set."""

_EVERY = 2**20
"""The tokens, or characters, that lie between two marks that are kept, at most."""


@dataclass(frozen=True)
class Mark:
    """A place in an input, before one of its items.

    Attributes:
        kind: What the items are: `"batches"`, `"sequences"`, or `"packed"` ones.
        rows: The rows that the items before it leave.
        items: Their number.
        sequences: The number of the next sequence.
        skip: The tokens of the next items that are in sequences before it, where they are packed.
        last: The token before it, where they are packed.
        size: The tokens and characters before it.
        digest: A digest of all items before it; None where there is none.
        given: The names of what comes with the tokens of each sequence; None where not known.
        dataset: The fingerprint of the Hugging Face dataset that they came from, if any.
        tokenizer: What tells the tokenizer of texts apart; empty where there were none, None where
            it is not known.
        state: The input's own `state_dict`, in a form that JSON has; None where it has none.

    """

    kind: str = ""
    rows: int = 0
    items: int = 0
    sequences: int = 0
    skip: int = 0
    last: int | None = None
    size: int = 0
    digest: str | None = None
    given: tuple[str, ...] | None = None
    dataset: str | None = None
    tokenizer: str | None = ""
    state: Any = None


START = Mark()
"""The start of any input."""


class Marks:
    """The marks of a data set.

    Args:
        directory: Where the data set is.
        rows: The number of its rows.

    Attributes:
        there: Those that rows on disk follow, in the order of the input.

    """

    def __init__(self, directory: Path, rows: int) -> None:
        self._path = directory / NAME
        found = _read(self._path)
        self.there = [mark for mark in found if mark.rows < rows]
        self._is_stale = len(self.there) < len(found)
        self._waiting = list[Mark]()

    def begin(self) -> None:
        """Delete the marks that are beyond the rows on disk."""
        if self._is_stale:
            with contextlib.suppress(OSError):
                self._path.write_text("".join(map(_line, self.there)))
            self._is_stale = False

    def reach(self, mark: Mark | None) -> None:
        """Take the mark before a batch whose rows are about to be written."""
        if mark is None:
            return
        before = [*self.there[-1:], *self._waiting][:-1] if self._waiting else []
        if self._waiting:
            if mark.size - (before[-1].size if before else 0) < _EVERY:
                self._waiting.pop()
            else:
                self._waiting[-1] = replace(self._waiting[-1], state=None)
        self._waiting.append(mark)

    def save(self) -> None:
        """Write those of rows that were committed."""
        if not self._waiting:
            return
        with contextlib.suppress(OSError), self._path.open("a") as file:
            file.write("".join(map(_line, self._waiting)))
        self.there += self._waiting
        self._waiting = []


def _line(mark: Mark) -> str:
    found = {name: value for name, value in asdict(mark).items() if value != getattr(START, name)}
    return f"\n{json.dumps(found)}"  # after a line that is half written, too


def _read(path: Path) -> list[Mark]:
    found = list[Mark]()
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return found
    for line in filter(None, lines):
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            told = json.loads(line)
            mark = Mark(**{**told, "given": _names(told.get("given"))})
            numbers = (mark.rows, mark.items, mark.sequences, mark.skip, mark.size)
            is_whole = all(type(number) is int and number >= 0 for number in numbers)
            before = found[-1] if found else START
            if is_whole and mark.items >= before.items and mark.rows >= before.rows:
                found.append(mark)
    return found


def _names(given: Any) -> tuple[str, ...] | None:
    return None if given is None else tuple(map(str, given))


# What an input says of where it is, which is never unpickled.


def encoded(value: Any) -> Any:  # noqa: PLR0911  one for each kind
    """Write the state of an input in a form that JSON has.

    Raises:
        TypeError: It holds something that has none.

    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {"dict": [[encoded(key), encoded(each)] for key, each in value.items()]}
    if type(value) in (list, tuple):
        return {type(value).__name__: [encoded(each) for each in value]}
    if type(value) is bytes:
        return {"bytes": _text(value)}
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous()
        bits = flat.reshape(-1).view(torch.uint8).numpy().tobytes()
        return {"tensor": [str(value.dtype), list(value.shape), _text(bits)]}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return {"array": [value.dtype.str, list(value.shape), _text(value.tobytes())]}
    raise TypeError(f"a state holds a {type(value).__name__}")


def decoded(value: Any) -> Any:
    """Read the state of an input.

    Raises:
        ValueError: It was not written by `encoded`.

    """
    if not isinstance(value, dict):
        return value
    (kind, held), *more = value.items()
    if kind == "dict" and not more:
        return {decoded(key): decoded(each) for key, each in held}
    if kind in ("list", "tuple"):
        found = [decoded(each) for each in held]
        return tuple(found) if kind == "tuple" else found
    if kind == "bytes":
        return base64.b64decode(held)
    dtype, shape, bits = held
    if kind == "tensor":
        flat = torch.frombuffer(bytearray(base64.b64decode(bits)), dtype=torch.uint8)
        return flat.view(getattr(torch, dtype.removeprefix("torch."))).reshape(shape)
    if kind == "array":
        return np.frombuffer(base64.b64decode(bits), np.dtype(dtype)).reshape(shape).copy()
    raise ValueError(f"a state holds a {kind}")


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()
