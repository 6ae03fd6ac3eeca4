"""Tensors of several forwards, firing by firing: functions shared by columns of tensors."""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from actctx._errors import OptionError
from actctx._results.annotations import Sizes, spec_of
from actctx._results.column import ColumnOptions
from actctx._results.label import Label
from actctx._results.sketch import sketch
from actctx._results.table import Row
from actctx._select.own import Owned, TokenRows, own, plain_mode
from actctx._select.values import why_not_moved
from actctx._text import dtype_name

Chunks = deque[Owned]
"""The tensors of one firing, a chunk for each forward."""


def chunk_of(
    selected: Tensor, rows: TokenRows | None, options: ColumnOptions, *, copied: bool
) -> Owned:
    """Make an owned tensor of a selection."""
    owned = own(selected, copied=copied, dtype=options.dtype, device=options.device)
    return owned if rows is None else owned._replace(rows=rows)


def add_chunks(firings: list[Chunks], stages: Sequence[Owned]) -> int:
    """Append the tensors of a forward, and count their bytes on the host."""
    if len(stages) == len(firings) == 1:  # a shortcut for the usual case
        value = stages[0].value
        firings[0].append(stages[0])
        return value.nbytes if value.is_cpu else 0
    kept = 0
    for number, chunk in enumerate(stages):
        if number == len(firings):
            firings.append(deque())
        firings[number].append(chunk)
        if chunk.value.is_cpu:
            kept += chunk.value.nbytes
    return kept


def bytes_of(firings: list[Chunks]) -> int:
    """Count the bytes of all tensors."""
    return sum(chunk.value.nbytes for chunks in firings for chunk in chunks)


def wait_for(chunk: Owned) -> Tensor:
    """Return a captured tensor once its copy to the host has arrived."""
    if chunk.ready is not None:
        chunk.ready.synchronize()
    return chunk.value


def wait_for_all(firings: list[Chunks]) -> None:
    """Replace tensors by their arrived copies."""
    for chunks in firings:
        for _ in range(len(chunks)):
            chunks.append(Owned(wait_for(chunks.popleft())))


def copied_chunks(firings: list[Chunks]) -> list[Chunks]:
    """Copy all tensors."""
    return _mapped(firings, lambda chunk: Owned(wait_for(chunk).clone()))


def moved_chunks(
    firings: list[Chunks], device: torch.device | None, dtype: torch.dtype | None
) -> list[Chunks]:
    """Copy all tensors to a device or a dtype.

    Raises:
        OptionError: torch cannot cast or move one of them.

    """

    def moved(chunk: Owned) -> Owned:
        if why := why_not_moved(chunk.value, dtype, device):
            raise OptionError(f"captured tensors cannot be copied {why}")
        return own(wait_for(chunk), dtype=dtype, device=device)

    return _mapped(firings, moved)


def _mapped(firings: list[Chunks], change: Callable[[Owned], Owned]) -> list[Chunks]:
    with plain_mode():
        return [deque(map(change, chunks)) for chunks in firings]


def spec_of_chunks(label: Label, firings: list[Chunks], sizes: Sizes) -> type:
    """Return the annotation of tensors with these fixed sizes."""
    return spec_of(firings[0][0].value.dtype, label.settle(), sizes)


def row_of(label: Label, firings: list[Chunks], *, shape: str, nbytes: int, drawn: bool) -> Row:
    """Describe tensors for the table."""
    chunks = itertools.chain.from_iterable(firings) if drawn else ()
    first = firings[0][0].value
    several = f" ({len(firings)} firings)" if len(firings) > 1 else ""
    return Row(
        site=label.key + several,
        axes=" ".join(label.axes),
        shape=shape,
        dtype=dtype_name(first.dtype),
        device=str(first.device),
        nbytes=nbytes,
        values=sketch([wait_for(chunk) for chunk in chunks]),
    )


def shapes_of(chunks: Chunks) -> str:
    """Describe the shapes of tensors that are not joined."""
    shapes = [str(tuple(chunk.value.shape)) for chunk in chunks]
    alike = len(set(shapes)) == 1
    return f"{len(shapes)} x {shapes[0]}" if alike else f"a list of {len(shapes)}"


def are_one(label: Label, firings: list[Chunks], read: Callable[[int], Any]) -> bool:
    """Return whether firings are one tensor: there is only one, or all are equal."""
    if len(firings) == 1:
        return True
    if not label.repeats or not firings or any(each.value.requires_grad for each in firings[0]):
        return False
    first, *others = map(read, range(len(firings)))
    return all(_is_equal(first, other) for other in others)


def _is_equal(first: Any, second: Any) -> bool:
    """Return whether two tensors, or two lists of them, have the same values; NaN equals NaN."""
    if isinstance(first, list):
        return len(first) == len(second) and all(map(_is_equal, first, second))
    alike = first.shape == second.shape and first.dtype == second.dtype
    return alike and torch.allclose(first, second, rtol=0, atol=0, equal_nan=True)
