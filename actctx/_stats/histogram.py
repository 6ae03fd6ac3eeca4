"""How the values of each feature are distributed, in a range that is found as they come.

# NOTE [Bins]
The bins of a feature are `2**e` wide, and begin at whole multiples of that. `e` is the smallest
with which the bins reach from the least to the largest value so far, so it follows from these two
alone. Where it grows, bins are joined by twos, fours, ..., which loses nothing of what the wider
bins count. So the result is the same in whatever order values come, and merging is exact.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from actctx._errors import OptionError
from actctx._stats.accumulator import RowAccumulator, result_dtype
from actctx._stats.arguments import read_count
from actctx._stats.drawing import bars, thinned
from actctx._stats.rows import Over, Rows

_FINEST = 40
"""The bits by which bins are narrower than the largest value, at most."""
_LEAST, _MOST = -1000, 1000
"""The exponents that widths may have."""


class Histogram(RowAccumulator):
    """How often the values of each element lie in each of a number of bins.

    Each element has bins of its own, all of one width. Their range is found as values come: where
    one lies outside, the bins double their width. At least half of the bins lie between the least
    and the largest value, if there are enough different ones. Infinite values and NaN lie in no
    bin, and are counted apart.

    Args:
        bins: How many bins there are.
        over: The axes that are reduced, by name or number: by default those of `batch`, `pos` and
            `token` that there are.
        device: Where the result is kept; by default where the activations are.

    Example:
        >>> histogram = Histogram(bins=4)
        >>> values = torch.tensor([[0.0], [1.0], [1.5], [7.0]])
        >>> histogram.update(Observation(values=values, axes=("token", "d_mlp")))
        >>> histogram.counts
        tensor([[3, 0, 0, 1]])
        >>> histogram.edges
        tensor([[0., 2., 4., 6., 8.]], dtype=torch.float64)

    """

    def __init__(
        self,
        bins: int = 256,
        *,
        over: Over | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._bins = read_count("Histogram", "bins", bins, least=2)
        super().__init__(over=over, device=device)

    def _options(self) -> dict[str, Any]:
        return {"bins": self._bins}

    def _of_rows(self, rows: Rows) -> dict[str, Tensor]:
        values = rows.values.to(result_dtype(rows.values))
        if values.device.type == "mps":  # which has no double precision
            values = values.cpu()
        finite = values.isfinite()
        least = torch.where(finite, values, torch.inf).amin(0).double()
        most = torch.where(finite, values, -torch.inf).amax(0).double()
        exponent = _exponent(least, most, self._bins)
        start = _start(least, exponent)
        elements = max(1, least.numel())
        first = torch.arange(elements, device=values.device).reshape(least.shape) * self._bins
        counts = torch.zeros(elements * self._bins, dtype=torch.long, device=values.device)
        for part in torch.split(values, max(1, 2**20 // elements)):
            inside = part.isfinite()
            scaled = torch.where(inside, part, 0).double() * _power(-exponent)
            places = (scaled.floor().long() - start).clamp_(0, self._bins - 1) + first
            counts.scatter_add_(0, places.flatten(), inside.flatten().long())
        return {
            "counts": counts.reshape(*least.shape, self._bins),
            "exponent": exponent,
            "start": start,
            "least": least,
            "most": most,
            "apart": torch.stack(
                [values.isnan().sum(0), (values == -torch.inf).sum(0), (values == torch.inf).sum(0)]
            ),
        }

    def _merged(
        self, one: dict[str, Tensor], two: dict[str, Tensor], _counts: tuple[int, int]
    ) -> dict[str, Tensor]:
        least = torch.minimum(one["least"], two["least"])
        most = torch.maximum(one["most"], two["most"])
        exponent = _exponent(least, most, self._bins)
        start = _start(least, exponent)
        return {
            "counts": _joined(one, exponent, start) + _joined(two, exponent, start),
            "exponent": exponent,
            "start": start,
            "least": least,
            "most": most,
            "apart": one["apart"] + two["apart"],
        }

    @property
    def counts(self) -> Int64[Tensor, "... bin"]:
        """How many values of each element lie in each bin, along a new last axis."""
        return self._read("counts").clone()

    @property
    def edges(self) -> Float64[Tensor, "... edge"]:
        """The edges of the bins of each element, one more than bins, along a new last axis.

        A value on an edge lies in the bin that begins there.
        """
        numbers = torch.arange(self._bins + 1, device=self._read("start").device)
        places = self._read("start").unsqueeze(-1) + numbers
        return places * _power(self._read("exponent")).unsqueeze(-1)

    @property
    def nan_count(self) -> Int64[Tensor, "..."]:
        """How many values of each element are NaN."""
        return self._read("apart")[0].clone()

    @property
    def infinite_count(self) -> Int64[Tensor, "..."]:
        """How many values of each element are infinite."""
        return self._read("apart")[1:].sum(0)

    def quantile(self, q: float | Sequence[float]) -> Float[Tensor, "..."]:
        """Estimate quantiles of each element, as `torch.quantile` computes them.

        They are off by the width of a bin at most; 0 and 1 are the least and the largest value.
        Values within a bin are taken to lie evenly.

        Args:
            q: The share of the values that lie below, from 0 to 1; or several, which are a new
                first axis.

        Returns:
            The quantiles; NaN of an element that had a NaN.

        Raises:
            OptionError: A share is not from 0 to 1.
            NotCapturedError: No rows were seen.

        """
        shares = [q] if isinstance(q, int | float) else [*q]
        if not all(isinstance(each, int | float) and 0 <= each <= 1 for each in shares):
            raise OptionError(f"quantile takes shares from 0 to 1, not {q!r}")
        found = torch.stack([self._quantile(float(each)) for each in shares])
        return found[0] if isinstance(q, int | float) else found

    def _quantile(self, share: float) -> Float[Tensor, "..."]:
        nan, low, high = self._read("apart")
        rank = share * (self.count - 1 - nan).double()
        below = self._read("counts").cumsum(-1) + low.unsqueeze(-1)
        place = torch.searchsorted(below.double(), rank.unsqueeze(-1), right=True)
        place = place.clamp(max=self._bins - 1)
        inside = self._read("counts").gather(-1, place).squeeze(-1)
        before = below.gather(-1, place).squeeze(-1) - inside
        within = (rank - before + 0.5) / inside.clamp(min=1)
        width = _power(self._read("exponent"))
        found = (self._read("start") + place.squeeze(-1) + within) * width
        least, most = self._read("least"), self._read("most")
        found = found.clamp(least, most)
        found = torch.where(rank <= low, least, found)
        found = torch.where(rank >= self.count - 1 - nan - high, most, found)
        found = torch.where(rank < low, -torch.inf, found)
        found = torch.where(rank > self.count - 1 - nan - high, torch.inf, found)
        return torch.where(nan > 0, torch.nan, found).float()

    def _picture(self) -> str:
        first = self._read("counts").reshape(-1, self._bins)[0].cpu()
        edges = self.edges.reshape(-1, self._bins + 1)[0].tolist()
        heights = [float(first[part].sum()) for part in thinned(self._bins)]
        return bars(heights, first=edges[0], last=edges[-1])


def _power(exponent: Int64[Tensor, "..."]) -> Float64[Tensor, "..."]:
    """Return 2 to a whole power, exactly."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _exponent(
    least: Float64[Tensor, "..."], most: Float64[Tensor, "..."], bins: int
) -> Int64[Tensor, "..."]:
    """Find the width of bins that reach from one value to another; see the note above."""
    largest = torch.maximum(least.abs(), most.abs())
    is_empty = ~largest.isfinite()  # nothing came yet
    largest = torch.where(is_empty, 0, largest)
    finest = torch.where(largest > 0, torch.frexp(largest).exponent - _FINEST, _LEAST)
    span = torch.where(is_empty, 0, most / bins - least / bins)
    enough = torch.where(span > 0, torch.frexp(span).exponent - 2, _LEAST)
    exponent = torch.maximum(finest, enough).clamp(_LEAST, _MOST).long()
    for _ in range(4):
        needed = _start(most, exponent) - _start(least, exponent) + 1
        exponent = exponent + (needed > bins).long()
    return exponent


def _start(value: Float64[Tensor, "..."], exponent: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """Number the bin in which a value lies; 0 for none."""
    finite = torch.where(value.isfinite(), value, 0)
    return (finite * _power(-exponent)).floor().long()


def _joined(
    held: dict[str, Tensor], exponent: Int64[Tensor, "..."], start: Int64[Tensor, "..."]
) -> Int64[Tensor, "... bin"]:
    """Count what bins hold in bins that are as wide or wider."""
    counts = held["counts"]
    numbers = torch.arange(counts.shape[-1], device=counts.device)
    wider = (exponent - held["exponent"]).clamp(0, 62).unsqueeze(-1)
    places = ((held["start"].unsqueeze(-1) + numbers) >> wider) - start.unsqueeze(-1)
    found = torch.zeros_like(counts)
    return found.scatter_add_(-1, places.clamp(0, counts.shape[-1] - 1), counts)
