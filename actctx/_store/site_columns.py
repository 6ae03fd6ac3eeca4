"""The column of a site on disk: its name, its type, and tensors as its values.

# NOTE [Names of columns]
Lance allows no dot in the name of a column, and hook names are full of them. They are written with
slashes, `blocks/6/hook_resid_post`, and what would be mistaken then is escaped as in a URL. The
names that users know are in the metadata, and they never see the others.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from actctx._errors import OptionError
from actctx._model.axes import Axes
from actctx._store.metadata import LaterError
from actctx._store.validation import MOST_ELEMENTS, elements_of
from actctx._text import dtype_name

if TYPE_CHECKING:
    import pyarrow as pa

FLOAT8 = frozenset(
    {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}
)
"""The dtypes of eight bits, for which Arrow has none; their bits are written as uint8."""

_ARROW = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.int16: "int16",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.bool: "bool_",
    **dict.fromkeys(FLOAT8, "uint8"),
}
"""The dtypes that a data set holds, and the Arrow types of their elements."""

_ADVISED = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StoredSite:
    """What a data set holds of one site.

    Attributes:
        name: The name that it is read under.
        column: The name of its column on disk, with slashes for dots, as in `blocks/6/hook_out`.
        hook: The name that the model itself gives the place.
        axes: The axes of a row, such as `("head", "d_head")`.
        shape: Their sizes, in elements.
        dtype: The dtype, as in `float16`.
        slice: What was selected along the axes of an activation, as in `token -1, axis 2 [0, 3]`;
            selections that are equal are written alike.
        names: All names that the place answers to in the model.
        taken: Which tensor of the place: `out` or `in`, the output, the firing, as in
            `out 1, firing 0`.

    """

    name: str
    column: str
    hook: str
    axes: Axes
    shape: tuple[int, ...]
    dtype: str
    slice: str = "None"
    names: tuple[str, ...] = ()
    taken: str = "out"

    @property
    def width(self) -> int:
        """The number of elements of a row."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the tensors that are read."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def nbytes(self) -> int:
        """The bytes of a row."""
        return self.width * self.torch_dtype.itemsize

    @property
    def arrow(self) -> "pa.FixedSizeListType":
        """The Arrow type of its column."""
        return list_type(self.torch_dtype, self.width)

    def check(self) -> None:
        """Make sure that there can be such rows.

        Raises:
            ValueError: There cannot.
            LaterError: They are of a dtype that this version does not know.

        """
        if not self.name or not self.column:
            raise ValueError(f"the site {self.name!r} has no name, or no column")
        if self.dtype not in map(dtype_name, _ARROW):
            raise LaterError(f"dtype {self.dtype!r} of {self.name!r}")
        if any(size <= 0 for size in self.shape) or self.width >= MOST_ELEMENTS:
            raise ValueError(f"{self.name!r} has the shape {self.shape}, which no row has")
        if len(self.axes) != len(self.shape):
            raise ValueError(
                f"{self.name!r} has the axes {' '.join(self.axes)!r}, but the shape {self.shape}"
            )


def column_name(name: str) -> str:
    """Write a name without dots and backticks, so that no two names are written alike."""
    escaped = name.replace("%", "%25").replace("/", "%2F").replace("`", "%60")
    return escaped.replace(".", "/")


@lru_cache
def list_type(dtype: torch.dtype, width: int) -> "pa.FixedSizeListType":
    import pyarrow as pa

    return pa.list_(value_type(dtype), width)


def value_type(dtype: torch.dtype) -> Any:
    """Return the Arrow type of an element."""
    import pyarrow as pa

    if dtype == torch.bfloat16:
        from lance.arrow import BFloat16Type

        return BFloat16Type()
    return getattr(pa, _ARROW[dtype])()


def is_known_to_others(dtype: torch.dtype) -> bool:
    """Return whether Lance and NumPy know the values of a dtype, and not only their bits."""
    return dtype != torch.bfloat16 and dtype not in FLOAT8


def check_rows(name: str, values: Shaped[Tensor, "row ..."]) -> None:
    """Refuse rows that a data set does not hold.

    Raises:
        OptionError: They are of another dtype, or there is nothing in them.

    """
    if not values.shape[1:].numel():
        raise OptionError(
            f"{name!r} has empty rows of the shape {tuple(values.shape[1:])}; give a slice that "
            "selects something"
        )
    if values.dtype in _ARROW:
        return
    if not values.dtype.is_floating_point:
        raise OptionError(not_held(name, values.dtype))
    raise OptionError(
        f"{name!r} yields {dtype_name(values.dtype)}, which a data set cannot store; give dtype= "
        f"{', '.join(map(str, _ADVISED[:-1]))} or {_ADVISED[-1]}"
    )


def not_held(name: str, dtype: torch.dtype) -> str:
    """Explain why a site that yields complex numbers, or the like, leaves no rows."""
    # dtype= would not help, since it casts floating-point activations only.
    return (
        f"{name!r} yields {dtype_name(dtype)}, but a data set stores floating-point numbers, "
        "bools, signed integers of up to 64 bits, and unsigned ones of 8 bits; leave the site "
        "out, or keep it in memory with capture()"
    )


def as_array(values: Shaped[Tensor, "row ..."]) -> "pa.FixedSizeListArray":
    """Show Arrow a tensor as a column, a row for each of its own; only bools are copied.

    Args:
        values: A contiguous tensor on the CPU, of a dtype that a data set holds. Whoever has the
            column keeps its memory.

    """
    import pyarrow as pa

    flat = values.reshape(-1)
    kind = value_type(flat.dtype)
    if flat.dtype == torch.bool:  # of which Arrow packs eight into a byte
        elements = pa.array(flat.numpy())
    else:
        storage = pa.binary(2) if flat.dtype == torch.bfloat16 else kind
        buffer = pa.py_buffer(_bits(flat).numpy())
        elements = pa.Array.from_buffers(storage, flat.numel(), [None, buffer])
    if flat.dtype == torch.bfloat16:
        elements = pa.ExtensionArray.from_storage(kind, elements)
    return pa.FixedSizeListArray.from_arrays(elements, values.shape[1:].numel())


def as_tensor(
    column: "pa.FixedSizeListArray | pa.ChunkedArray", site: StoredSite
) -> Shaped[Tensor, "row ..."]:
    """Show torch a column of a site in its shape; what lies in several chunks is copied, and bools.

    The tensor shares the column's memory, which must not be written to.

    Raises:
        ValueError: The column is not of the site's type, or has nulls; see `elements_of`.

    """
    import numpy as np

    rows, dtype = len(column), site.torch_dtype
    elements = elements_of(site.column, column, site.arrow)
    if not rows:
        return torch.empty((0, *site.shape), dtype=dtype)
    if dtype == torch.bool:
        unpacked = elements.to_numpy(zero_copy_only=False)
        return torch.from_numpy(unpacked).view(rows, *site.shape)
    bits = _Bytes(elements.buffers()[1], elements.offset * dtype.itemsize, rows * site.nbytes)
    return torch.from_numpy(np.asarray(bits)).view(dtype).view(rows, *site.shape)


def _bits(flat: Shaped[Tensor, " _"]) -> Shaped[Tensor, " _"]:
    """Show the bits of what NumPy has no dtype for as integers."""
    if flat.dtype == torch.bfloat16:
        return flat.view(torch.int16)
    return flat.view(torch.uint8) if flat.dtype in FLOAT8 else flat


class _Bytes:
    """Bytes of Arrow's as NumPy wants them to be shown.

    Arrow says of all its buffers that they cannot be written to, of which torch would warn.
    """

    def __init__(self, buffer: "pa.Buffer", start: int, nbytes: int) -> None:
        self._buffer = buffer
        self.__array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (buffer.address + start, False),
        }
