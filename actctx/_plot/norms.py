"""Norms of rows, and their means at each position."""

import torch
from jaxtyping import Float
from torch import Tensor

from actctx._plot.sources import Source, norms_of, read_layers


def norms_at_positions(source: Source, keys: list[str]) -> Float[Tensor, "layer pos"] | None:
    """Take the mean norm at each position, NaN where there is no row; None without positions."""
    grid = source.grid(keys)
    if grid is not None:
        return grid
    positions = source.positions(keys[0])
    if positions is None:
        return None
    rows = norms_of_rows(source, keys)
    positions = positions.repeat_interleave(rows.shape[1] // len(positions))
    sums = torch.zeros(len(keys), int(positions.max()) + 1).index_add(1, positions, rows)
    return sums / positions.bincount()


def norms_of_rows(source: Source, keys: list[str]) -> Float[Tensor, "layer row"]:
    """Take the norm of each row of each layer, on the CPU."""
    parts = read_layers(source, keys, real=False)
    norms = [torch.stack([norms_of(rows).cpu() for rows in part]) for part in parts]
    return torch.cat(norms, 1)
