"""Read an input item by item, count and digest the items, and find the place where it was left.

# NOTE [What was read before]
Resuming does not run again what left the rows on disk. An input that tells its place, by a
`state_dict` as Hugging Face's streams and torchdata's loaders have it, is put there; a Hugging Face
dataset with the fingerprint that it had is entered by its index. All others are read, but not
tokenized, batched or compared row by row: a digest of each item and all before it tells whether
they are the same up to a mark. Where they are not, what came since the mark before is put back, and
compared with the rows on disk. The same is done with what comes after the last mark and has rows on
disk. An input that was put at a wrong place is read from its start.
"""

import contextlib
import hashlib
import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from actctx._extract.items import Item
from actctx._store.marks import START, Mark, decoded, encoded

_SEED = f"actctx {version('actctx')}".encode()


class Source:
    """The items of an input.

    Args:
        items: Those from a mark on.
        head: What was read of them already.
        read: Reads one, given its number, or that of its first sequence.
        kind: What they are; see `Mark`.
        at: The mark.
        of: What they come from.
        tokenizer: Returns what tells the tokenizer apart from others; None where that is not known.

    Attributes:
        kind: As above.
        sequences: The number of the next sequence.
        given: See `Mark`.
        is_trusted: Whether the input was put at the mark without being read.

    """

    def __init__(
        self,
        items: Iterator[Any],
        head: Iterable[Any],
        read: Callable[[Any, int], Item],
        *,
        kind: str,
        at: Mark = START,
        of: Any = None,
        tokenizer: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._items, self._head = items, deque(head)
        self._read = read
        self._of = of
        self._tokenizer = tokenizer
        self._again = deque[Item]()
        self.kind = kind
        self.is_trusted = at is not START
        self._place(at)

    def _place(self, at: Mark) -> None:
        self._count, self._size, self._texts = at.items, at.size, at.tokenizer
        self.sequences = at.items if self.kind == "packed" else at.sequences
        self.given = at.given
        seed = hashlib.blake2b(_SEED + self.kind.encode(), digest_size=16).digest()
        told = None if at.digest is None else bytes.fromhex(at.digest)
        self._digest = told if at.items else seed

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        item = self._again.popleft() if self._again else self._next()
        if item.is_text:
            self._texts = self._tokenizer()
        is_known = not item.is_text or self._texts is not None
        self._digest = _digest(item, self._digest, self._texts) if is_known else None
        self._count += 1
        self._size += item.tokens.numel() if item.text is None else len(item.text)
        self.sequences += len(item.tokens) if self.kind == "batches" else 1
        return item

    def _next(self) -> Item:
        item = self._head.popleft() if self._head else next(self._items)
        return self._read(item, self.sequences)

    def mark(self) -> Mark:
        """Mark the place before the next item."""
        return Mark(
            kind=self.kind,
            items=self._count,
            sequences=self.sequences,
            size=self._size,
            digest=self._told(),
            given=self.given,
            dataset=fingerprint_of(self._of),
            tokenizer=self._texts,
            state=self._state(),
        )

    def _told(self) -> str | None:
        return None if self._digest is None else self._digest.hex()

    def _state(self) -> Any:
        is_ahead = self._again or self._head
        if is_ahead or not self._count or not is_stateful(self._of):
            return None
        with contextlib.suppress(Exception):  # without it, the input is read
            return encoded(self._of.state_dict())
        return None

    def skip(self, marks: Sequence[Mark]) -> Mark:
        """Skip what was read before, as long as it is unchanged.

        Returns:
            The mark that was reached; what was read after it comes again.

        """
        reached, read = START, deque[Item]()
        for mark in marks:
            while self._count < mark.items and (item := next(self, None)) is not None:
                read.append(item)
            if mark.kind != self.kind or mark.digest is None or self._told() != mark.digest:
                break
            reached = mark
            read.clear()
        self._again.extend(read)
        self._place(reached)
        return reached


def is_stateful(data: Any) -> bool:
    """Return whether an input can save and restore its place."""
    return all(callable(getattr(data, name, None)) for name in ("state_dict", "load_state_dict"))


def fingerprint_of(data: Any) -> str | None:
    """Return the fingerprint of a Hugging Face dataset, which tells its content."""
    datasets = sys.modules.get("datasets")
    if datasets is None or not isinstance(data, datasets.Dataset):
        return None
    found = getattr(data, "_fingerprint", None)
    return found if isinstance(found, str) else None


def place(data: Any, mark: Mark) -> tuple[Any, Callable[[], None]] | None:
    """Move an input that has a `state_dict` to a mark.

    Returns:
        The input to go through, and what puts it back; None where it cannot be put there.

    """
    data = _own(data)
    try:
        before = data.state_dict()
        data.load_state_dict(decoded(mark.state))
    except Exception:  # noqa: BLE001  whatever it is, the input can be read
        return None

    def put_back() -> None:
        with contextlib.suppress(Exception):
            data.load_state_dict(before)

    return data, put_back


def _own(data: Any) -> Any:
    """Copy a stream of Hugging Face, which begins every later loop at a place it was once put."""
    datasets = sys.modules.get("datasets")
    if datasets is None or not isinstance(data, datasets.IterableDataset):
        return data
    copied = object.__new__(type(data))
    vars(copied).update(vars(data))
    return copied


def _digest(item: Item, before: bytes | None, tokenizer: str | None) -> bytes | None:
    """Digest an item and all before it; None where it holds what cannot be."""
    if before is None:
        return None
    found = hashlib.blake2b(before, digest_size=16)
    held = {
        "tokens": item.tokens if item.text is None else item.text,
        "tokenizer": tokenizer if item.is_text else None,
        "real": item.real,
        "kept": item.kept,
        "attended": item.attended,
        **{f"given {name}": value for name, value in item.given.items()},
        **{f"carried {name}": value for name, value in item.carried.items()},
    }
    try:
        for name, value in held.items():
            if isinstance(value, Tensor):
                found.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
                flat = value.detach().cpu().contiguous().reshape(-1)
                found.update(flat.view(torch.uint8).numpy().data)
            elif value is not None:
                found.update(f"{name} {json.dumps(value)} ".encode())
    except (TypeError, ValueError, RuntimeError):
        return None
    return found.digest()
