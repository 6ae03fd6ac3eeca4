"""How alike layers are: linear centred kernel alignment."""

import torch
from jaxtyping import Float
from torch import Tensor

from actctx._plot.sources import Source, read_layers
from actctx._stats.linear_cka import check_differ


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
        check_differ(key, size, count * means[one].norm().cpu() ** 2)
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
