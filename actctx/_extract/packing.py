"""Join sequences, and cut them into as many tokens as the context has."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor

from actctx._errors import OptionError
from actctx._extract.batching import Batch
from actctx._extract.items import Item
from actctx._store.marks import Mark


@dataclass(frozen=True)
class Packing:
    """How sequences are joined.

    Attributes:
        batch_size: The sequences in a batch, at most.
        context: The tokens in each, but for the last.
        separator: The token between texts that are joined.

    """

    batch_size: int
    context: int
    separator: int | None

    def batches(self, chunks: Iterable[tuple[Mark, list[Item]]], at: Mark) -> Iterator[Batch]:
        """Make batches of sequences that were read in chunks, each behind a mark.

        Args:
            chunks: Those from a mark on.
            at: The mark.

        """
        size, waiting = self.batch_size * self.context, torch.empty(0, dtype=torch.long)
        stream = _Stream(at)
        for mark, sequences in chunks:
            stream.places.append((stream.total, replace(mark, last=stream.last)))
            waiting = torch.cat([waiting, *self._joined(sequences, stream)])
            whole = len(waiting) - len(waiting) % size
            for tokens in torch.split(waiting[:whole], size) if whole else ():
                yield stream.batch(tokens.view(-1, self.context))
            waiting = waiting[whole:].clone()
        whole = len(waiting) - len(waiting) % self.context
        if whole:
            yield stream.batch(waiting[:whole].view(-1, self.context))
        if len(waiting) > whole:
            yield stream.batch(waiting[None, whole:])
        elif stream.empty:
            yield stream.batch(waiting[whole:].view(0, 0))

    def _joined(self, sequences: list[Item], stream: "_Stream") -> Iterator[Int64[Tensor, " _"]]:
        """Pass on tokens, and what parts texts, unless the tokenizer has put it there itself."""
        for sequence in sequences:
            tokens = sequence.tokens
            if sequence.given:
                raise OptionError(
                    f"pack=True joins sequences, but they come with {min(sequence.given)!r}, which "
                    "the model's forward takes; leave it out, or give pack=False"
                )
            if not len(tokens):
                stream.empty += 1
                continue
            last = stream.last
            is_parted = self.separator in {None, last, int(tokens[0])}
            if sequence.is_text and last is not None and not is_parted:
                yield stream.behind_start(torch.tensor([self.separator]))
            yield stream.behind_start(tokens)


class _Stream:
    """The tokens of sequences that are joined, from a mark on.

    Attributes:
        places: Where the items begin that were read together: the tokens before, and the mark.
        total: The tokens that were read.
        last: The last of them.
        empty: The sequences without tokens since the last batch.

    """

    def __init__(self, at: Mark) -> None:
        self.places = deque[tuple[int, Mark]]()
        self.total, self.last, self.empty = 0, at.last, 0
        self._number, self._skipped, self._taken = at.sequences, at.skip, at.skip

    def behind_start(self, tokens: Int64[Tensor, " _"]) -> Int64[Tensor, " _"]:
        """Count tokens, and leave out those before the mark."""
        before = max(0, self._skipped - self.total)
        self.total += len(tokens)
        self.last = int(tokens[-1])
        return tokens[before:]

    def batch(self, tokens: Int64[Tensor, "batch pos"]) -> Batch:
        """Make a batch of the next tokens."""
        while len(self.places) > 1 and self.places[1][0] <= self._taken:
            self.places.popleft()
        before, mark = self.places[0]
        mark = replace(mark, sequences=self._number, skip=self._taken - before)
        numbers = torch.arange(self._number, self._number + len(tokens))
        made = Batch(tokens, None, numbers, mark=mark, empty=self.empty)
        self._number, self._taken = self._number + len(tokens), self._taken + tokens.numel()
        self.empty = 0
        return made
