"""Check what holds the inputs, and explain how to iterate over what cannot be iterated as it is."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actctx._errors import DataError


def check_container(data: Any) -> None:
    """Refuse what cannot be iterated, or would yield something other than inputs.

    Raises:
        DataError: It is one input, a table, a map-style data set, or no data at all.

    """
    if isinstance(data, Tensor) and (why := why_no_values(data)):
        raise DataError(f"data is a tensor {why}; give token ids as a plain tensor")
    kind = type(data).__name__
    if isinstance(data, type):
        raise DataError(f"data is the class {data.__name__!r}; give an instance of it")
    if hasattr(data, "iterrows"):  # of pandas
        raise DataError(
            "data is a table, and iterating over it yields the names of its columns; give its "
            "rows, data.to_dict('records')"
        )
    if rows := _rows_of(data):
        raise DataError(
            f"data is one {kind}, and iterating over it does not yield its rows; give {rows}"
        )
    is_one = isinstance(data, str | bytes | bytearray | memoryview | Mapping)
    if is_one or getattr(data, "ndim", None) == 0 or not hasattr(data, "__iter__"):
        raise DataError(f"data is one {kind}, not an iterable of inputs; give {_remedy(data)}")


def _rows_of(data: Any) -> str:
    """Say how to get the rows of an Arrow or Polars table; nothing for other data."""
    if hasattr(data, "iter_rows"):
        return "data.iter_rows(named=True)"
    if not type(data).__module__.startswith("pyarrow"):
        return ""
    if hasattr(data, "to_pylist"):
        return "data.to_pylist()"
    return "those of its batches, (row for batch in data for row in batch.to_pylist())"


def _remedy(data: Any) -> str:
    if isinstance(data, Mapping):
        return _remedy_of_mapping(data)
    if isinstance(data, bytes | bytearray | memoryview):
        return "texts, such as [data.decode()]"
    if isinstance(data, str):
        return "a list, such as [data]"
    if hasattr(data, "__getitem__") and getattr(data, "ndim", None) != 0:
        return "an iterable over it, such as torch.utils.data.DataLoader(data, batch_size=None)"
    return "a list of texts, or of sequences of token ids"


def _remedy_of_mapping(data: Mapping[Any, Any]) -> str:
    splits = [name for name, split in data.items() if hasattr(split, "column_names")]
    if splits:
        return f"one split, such as data[{splits[0]!r}]"
    texts = data.get("text")
    if isinstance(texts, Sequence) and not isinstance(texts, str):
        return "the texts, data['text']"
    return "a list, such as [data]"


def why_no_values(tensor: Tensor) -> str:
    """Explain why the values of a tensor cannot be read as numbers; nothing where they can."""
    if tensor.is_meta:
        return "on the meta device, which has no values"
    if tensor.is_nested:
        return "that is nested"
    if tensor.layout != torch.strided:
        return "that is sparse"
    return "that is quantized" if tensor.is_quantized else ""


def as_plain(values: Any) -> Any:
    """Return arrays as torch takes them: of this machine's byte order, and not backwards.

    Raises:
        DataError: Some of the values are masked, or a tensor has none that can be read.

    """
    if isinstance(values, np.ma.MaskedArray):
        raise DataError(
            "the input holds a masked array, but torch ignores its mask; give array.data, with an "
            "attention_mask"
        )
    if isinstance(values, Tensor) and (why := why_no_values(values)):
        raise DataError(f"the input holds a tensor {why}; give a plain tensor")
    if isinstance(values, np.ndarray) and values.dtype.kind in "iufb":
        return values.astype(values.dtype.newbyteorder("="), order="C", copy=False)
    if isinstance(values, np.ndarray) and values.dtype == object:
        return values.tolist()
    return values
