"""Read whole numbers as users write them: options, and the rows that an index selects."""

import operator
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, SupportsIndex, TypeAlias, TypeGuard

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from actctx._errors import OptionError, SelectionError
from actctx._text import counted

Index: TypeAlias = (
    SupportsIndex | slice | Sequence[int] | Sequence[bool] | Shaped[Tensor, "..."] | np.ndarray
)


def is_int(index: object) -> TypeGuard[SupportsIndex]:
    """Return whether an index selects one row."""
    if isinstance(index, bool | np.bool_):
        return False
    if isinstance(index, Tensor) and (index.ndim or index.is_meta or index.dtype == torch.bool):
        return False
    if isinstance(index, np.ndarray) and index.ndim:
        return False
    try:
        operator.index(index)  # type: ignore[arg-type]  # that is the question
    except TypeError:
        return False
    return True


def whole_number(option: str, value: object, *, least: int) -> int:
    """Make sure that an option is a whole number, such as Python's or NumPy's.

    Raises:
        OptionError: It is not a whole number, or it is too small.

    """
    if not is_int(value):
        raise OptionError(f"{option}={value!r} is not an int; give {least} or more")
    number = operator.index(value)
    if number < least:
        raise OptionError(f"{option}={number} is too small; give {least} or more")
    return number


def rows_of(index: Index, rows: int) -> range | Int64[np.ndarray, "row"]:
    """Return the numbers of the rows that an index selects; those of a slice are a range.

    Raises:
        SelectionError: There is no such row, or a mask is of another length.
        OptionError: The index is nothing that selects rows.

    """
    if isinstance(index, str):
        raise OptionError(
            f"cannot select rows by {index!r}; data.read({index!r}) reads a column of all rows"
        )
    if isinstance(index, slice):
        try:
            return range(*index.indices(rows))
        except (TypeError, ValueError):
            raise OptionError(
                f"cannot select rows by {index!r}; give whole numbers, and no step of 0"
            ) from None
    if is_int(index):
        return _checked(np.array([operator.index(index)]), rows)
    return _checked(_several(index, rows), rows)


def _several(index: Any, rows: int) -> Shaped[np.ndarray, " row"]:
    array = np.empty(0, dtype=object)
    if not isinstance(index, np.ma.MaskedArray | bytearray):  # of which more would be taken
        with suppress(TypeError, ValueError, RuntimeError):  # the last of tensors without values
            array = np.asarray(index.cpu() if isinstance(index, Tensor) else index)
    if array.ndim == 1 and array.dtype == bool:
        if len(array) != rows:
            raise SelectionError(
                f"the mask is for {counted(len(array), 'row')}, but the data set has {rows}; give "
                "one entry for each"
            )
        return array.nonzero()[0]
    is_empty = array.shape == (0,) and array.dtype != object
    if array.ndim != 1 or not (is_empty or np.issubdtype(array.dtype, np.integer)):
        raise OptionError(
            f"cannot select rows by {index!r}; give a position, a slice, or a list, tensor or "
            "boolean mask of one axis"
        )
    return array.astype(np.int64) if is_empty else array


def _checked(found: Shaped[np.ndarray, " row"], rows: int) -> Int64[np.ndarray, "row"]:
    """Count from the start, once it is known that there are such rows: a cast makes others."""
    outside = (found < -rows) | (found >= rows)
    if outside.any():
        raise SelectionError(
            f"there is no row {found[outside][0]}: the data set has {counted(rows, 'row')}"
        )
    found = found.astype(np.int64)
    return np.where(found < 0, found + rows, found)
