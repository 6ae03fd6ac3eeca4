"""Single sequences, sorted by length and put together into batches.

# NOTE [The order of sequences]
Sequences of a window that follow each other are sorted by length, so that there is next to no
padding to compute, and its batches run in a random order, so that those which come first are of any
length. A window has a fixed number of sequences and the seed is fixed, so the same input always
leaves the same rows in the same order, on which resuming relies. What is resumed with another batch
size keeps the order, and its batches run in parts.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from actctx._extract.batching import Batch, beginning
from actctx._extract.items import Item
from actctx._store.marks import Mark


@dataclass(frozen=True)
class Sorting:
    """How sequences are put together; see `Reader` for the attributes."""

    batch_size: int
    ordered_as: int
    padding: int
    takes_mask: str | None
    equal_lengths: bool

    def batches(self, windows: Iterable[tuple[Mark, list[Item]]]) -> Iterator[Batch]:
        """Make batches of windows of sequences, each with the mark before it."""
        for mark, window in windows:
            kept = [sequence for sequence in window if len(sequence.tokens)]
            empty = len(window) - len(kept)
            yield from beginning(mark, self._of_window(kept), empty=empty)

    def _of_window(self, sequences: list[Item]) -> Iterator[Batch]:
        sequences.sort(key=_length, reverse=True)
        batches = [
            together[start : start + self.ordered_as]
            for together in self._together(sequences)
            for start in range(0, len(together), self.ordered_as)
        ]
        # An early stop should not leave the longest only.
        chance = torch.Generator().manual_seed(0)
        for number in torch.randperm(len(batches), generator=chance).tolist():
            for start in range(0, len(batches[number]), self.batch_size):
                yield self._padded(batches[number][start : start + self.batch_size])

    def _together(self, sequences: list[Item]) -> Iterator[list[Item]]:
        """Divide sequences by length if padding would be attended to, or is not wanted."""
        if self.takes_mask is not None and not self.equal_lengths:
            yield sequences
            return
        for _, alike in itertools.groupby(sequences, _length):
            yield [*alike]

    def _padded(self, sequences: list[Item]) -> Batch:
        ids = [sequence.tokens for sequence in sequences]
        lengths = torch.tensor([len(each) for each in ids])
        real = torch.arange(int(lengths.max())) < lengths[:, None]
        masks = [each.kept for each in sequences if each.kept is not None]
        given = {
            name: _pad([each.given[name] for each in sequences]) for name in sequences[0].given
        }
        has_padding = not bool(real.all())
        if has_padding and self.takes_mask is not None:
            given[self.takes_mask] = real.long()
        return Batch(
            tokens=_pad(ids, self.padding),
            real=real if has_padding else None,
            sequences=torch.tensor([sequence.number for sequence in sequences]),
            given=given,
            carried={
                name: [each.carried[name] for each in sequences] for name in sequences[0].carried
            },
            kept=_pad(masks) if masks else None,
            cut=sum(sequence.cut for sequence in sequences),
        )


def _length(sequence: Item) -> int:
    return len(sequence.tokens)


def _pad(parts: list[Tensor], padding: int = 0) -> Tensor:
    return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=padding)
