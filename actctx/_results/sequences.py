"""The sequences of kept rows, counted over all forwards."""

from collections import deque
from dataclasses import dataclass, field

import torch
from jaxtyping import Int64
from torch import Tensor

from actctx._select.own import TokenRows


@dataclass(eq=False)
class Sequences:
    """Counts sequences over the forwards; those of one line have the same sequences.

    Attributes:
        count: The number of sequences of all forwards.
        lines: The first sequence of each line of forwards, and the number of them.

    """

    count: int = 0
    lines: dict[int, tuple[int, int]] = field(default_factory=dict)

    def place(self, rows: TokenRows) -> Int64[Tensor, "token 2"]:
        """Return the sequence and the position of each row of a forward that has not ended."""
        return rows.where + torch.tensor([self.first(rows.sequences, rows.line), rows.before])

    def first(self, sequences: int, line: int | None) -> int:
        """Return the number of the first sequence of a forward that has not ended."""
        first, count = self.lines.get(-1 if line is None else line, (0, 0))
        return first if count == sequences else self.count

    def add(self, sequences: int, line: int | None) -> None:
        """Count the sequences of a forward that ended."""
        first = self.first(sequences, line)
        self.count = max(self.count, first + sequences)
        if line is not None:
            self.lines[line] = first, sequences

    def clear(self) -> None:
        """Start at 0 again."""
        self.count = 0
        self.lines.clear()

    def copied(self) -> "Sequences":
        """Return an independent copy."""
        return Sequences(self.count, self.lines.copy())


@dataclass(eq=False)
class KeptRows:
    """The rows that a mask kept, forward by forward.

    Attributes:
        where: The sequences and positions of the rows of each forward.
        sequences: Counts their sequences.

    """

    where: deque[Int64[Tensor, "token 2"]] = field(default_factory=deque)
    sequences: Sequences = field(default_factory=Sequences)

    def add(self, rows: TokenRows) -> None:
        """Add the rows of one forward."""
        self.where.append(self.sequences.place(rows))
        self.sequences.add(rows.sequences, rows.line)

    def joined(self) -> Int64[Tensor, "token 2"] | None:
        """Return the rows of all forwards; None if there were none, or no mask."""
        return torch.cat(list(self.where)) if self.where else None

    def copied(self) -> "KeptRows":
        """Return an independent copy."""
        return KeptRows(self.where.copy(), self.sequences.copied())

    def clear(self) -> None:
        """Drop the rows."""
        self.where.clear()
        self.sequences.clear()
