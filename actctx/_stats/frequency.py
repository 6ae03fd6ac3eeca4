"""How often each feature is above a value."""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from actctx._errors import OptionError
from actctx._stats.accumulator import RowAccumulator, result_dtype
from actctx._stats.drawing import bars
from actctx._stats.rows import Over, Rows


class Frequency(RowAccumulator):
    """How often each element is above a value, such as how often a feature fires.

    NaN is above nothing, but counts as a row.

    Args:
        above: The value.
        over: The axes that are reduced, by name or number: by default those of `batch`, `pos` and
            `token` that there are.
        device: Where the result is kept; by default where the activations are.

    Example:
        >>> frequency = Frequency(above=0.5)
        >>> frequency.update(Observation(values=torch.eye(4), axes=("token", "d_mlp")))
        >>> frequency.share
        tensor([0.2500, 0.2500, 0.2500, 0.2500])

    """

    _takes: ClassVar[str] = "ordered"

    def __init__(
        self,
        *,
        above: float = 0.0,
        over: Over | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(above, int | float) or math.isnan(above):
            raise OptionError(f"Frequency takes above= a number, not {above!r}")
        self._above = float(above)
        super().__init__(over=over, device=device)

    def _options(self) -> dict[str, Any]:
        return {"above": self._above}

    def _of_rows(self, rows: Rows) -> dict[str, Tensor]:
        values = rows.values
        if values.is_floating_point():
            values = values.to(result_dtype(values))
            found = values > _threshold(values.dtype, self._above)
        elif math.isfinite(self._above):
            found = values > math.floor(self._above)  # torch would round large integers
        else:
            found = torch.full_like(values, self._above < 0, dtype=torch.bool)
        return {"above": found.sum(0)}

    def _merged(
        self, one: dict[str, Tensor], two: dict[str, Tensor], _counts: tuple[int, int]
    ) -> dict[str, Tensor]:
        return {"above": one["above"] + two["above"]}

    @property
    def share(self) -> Float[Tensor, "..."]:
        """The share of the rows that are above the value, from 0 to 1."""
        return (self._read("above").double() / self.count).float()

    def _picture(self) -> str:
        edges = torch.linspace(0, 1, 51)
        counts = torch.histogram(self.share.flatten().cpu(), edges).hist
        drawn = bars(counts.tolist(), first=0.0, last=1.0)
        return f"{drawn}<div>how many features are above {self._above:g} how often</div>"


def _threshold(dtype: torch.dtype, above: float) -> float:
    """Return the largest number of a dtype that is not above a number.

    Torch rounds the number to the dtype before it compares, perhaps upwards.
    """
    kind = np.float64 if dtype == torch.float64 else np.float32
    with np.errstate(over="ignore"):
        rounded = kind(above)
    if float(rounded) > above:
        rounded = np.nextafter(rounded, kind(-math.inf))
    return float(rounded)
