"""Count what a cast to a dtype with a smaller range loses: values that become zero or infinite."""

import math

import torch
from jaxtyping import Shaped
from torch import Tensor

_NARROW = (
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
)
"""The dtypes with a smaller range than those that models run in."""

_LEAST = 0.01
"""The share of nonzero values that become 0 above which a warning is given."""


class CastLoss:
    """Counts what casts to a dtype lose, on the device of the values and without synchronizing.

    Args:
        dtype: The dtype.

    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        told = torch.finfo(dtype)
        self._to_zero = told.smallest_normal * told.eps / 2
        self._end = told.max + told.eps * 2 ** math.floor(math.log2(told.max)) / 2
        self._counts: Tensor | None = None

    def add(self, values: Shaped[Tensor, "..."]) -> None:
        """Count what a cast of some values loses."""
        if not values.is_floating_point() or values.dtype == self.dtype:
            return
        sizes = values.detach().abs()
        zeros = (sizes == 0).sum()
        counts = torch.stack(
            [
                (sizes <= self._to_zero).sum() - zeros,
                (sizes >= self._end).sum() - sizes.isinf().sum(),
                sizes.numel() - zeros,
            ]
        )
        self._counts = counts if self._counts is None else self._counts + counts

    def shown(self, *, refuses_infinite: bool = False) -> str:
        """Describe what was lost, if it is worth a warning.

        Args:
            refuses_infinite: Whether values that became infinite are refused anyway.

        """
        if self._counts is None:
            return ""
        zeros, infinite, nonzero = self._counts.tolist()
        name = str(self.dtype).removeprefix("torch.")
        if infinite and not refuses_infinite:
            values = "1 value is" if infinite == 1 else f"{infinite:,} values are"
            largest = torch.finfo(self.dtype).max
            return f"{values} outside the range of {name}, which ends at {largest:g}"
        if zeros > _LEAST * nonzero:
            return (
                f"{zeros / nonzero:.0%} of the values other than 0 are 0 in {name}, whose smallest "
                f"is {2 * self._to_zero:.1g}"
            )
        return ""


def loss_of(dtype: torch.dtype | None) -> CastLoss | None:
    """Return a counter for the loss of a cast; None if the dtype has the range of float32."""
    return CastLoss(dtype) if dtype is not None and dtype in _NARROW else None
