"""How the features along the last axis vary together."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from actctx._errors import AxisError, OptionError
from actctx._stats.accumulator import RowAccumulator, float_dtype, result_dtype
from actctx._stats.moments import merged_means
from actctx._stats.rows import Rows

_PART = 2**9
"""The rows of one matrix product, so that single precision adds up few numbers."""


class Eigen(NamedTuple):
    """The eigenvalues of a covariance, from the smallest, and its eigenvectors in columns."""

    eigenvalues: Float[Tensor, "... feature"]
    eigenvectors: Float[Tensor, "... feature feature"]


class Covariance(RowAccumulator):
    """The covariance of the features along the last axis.

    Other axes that are kept, such as heads, have a covariance each. Rows are centred on the mean of
    their forward, multiplied in single precision (those of half or double precision in double), and
    added up in double (Chan, Golub and LeVeque 1983). It holds 8 bytes for each pair of features.
    A feature with NaN or infinite values has a covariance of NaN with all others.

    Args:
        over: The axes that are reduced, by name or number: by default those of `batch`, `pos` and
            `token` that there are.
        device: Where the result is kept; by default where the activations are.

    Example:
        >>> covariance = Covariance()
        >>> covariance.update(Observation(values=torch.eye(2), axes=("token", "d_model")))
        >>> covariance.covariance
        tensor([[ 0.5000, -0.5000],
                [-0.5000,  0.5000]])

    """

    def _options(self) -> dict[str, Any]:
        return {}

    def _check_kept(self, shape: torch.Size) -> None:
        if not shape:
            raise AxisError(
                "Covariance keeps the last axis, which has the features, but all are reduced; "
                "leave the last one out of over="
            )

    def _of_rows(self, rows: Rows) -> dict[str, Tensor]:
        return _of_values(rows.values)

    def _merged(
        self, one: dict[str, Tensor], two: dict[str, Tensor], counts: tuple[int, int]
    ) -> dict[str, Tensor]:
        first, second = counts
        mean, _ = merged_means(one["mean"], two["mean"], counts)
        apart = two["mean"] - one["mean"]
        scaled = apart * (first * (second / (first + second)))
        products = _with_outer(one["products"], scaled, apart).add_(two["products"])
        dtype = torch.promote_types(one["dtype"].dtype, two["dtype"].dtype)
        return {"mean": mean, "products": products, "dtype": one["dtype"].to(dtype)}

    @property
    def mean(self) -> Float[Tensor, "... feature"]:
        """The mean of each feature, in float32, or float64 where the activations were."""
        return self._result(self._read("mean"))

    @property
    def covariance(self) -> Float[Tensor, "... feature feature"]:
        """The covariance of each pair of features, with `correction=1`; NaN of one row."""
        return self._result(self._exact())

    @property
    def correlation(self) -> Float[Tensor, "... feature feature"]:
        """The correlation of each pair of features; NaN where one of them does not vary."""
        exact = self._exact()
        scale = exact.diagonal(dim1=-2, dim2=-1).sqrt()
        scaled = (exact / scale.unsqueeze(-1) / scale.unsqueeze(-2)).clamp(-1, 1)
        return self._result(scaled)

    def eigh(self) -> Eigen:
        """Find the principal directions, as `torch.linalg.eigh` returns them: the largest last.

        Returns:
            The variances along the directions, and the directions in columns.

        Raises:
            OptionError: Some features have NaN or infinite values, or there is one row.

        """
        exact = self._exact()
        if not bool(exact.isfinite().all()):
            raise OptionError(
                "the covariance has values that are not finite, so it has no eigenvectors; leave "
                "out the features with NaN or infinite values, and capture two rows or more"
            )
        values, vectors = torch.linalg.eigh(exact)
        return Eigen(self._result(values), self._result(vectors))

    def _exact(self) -> Float[Tensor, "... feature feature"]:
        products = self._read("products")
        return products / (self.count - 1) if self.count > 1 else products * torch.nan

    def _result(self, exact: Tensor) -> Tensor:
        return exact.to(self._held.tensors["dtype"].dtype, copy=True)


def _of_values(values: Shaped[Tensor, "row ... feature"]) -> dict[str, Tensor]:
    count, exact, single = len(values), float_dtype(values), result_dtype(values)
    parts = torch.split(values, _PART if values.device.type == "cpu" else _PART * 16)
    mean = torch.stack([part.sum(0, dtype=exact) for part in parts]).sum(0) / count
    # Other settings than "highest" round what is multiplied to fewer digits. Values of half
    # precision lie on a grid, so that rounding in single precision goes the same way each time.
    is_precise = torch.get_float32_matmul_precision() == "highest" and values.itemsize > 2  # noqa: PLR2004
    dtype = single if is_precise else exact
    shift = mean.to(dtype)
    products = torch.zeros((), dtype=exact, device=values.device)
    for number, part in enumerate(parts):
        centred = (part.to(dtype) - shift).movedim(0, -2)
        found = centred.mT @ centred
        products = products.add_(found) if number else found.to(exact)
    left = mean - shift  # what rounding the mean left
    products = _with_outer(products, left * -count, left)
    return {
        "mean": mean,
        "products": products,
        "dtype": torch.empty(0, dtype=single, device=values.device),
    }


def _with_outer(
    products: Float[Tensor, "... feature feature"],
    one: Float[Tensor, "... feature"],
    two: Float[Tensor, "... feature"],
) -> Float[Tensor, "... feature feature"]:
    """Add an outer product to a matrix."""
    return torch.addcmul(products, one.unsqueeze(-1), two.unsqueeze(-2))
