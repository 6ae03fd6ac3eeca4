"""Statistics of the rows of a data set, which are read some at a time."""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from actctx._stats.statistic import JointStatistic, Observation, Statistic
from actctx._stats.topk import TopK
from actctx._store.loader import Loader
from actctx._store.progress import progress_bar
from actctx._store.rows import StoredBatch, StoredRows
from actctx._store.shuffle import Order

_CELLS = 2**20
"""The tokens of a table of sequences by positions, at most, unless one sequence has more."""
ORIGIN = ("token", "sequence", "position")
"""The columns that tell where a row is from."""


def reduce_rows(
    rows: StoredRows,
    statistics: Mapping[str, Statistic] | JointStatistic,
    *,
    axis: str,
    device: torch.device | str | None,
    progress: bool,
) -> None:
    """Update statistics with all rows, in their order.

    Args:
        rows: The rows, with the sites to read and the columns that say where rows come from.
        statistics: One for each site, or one for all.
        axis: What a row is: `"token"` or `"batch"`.
        device: Where it is computed.
        progress: Whether a bar is shown.

    """
    around = 0
    if not isinstance(statistics, JointStatistic):
        around = max(
            (each._context for each in statistics.values() if isinstance(each, TopK)), default=0
        )
    total, size = len(rows), rows.at_once
    with progress_bar(shown=progress, name="reduce", total=total, unit=" rows", initial=0) as bar:
        for number, batch in enumerate(_batches(rows, size, device)):
            first = number * size
            count = min(size, total - first)
            numbers = np.arange(first, first + count)
            known = axis == "token" and _knows(batch)
            parts = _with_tokens(rows, batch, numbers, around) if known else [(slice(None), {})]
            for part, tokens in parts:
                observed = {
                    name: Observation(
                        values=batch[name][part],
                        axes=(axis, *site.axes),
                        site=name,
                        number=number,
                        **_where(batch, part, (axis, *site.axes), batch[name].shape),
                        **tokens,
                    )
                    for name, site in rows.sites.items()
                }
                if isinstance(statistics, JointStatistic):
                    statistics.update_all(observed)
                else:
                    for name, each in statistics.items():
                        each.update(observed[name])
            bar.update(count)


def _batches(
    rows: StoredRows, size: int, device: torch.device | str | None
) -> Iterator[StoredBatch]:
    """Read rows in their order, some ahead."""
    order = Order(
        rows=len(rows),
        batch_size=size,
        pool=4,
        shuffle=False,
        drop_last=False,
        rank=0,
        world_size=1,
        seed=0,
        epoch=0,
    )
    yield from Loader(rows, order, workers=1, device=device)


def _where(
    batch: StoredBatch, part: slice, axes: tuple[str, ...], shape: torch.Size
) -> dict[str, Any]:
    """Return the sequence and the position of each row, as far as they are known."""
    found = {
        name: batch[name][part].long()
        for name in ("sequence", "position")
        if isinstance(batch.get(name), Tensor)
    }
    for dim, axis in enumerate(axes):
        if axis in {"pos", "query"}:  # of rows of sequences, whose positions are selected
            found.pop("position", None)
            found = {
                name: each.unsqueeze(-1).expand(*each.shape, shape[dim])
                for name, each in found.items()
            }
    return found


def _knows(batch: StoredBatch) -> bool:
    """Return whether it is known which token each row is of, and where it is."""
    return all(isinstance(batch.get(name), Tensor) and len(batch[name]) for name in ORIGIN)


def _with_tokens(
    rows: StoredRows, batch: StoredBatch, numbers: Int64[np.ndarray, " row"], around: int
) -> Iterator[tuple[slice, dict[str, Any]]]:
    """Divide a batch so that the tokens of each part, and those around, fit into a small table."""
    found = {name: batch[name].cpu().numpy().astype(np.int64) for name in ORIGIN}
    for part in _parts(found["sequence"], found["position"], around):
        near = {name: each[part] for name, each in found.items()}
        if around:
            near = _near(rows, numbers[part], near, around)
        yield part, _table(near)


def _table(found: dict[str, Int64[np.ndarray, " row"]]) -> dict[str, Any]:
    """Put tokens into a table of sequences by positions; -1 where there is none."""
    first_sequence, first_position = int(found["sequence"].min()), int(found["position"].min())
    rows, places = found["sequence"] - first_sequence, found["position"] - first_position
    ids = torch.full((int(rows.max()) + 1, int(places.max()) + 1), -1)
    ids[torch.from_numpy(rows), torch.from_numpy(places)] = torch.from_numpy(found["token"])
    return {"tokens": ids, "first_sequence": first_sequence, "first_position": first_position}


def _parts(
    sequence: Int64[np.ndarray, " row"], position: Int64[np.ndarray, " row"], around: int
) -> Iterator[slice]:
    """Divide rows between sequences, so that a table of the sequences of a part is small."""
    edges = [0, *(np.flatnonzero(np.diff(sequence)) + 1), len(sequence)]
    begin, least, most, deepest, highest = 0, 0, 0, 0, 0
    for start, end in pairwise(edges):
        number = int(sequence[start])
        low, high = int(position[start:end].min()), int(position[start:end].max())
        if start == begin:
            least = most = number
            deepest, highest = low, high
            continue
        bounds = min(least, number), max(most, number), min(deepest, low), max(highest, high)
        wide = bounds[3] - bounds[2] + 1 + 2 * around
        if (bounds[1] - bounds[0] + 1) * wide > _CELLS:
            yield slice(begin, start)
            begin, bounds = start, (number, number, low, high)
        least, most, deepest, highest = bounds
    yield slice(begin, len(sequence))


def _near(
    rows: StoredRows,
    numbers: Int64[np.ndarray, " row"],
    own: dict[str, Int64[np.ndarray, " row"]],
    around: int,
) -> dict[str, Int64[np.ndarray, " near"]]:
    """Read where rows and those beside them come from, also those that a condition leaves out."""
    on_disk = numbers if rows.matching is None else rows.matching[numbers]
    every = StoredRows(rows.path, rows.version, {}, {name: rows.others[name] for name in ORIGIN})
    beside = np.unique(on_disk[:, None] + np.arange(-around, around + 1))
    read = every.read(beside[(beside >= 0) & (beside < len(every))])
    found = {name: read[name].numpy().astype(np.int64) for name in ORIGIN}
    is_near = np.isin(found["sequence"], own["sequence"])
    is_near &= found["position"] >= own["position"].min() - around
    is_near &= found["position"] <= own["position"].max() + around
    return {name: each[is_near] for name, each in found.items()}
