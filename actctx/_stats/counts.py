"""How often each integer came."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from actctx._errors import OptionError
from actctx._stats.accumulator import RowAccumulator
from actctx._stats.arguments import read_count
from actctx._stats.drawing import bars, thinned
from actctx._stats.rows import Over, Rows


class Counts(RowAccumulator):
    """How often each integer came, such as token ids or the experts that were chosen.

    Args:
        n: Integers from 0 to `n - 1` are counted. Others raise.
        over: The axes that are reduced, by name or number: by default those of `batch`, `pos` and
            `token` that there are.
        device: Where the result is kept; by default where the activations are.

    Example:
        >>> counts = Counts(4)
        >>> counts.update(Observation(values=torch.tensor([[3, 0, 3]]), axes=("batch", "pos")))
        >>> counts.counts
        tensor([1, 0, 0, 2])

    """

    _takes: ClassVar[str] = "integers"

    def __init__(
        self, n: int, *, over: Over | None = None, device: torch.device | str | None = None
    ) -> None:
        self._n = read_count("Counts", "n", n)
        super().__init__(over=over, device=device)

    def _options(self) -> dict[str, Any]:
        return {"n": self._n}

    def _of_rows(self, rows: Rows) -> dict[str, Tensor]:
        values = rows.values.flatten(1).long() if rows.axes else rows.values.long()[:, None]
        least, most = (each.item() for each in values.aminmax())
        if least < 0 or most >= self._n:
            site = rows.observation.site
            raise OptionError(
                f"Counts(n={self._n}) counts integers from 0 to {self._n - 1}, but "
                f"{f'{site!r} has' if site else 'there are'} values from {least} to {most}; give a "
                "larger n, or map= a function that brings them into this range"
            )
        places = values + torch.arange(values.shape[1], device=values.device) * self._n
        counts = torch.bincount(places.flatten(), minlength=values.shape[1] * self._n)
        return {"counts": counts.reshape(*rows.values.shape[1:], self._n)}

    def _merged(
        self, one: dict[str, Tensor], two: dict[str, Tensor], _counts: tuple[int, int]
    ) -> dict[str, Tensor]:
        return {"counts": one["counts"] + two["counts"]}

    @property
    def counts(self) -> Int64[Tensor, "... n"]:
        """How often each integer came, along a new last axis."""
        return self._read("counts").clone()

    @property
    def share(self) -> Float[Tensor, "... n"]:
        """The share of the rows that were each integer, along a new last axis."""
        return (self._read("counts").double() / self.count).float()

    def _picture(self) -> str:
        counts = self._read("counts").reshape(-1, self._n).sum(0).cpu()
        heights = [float(counts[part].sum()) for part in thinned(self._n)]
        return bars(heights, first=0.0, last=self._n - 1.0)
