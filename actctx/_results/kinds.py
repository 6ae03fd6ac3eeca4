"""The kinds of columns, and the choice between them."""

from typing import Any

import torch

from actctx._results.column import Column, ColumnOptions
from actctx._results.joined import JoinedColumn
from actctx._results.label import Label, Named
from actctx._results.listed import ListColumn
from actctx._results.preallocated import PreallocatedColumn
from actctx._results.reduced import StatisticColumn, moved_statistic
from actctx._results.saved import SavedSite
from actctx._select.own import own, plain_mode


def column_for(label: Label, options: ColumnOptions) -> Column[Any]:
    """Return an empty column of the requested kind."""
    if options.reduce is not None:
        return StatisticColumn(label, options.reduce, options)
    if options.join is None:
        return ListColumn(label, options)
    joined = JoinedColumn(label, options.join, options)
    if options.capacity is not None:
        return PreallocatedColumn(joined, options.capacity, options)
    return joined


def column_of(key: str, site: SavedSite, *, join: str, device: torch.device | None) -> Column[Any]:
    """Return the column in a file."""
    label = Label(key, site.names, Named(site.axes, site.sizes))
    if site.statistic is not None:
        statistic = moved_statistic(site.statistic, device)
        return StatisticColumn(label, statistic.empty(), ColumnOptions(), [statistic])
    column = JoinedColumn(label, join, ColumnOptions())
    if site.tensor is not None:
        with plain_mode():
            column.write([own(site.tensor, device=device)])
    if site.positions is not None:
        column.rows.where.append(site.positions.clone())
    return column
