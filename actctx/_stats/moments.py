"""Means, variances, extremes and norms.

# NOTE [Means and squares]
Each chunk of rows is centred on its own mean in double precision, and chunks, forwards and whole
statistics are merged by the difference of their means: the pairwise sums of Chan, Golub and LeVeque
1983, "Algorithms for Computing the Sample Variance: Analysis and Recommendations". No large
squares are subtracted from each other, so a mean of many deviations costs no digits.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from actctx._errors import AxisError
from actctx._stats.accumulator import RowAccumulator, float_dtype, result_dtype
from actctx._stats.drawing import band, thinned
from actctx._stats.rows import Rows


class Moments(RowAccumulator):
    """The mean, variance, extremes and norms of activations.

    Sums are taken in double precision, where the device has it. NaN and infinite values spread as
    in `torch.mean` and `torch.var`, within their own element.

    Args:
        over: The axes that are reduced, by name or number: by default those of `batch`, `pos` and
            `token` that there are. `over="batch"` keeps a mean for each position.
        device: Where the result is kept; by default where the activations are.

    Example:
        >>> moments = Moments()
        >>> moments.update(Observation(values=torch.eye(4), axes=("token", "d_model")))
        >>> moments.mean
        tensor([0.2500, 0.2500, 0.2500, 0.2500])

    """

    def _options(self) -> dict[str, Any]:
        return {}

    def _of_rows(self, rows: Rows) -> dict[str, Tensor]:
        whole: dict[str, Tensor] = {}
        done = 0
        for chunk in _chunks(rows.values):
            found = _of_chunk(chunk)
            whole = self._merged(whole, found, (done, len(chunk))) if done else found
            done += len(chunk)
        return whole

    def _merged(
        self, one: dict[str, Tensor], two: dict[str, Tensor], counts: tuple[int, int]
    ) -> dict[str, Tensor]:
        mean, squares = merged_means(one["mean"], two["mean"], counts)
        merged = {
            "mean": mean,
            "squares": one["squares"] + two["squares"] + squares,
            "min": torch.minimum(one["min"], two["min"]),
            "max": torch.maximum(one["max"], two["max"]),
        }
        for name in ("norms", "square_norms"):
            if name in one:
                merged[name] = one[name] + two[name]
        return merged

    @property
    def mean(self) -> Float[Tensor, "..."]:
        """The mean of each element, in float32, or float64 where the activations were."""
        return self._result(self._read("mean"))

    @property
    def var(self) -> Float[Tensor, "..."]:
        """The variance of each element, with `correction=1`; NaN of one row."""
        squares = self._read("squares")
        return self._result(squares / (self.count - 1) if self.count > 1 else squares * torch.nan)

    @property
    def std(self) -> Float[Tensor, "..."]:
        """The standard deviation of each element, with `correction=1`; NaN of one row."""
        return self.var.sqrt()

    @property
    def min(self) -> Float[Tensor, "..."]:
        """The smallest value of each element; NaN where a value was."""
        return self._read("min").clone()

    @property
    def max(self) -> Float[Tensor, "..."]:
        """The largest value of each element; NaN where a value was."""
        return self._read("max").clone()

    @property
    def mean_norm(self) -> Float[Tensor, "..."]:
        """The mean of the norms along the last axis."""
        return self._result(self._norms("norms") / self.count)

    @property
    def mean_square_norm(self) -> Float[Tensor, "..."]:
        """The mean of the squared norms along the last axis."""
        return self._result(self._norms("square_norms") / self.count)

    def _norms(self, name: str) -> Tensor:
        self._read("mean")
        if name not in self._held.tensors:
            raise AxisError(
                "no axis is kept, so there is none to take norms along; leave the last axis out of "
                "over="
            )
        return self._held.tensors[name]

    def _result(self, exact: Tensor) -> Tensor:
        return exact.to(self._held.tensors["min"].dtype, copy=True)

    def _picture(self) -> str:
        mean, std = (each.flatten().double().cpu().nan_to_num() for each in (self.mean, self.std))
        parts = thinned(len(mean))
        drawn = band(*([each[part].mean().item() for part in parts] for each in (mean, std)))
        return f"{drawn}<div>the mean, and one standard deviation around it</div>"


def _chunks(values: Shaped[Tensor, "row ..."]) -> Iterator[Shaped[Tensor, "part ..."]]:
    """Divide rows so that a chunk in double precision stays in a processor's cache."""
    most = 2**17 if values.device.type == "cpu" else 2**24
    yield from torch.split(values, max(1, most // values[0].numel()))


def _of_chunk(chunk: Shaped[Tensor, "part ..."]) -> dict[str, Tensor]:
    exact = chunk.to(float_dtype(chunk), copy=True, memory_format=torch.contiguous_format)
    readable = chunk.to(result_dtype(chunk))
    found = {"min": readable.amin(0), "max": readable.amax(0)}
    squares = exact.square()
    if chunk.dim() > 1:
        of_rows = squares.sum(-1)
        found["square_norms"], found["norms"] = of_rows.sum(0), of_rows.sqrt_().sum(0)
    found["mean"] = exact.sum(0).div_(len(chunk))
    exact.sub_(found["mean"])
    found["squares"] = torch.mul(exact, exact, out=squares).sum(0)
    return found


def merged_means(
    one: Float[Tensor, "..."], two: Float[Tensor, "..."], counts: tuple[int, int]
) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."]]:
    """Merge two means, and find what their difference adds to the sum of squares."""
    first, second = counts
    apart = two - one
    mean = torch.where(apart.isfinite(), one + apart * (second / (first + second)), one + two)
    return mean, apart.square() * (first * (second / (first + second)))
