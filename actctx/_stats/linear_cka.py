"""How alike sites are, all with all, in one pass."""

from collections.abc import Mapping
from itertools import combinations_with_replacement
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from actctx._errors import JoinError, OptionError
from actctx._select.own import plain_mode
from actctx._stats.accumulator import Accumulator, float_dtype, result_dtype
from actctx._stats.moments import merged_means
from actctx._stats.rows import arrange
from actctx._stats.statistic import Observation

_PART = 2**9
"""The rows of one matrix product, so that single precision adds up few numbers."""


class LinearCKA(Accumulator):
    """How alike sites are, such as all layers, by linear centred kernel alignment (CKA).

    With rows X and Y of two sites, centred, it is `|Y'X|^2 / (|X'X| |Y'Y|)` in Frobenius norms
    (Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", equation 4).
    For each pair of sites it holds 8 bytes for each feature of one with each of the other, however
    many rows there are.

    Args:
        over: The axes that are reduced, by name or number: by default those of `batch`, `pos` and
            `token` that there are. All others have the features.
        device: Where the result is kept; by default where the activations of the first site are.

    Example:
        >>> cka = LinearCKA()
        >>> rows = Observation(values=torch.eye(4), axes=("token", "d_model"))
        >>> cka.update_all({"one": rows, "other": rows})
        >>> cka.similarity
        tensor([[1., 1.],
                [1., 1.]])

    """

    def _options(self) -> dict[str, Any]:
        return {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sites."""
        return self.axes

    def update_all(self, observations: Mapping[str, Observation], /) -> None:
        """Add what each site left in one forward.

        Args:
            observations: What each left, by its name.

        Raises:
            AxisError: One does not have the axes to reduce.
            JoinError: They do not have as many rows, or are not the sites of before.
            OptionError: One has values that are not real numbers.

        """
        for each in observations.values():
            self._check_values(each)
        with plain_mode(), torch.no_grad():
            rows = [arrange(each, self._over).values.flatten(1) for each in observations.values()]
            counts = {name: len(each) for name, each in zip(observations, rows, strict=True)}
            if len({*counts.values()}) > 1:
                raise JoinError(
                    "sites are compared row by row, but they have "
                    f"{', '.join(f'{count} ({name!r})' for name, count in counts.items())} rows; "
                    "give sites with the same positions, or select them with a slice"
                )
            sizes = torch.Size(each.shape[1] for each in rows)
            self._settle(tuple(observations), sizes, "")
            if rows and len(rows[0]):
                self._take(_of_values(rows, self._device), len(rows[0]), own=True)

    def _settle(self, axes: tuple[str, ...], shape: torch.Size, site: str) -> None:
        if self._shape is not None and (axes, shape) != (self.axes, self._shape):
            raise JoinError(
                f"linear CKA of {', '.join(self.axes)} with {tuple(self._shape)} features "
                f"does not take {', '.join(axes)} with {tuple(shape)}; compare the same sites in "
                "all forwards"
            )
        super()._settle(axes, shape, site)

    def _merged(
        self, one: dict[str, Tensor], two: dict[str, Tensor], counts: tuple[int, int]
    ) -> dict[str, Tensor]:
        first, second = counts
        share = first * (second / (first + second))
        sites = range(len(self.axes))
        apart = [two[f"mean {each}"] - one[f"mean {each}"] for each in sites]
        merged = {
            name: merged_means(one[name], two[name], counts)[0]
            for name in (f"mean {each}" for each in sites)
        }
        for this, other in combinations_with_replacement(sites, 2):
            name = f"products {this} {other}"
            merged[name] = torch.addr(one[name], apart[this] * share, apart[other]).add_(two[name])
        return merged

    @property
    def similarity(self) -> Float[Tensor, "site site"]:
        """How alike the sites are, from 0 to 1, on the CPU: 1 up to a rotation and a scale.

        Raises:
            NotCapturedError: No rows were seen.
            OptionError: All rows of a site are the same, or some are not finite.

        """
        sites = range(len(self.axes))
        spreads = []
        for each in sites:
            spread = self._read(f"products {each} {each}").norm().cpu()
            mean = self._read(f"mean {each}").norm().cpu()
            check_differ(self.axes[each], spread, self.count * mean**2)
            spreads.append(spread)
        square = torch.eye(len(sites), dtype=torch.float64)
        for this, other in combinations_with_replacement(sites, 2):
            if this != other:
                common = self._read(f"products {this} {other}").norm().cpu() ** 2
                square[this, other] = square[other, this] = common / spreads[this] / spreads[other]
        return square.float()


def _of_values(
    sites: list[Shaped[Tensor, "row _"]], device: torch.device | None
) -> dict[str, Tensor]:
    count, place = len(sites[0]), sites[0].device
    exact = float_dtype(sites[0])
    is_precise = torch.get_float32_matmul_precision() == "highest"
    means = [
        torch.stack([part.sum(0, dtype=exact) for part in torch.split(each, _PART)]).sum(0) / count
        for each in sites
    ]
    found = {f"mean {number}": mean.to(device or place) for number, mean in enumerate(means)}
    for first in range(0, count, _PART):
        centred = []
        for each, mean in zip(sites, means, strict=True):
            single = result_dtype(each)
            # As in Covariance: grids of half precision are multiplied in double.
            dtype = single if is_precise and each.itemsize > 2 else exact  # noqa: PLR2004
            part = each[first : first + _PART].to(dtype)
            centred.append((part - mean.to(dtype)).to(place))
        for this, other in combinations_with_replacement(range(len(sites)), 2):
            dtype = torch.promote_types(centred[this].dtype, centred[other].dtype)
            product = centred[this].to(dtype).T @ centred[other].to(dtype)
            name = f"products {this} {other}"
            if first:
                found[name].add_(product.to(found[name].device))
            else:
                found[name] = product.to(device or place, exact)
    return found


def check_differ(key: str, spread: Float[Tensor, ""], mean: Float[Tensor, ""]) -> None:
    """Refuse a layer whose rows are the same but for rounding, from sums of their squares."""
    if not spread.isfinite():
        raise OptionError(
            f"{key!r} has NaN, infinite or too large values, so it cannot be compared with other "
            "layers; leave it out"
        )
    if spread <= 1e-10 * mean:
        raise OptionError(
            f"the rows of {key!r} are all the same, so it cannot be compared with other layers; "
            "capture other positions, or leave it out"
        )
