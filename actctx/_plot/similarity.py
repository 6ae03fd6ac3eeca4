"""How alike layers are: linear centred kernel alignment."""

import torch
from jaxtyping import Float
from torch import Tensor

from actctx._errors import OptionError
from actctx._plot.sources import Source, read_layers


def compare_layers(source: Source, name: str) -> Float[Tensor, "layer layer"]:
    """Compare the layers of one kind of site; see `actctx.plot.layer_similarity`."""
    keys = source.layers(name)
    means = _means(source, keys)
    square = torch.eye(len(keys))
    sizes: list[Tensor] = []
    for one, key in enumerate(keys):
        products, count = [torch.zeros(())] * (one + 1), 0
        for part in read_layers(source, keys[: one + 1]):
            centred = [rows - mean for rows, mean in zip(part, means, strict=False)]
            products = [
                product + rows.T @ centred[one]
                for product, rows in zip(products, centred, strict=True)
            ]
            count += len(part[one])
        *others, size = [product.norm().cpu() for product in products]
        _check_differ(key, size, count * means[one].norm().cpu() ** 2)
        sizes.append(size)
        for two, other in enumerate(others):
            square[one, two] = square[two, one] = other**2 / (sizes[one] * sizes[two])
    return square


def _means(source: Source, keys: list[str]) -> list[Float[Tensor, " features"]]:
    sums, count = [torch.zeros(())] * len(keys), 0
    for part in read_layers(source, keys):
        sums = [each + rows.sum(0) for each, rows in zip(sums, part, strict=True)]
        count += len(part[0])
    return [each / count for each in sums]


def _check_differ(key: str, spread: Float[Tensor, ""], mean: Float[Tensor, ""]) -> None:
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
