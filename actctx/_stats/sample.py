"""Some rows, drawn uniformly.

# NOTE [Keys]
Each row has a key that its seed, sequence and position are hashed to, by the finaliser of
MurmurHash3 as in SplitMix64 (Steele, Lea and Flood 2014). The rows with the smallest keys are kept.
So which rows are drawn does not depend on the order or the batches in which they came, and
samples merge to a sample of all.
"""

from typing import Any, ClassVar

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from actctx._stats.accumulator import RowAccumulator
from actctx._stats.arguments import read_count
from actctx._stats.rows import Over, Rows


class Sample(RowAccumulator):
    """A number of rows, drawn uniformly from all, without replacement.

    The same rows are drawn whatever the order in which they come, as long as their sequences and
    positions are known. Give samples that are merged other seeds where each counted its own
    sequences from 0.

    Args:
        n: How many rows to keep.
        seed: What other rows are drawn with. It may differ between samples that are merged.
        over: The axes that are reduced, by name or number: by default those of `batch`, `pos` and
            `token` that there are.
        device: Where the result is kept; by default where the activations are.

    Example:
        >>> sample = Sample(2)
        >>> sample.update(Observation(values=torch.eye(4), axes=("token", "d_model")))
        >>> sample.rows.shape
        torch.Size([2, 4])

    """

    _takes: ClassVar[str] = "any"
    _free: ClassVar[tuple[str, ...]] = ("seed",)

    def __init__(
        self,
        n: int,
        *,
        seed: int = 0,
        over: Over | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._n = read_count("Sample", "n", n)
        self._seed = read_count("Sample", "seed", seed, least=0)
        super().__init__(over=over, device=device)

    def _options(self) -> dict[str, Any]:
        return {"n": self._n, "seed": self._seed}

    def _of_rows(self, rows: Rows) -> dict[str, Tensor]:
        origins = rows.origins_of_rows()
        # Where sequences are not known, keys go by the order of forwards.
        first = origins.sequence if rows.has_sequences else -1 - rows.observation.number
        within = rows.numbers_within()
        keys = _keys(first + torch.zeros_like(within), origins.position, within, seed=self._seed)
        drawn = keys.argsort(stable=True)[: self._n]
        return {
            "keys": keys[drawn],
            "rows": rows.values[drawn].contiguous(),
            "sequence": origins.sequence[drawn],
            "position": origins.position[drawn],
        }

    def _merged(
        self, one: dict[str, Tensor], two: dict[str, Tensor], _counts: tuple[int, int]
    ) -> dict[str, Tensor]:
        keys = torch.cat([one["keys"], two["keys"]])
        drawn = keys.argsort(stable=True)[: self._n]
        if len(drawn) == len(one["keys"]) and int(drawn.max()) < len(drawn):
            return one
        return {name: torch.cat([one[name], two[name]])[drawn] for name in one}

    @property
    def rows(self) -> Shaped[Tensor, "row ..."]:
        """The rows, in the dtype of the activations; all that were seen where there are fewer."""
        return self._read("rows").clone()

    @property
    def sequence(self) -> Int64[Tensor, " row"]:
        """The sequence that each row is from; -1 where it is not known."""
        return self._read("sequence").clone()

    @property
    def position(self) -> Int64[Tensor, " row"]:
        """The position that each row is from; -1 where it is not known, or where it is kept."""
        return self._read("position").clone()


def _keys(*numbers: Int64[Tensor, " row"], seed: int) -> Int64[Tensor, " row"]:
    """Hash where rows come from; products of 64 bits wrap around."""
    keys = torch.full_like(numbers[0], seed)
    for each in numbers:
        keys = _mixed(_mixed(keys) ^ each)
    return keys


_STEP = -7046029254386353131  # 0x9E3779B97F4A7C15, as a signed integer


def _mixed(numbers: Int64[Tensor, " row"]) -> Int64[Tensor, " row"]:
    numbers = numbers + _STEP
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        numbers = (numbers ^ _shifted(numbers, shift)) * factor
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Int64[Tensor, " row"], by: int) -> Int64[Tensor, " row"]:
    """Shift to the right without the sign."""
    return (numbers >> by) & ((1 << (64 - by)) - 1)
