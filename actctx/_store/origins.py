"""Where the rows of a data set come from."""

from typing import NamedTuple

from jaxtyping import Int, Int64
from torch import Tensor


class Origins(NamedTuple):
    """Where some rows on disk come from."""

    token: Int[Tensor, " row"]
    sequence: Int64[Tensor, " row"]
    position: Int[Tensor, " row"]
    digest: Int64[Tensor, " row"]

    def rows(self, start: int, stop: int | None = None) -> "Origins":
        """Return some of them."""
        return Origins(*(each[start:stop] for each in self))

    def shown(self, row: int) -> str:
        """Explain where a row comes from."""
        token, sequence, position, _ = (int(each[row]) for each in self)
        return f"token {token} of sequence {sequence}, position {position}"
