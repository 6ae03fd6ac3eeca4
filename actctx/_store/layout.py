"""The layout of a data set on disk: its columns, its metadata, and tensors as their values.

# NOTE [Names of columns]
Lance allows no dot in the name of a column, and hook names are full of them. They are written with
slashes, `blocks/6/hook_resid_post`, and what would be mistaken then is escaped as in a URL. The
names that users know are in the metadata, and they never see the others.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from actctx._errors import DataError, OptionError
from actctx._files import reason_of
from actctx._model.axes import Axes
from actctx._text import dtype_name

if TYPE_CHECKING:
    import pyarrow as pa

KEY = b"actctx"
"""The one key of the schema's metadata that is ours."""

FORMAT = 1
"""The version of the layout; a later one is not read."""

COUNTED = ("token", "sequence", "position")
"""The columns that say where a row comes from; see `extract`."""

DIGEST = "_input"
"""The column that tells of what input a row is, which is not read; see `_inputs.Batch.digests`."""

_OF_LANCE = {
    "_rowid",
    "_rowaddr",
    "_rowoffset",
    "_row_created_at_version",
    "_row_last_updated_at_version",
}
"""The columns that Lance has of its own."""

TAKEN = {*COUNTED, DIGEST, *_OF_LANCE}
"""What neither a site nor what is carried can be called."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def import_lance() -> Any:
    """Import Lance, which only data sets need.

    Raises:
        OptionError: It is not installed, or the process was forked from one that had used it.

    """
    try:
        import lance
    except ModuleNotFoundError as error:
        raise OptionError(
            f"data sets need {error.name}, which is not installed; install it with: "
            "pip install 'actctx[data]'"
        ) from None
    if _used_in() != os.getpid():
        raise OptionError(
            "data sets cannot be used in a process that was forked from one that had used them, "
            "since Lance's threads do not survive a fork; start it another way, such as "
            "multiprocessing.get_context('spawn')"
        )
    return lance


@cache
def _used_in() -> int:
    """Tell in which process Lance was used first; one that is forked from it knows as well."""
    return os.getpid()


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
        return torch.Size(self.shape).numel()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the tensors that are read."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def nbytes(self) -> int:
        """The bytes of a row."""
        return self.width * self.torch_dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """What a data set says about itself.

    Attributes:
        model: What is known of the model: `name`, `class` and `fingerprint`.
        sites: What it holds, in the order of its columns.
        rows: Whether a row is a `"token"` or a `"sequence"`.
        input: What decides which rows come: masks, what is dropped, the context.
        versions: The versions that wrote it.
        carried: The names of the columns that came with the input, such as labels.
        finished: Whether the input came to its end, or to the number of tokens that was asked for.

    """

    model: Mapping[str, Any]
    sites: tuple[StoredSite, ...]
    rows: str
    input: Mapping[str, Any]
    versions: Mapping[str, str]
    carried: tuple[str, ...] = ()
    finished: bool = False

    @classmethod
    def of(cls, schema: "pa.Schema", path: object) -> "Layout":
        """Read what the schema of a data set says.

        Sites whose columns are not there yet are left out; see the note on adding.

        Raises:
            DataError: It was not written by `extract`, or by a later version of it.

        """
        written = (schema.metadata or {}).get(KEY)
        if written is None:
            raise DataError(
                f"'{path}' is a Lance dataset, but none of actctx: its schema has no metadata "
                "'actctx'; give the path that extract() wrote to"
            )
        found = json.loads(written)
        if found.pop("format") != FORMAT:
            version = found["versions"]["actctx"]
            raise DataError(
                f"'{path}' was written by actctx {version}, whose layout this version does not "
                "know; upgrade actctx to read it"
            )
        sites = tuple(
            StoredSite(**{name: _hashable(value) for name, value in site.items()})
            for site in found.pop("sites")
            if site["column"] in schema.names
        )
        return cls(**{**found, "sites": sites, "carried": tuple(found["carried"])})

    def as_metadata(self) -> str:
        """Write it as the value of the metadata's one key."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    def schema(self, carried: "pa.Schema") -> "pa.Schema":
        """Make the schema of the data set, with the columns that came with the input."""
        import pyarrow as pa

        counted = zip(
            (*COUNTED, DIGEST), (pa.int32(), pa.int64(), pa.int32(), pa.int64()), strict=True
        )
        fields = [
            *(pa.field(name, kind, nullable=False) for name, kind in counted),
            *carried,
            *(
                pa.field(site.column, pa.list_(value_type(site.torch_dtype), site.width))
                for site in self.sites
            ),
        ]
        return pa.schema(fields, metadata={KEY: self.as_metadata()})

    def unlisted(self, schema: "pa.Schema") -> list[str]:
        """Name the columns that somebody else added."""
        known = {*COUNTED, DIGEST, *self.carried, *(site.column for site in self.sites)}
        return [name for name in schema.names if name not in known]

    def as_finished(self, *, finished: bool = True) -> "Layout":
        """Return it with the note that no more rows are to come."""
        return replace(self, finished=finished)


def open_lance(path: str, version: int | None = None) -> Any:
    """Open a Lance dataset.

    Raises:
        DataError: There is none, or its manifest is damaged.

    """
    lance = import_lance()
    if "://" not in path and (found := _why_none(Path(path))):
        raise DataError(
            f"no data set can be read from {path!r}: {found}; give the path that extract() wrote to"
        )
    try:
        opened = lance.dataset(path, version=version)
        _ = opened.schema  # which is read from the manifest as well
    except BaseException as error:
        if isinstance(error, Exception):
            raise _damaged(path, reason_of(error)) from None
        if type(error).__name__ != "PanicException":  # Lance's, of some damage
            raise
        raise _damaged(path, f"its manifest is damaged ({error})") from None
    return opened


def _why_none(path: Path) -> str:
    """Say why there is no data set at a path; nothing where there may be one."""
    try:
        if (path / "_versions").is_dir():
            return ""
        if not path.exists():
            return "there is nothing"
        return "the directory holds none" if path.is_dir() else "it is a file"
    except OSError as error:
        return reason_of(error)


def layout_of(schema: "pa.Schema", path: str) -> Layout:
    """Read what the schema of a data set says.

    Raises:
        DataError: It was not written by `extract`, or by a later version of it, or is damaged.

    """
    try:
        return Layout.of(schema, path)
    except DataError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise _damaged(path, f"its metadata 'actctx' is damaged ({error})") from error


def _damaged(path: str, found: str) -> DataError:
    return DataError(
        f"the data set at {path!r} cannot be read: {found}; put a copy of it in its place, or give "
        "another path"
    )


def unreadable(path: str, error: BaseException) -> DataError:
    """Say why rows of a data set that is there cannot be read."""
    return DataError(
        f"rows of {path!r} cannot be read: {reason_of(error)}; open it again, since another "
        "process may have replaced its files, or write it anew"
    )


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def column_name(name: str) -> str:
    """Write a name without dots and backticks, so that no two names are written alike."""
    escaped = name.replace("%", "%25").replace("/", "%2F").replace("`", "%60")
    return escaped.replace(".", "/")


def value_type(dtype: torch.dtype) -> Any:
    """Return the Arrow type of an element."""
    import pyarrow as pa

    if dtype == torch.bfloat16:
        from lance.arrow import BFloat16Type

        return BFloat16Type()
    return pa.float16() if dtype == torch.float16 else pa.float32()


def check_rows(name: str, values: Shaped[Tensor, "row ..."]) -> None:
    """Refuse rows that a data set does not hold.

    Raises:
        OptionError: They are of another dtype, or there is nothing in them.

    """
    if not values.shape[1:].numel():
        raise OptionError(
            f"{name!r} leaves rows of the shape {tuple(values.shape[1:])}, in which there is "
            "nothing; give a slice that selects something"
        )
    if not values.dtype.is_floating_point:
        raise OptionError(not_floating_point(name, values.dtype))
    if values.dtype not in _DTYPES:
        raise OptionError(
            f"{name!r} yields {dtype_name(values.dtype)}, which a data set does not hold; give "
            f"dtype= {', '.join(map(str, _DTYPES[:-1]))} or {_DTYPES[-1]}"
        )


def not_floating_point(name: str, dtype: torch.dtype) -> str:
    """Say why a site that yields integers, bools or complex numbers leaves no rows."""
    # dtype= would not help, since it casts floating-point activations only.
    return (
        f"{name!r} yields {dtype_name(dtype)}, but a data set holds floating-point activations; "
        "leave the site out, or keep it in memory with capture()"
    )


def as_array(values: Shaped[Tensor, "row ..."]) -> "pa.FixedSizeListArray":
    """Show Arrow a tensor as a column, a row for each of its own; nothing is copied.

    Args:
        values: A contiguous tensor on the CPU, of a dtype that a data set holds. Whoever has the
            column keeps its memory.

    """
    import pyarrow as pa

    flat = values.reshape(-1)
    same_bits = flat.view(torch.int16) if flat.dtype == torch.bfloat16 else flat
    buffer = pa.py_buffer(same_bits.numpy())
    kind = value_type(flat.dtype)
    storage = pa.binary(2) if flat.dtype == torch.bfloat16 else kind
    elements = pa.Array.from_buffers(storage, flat.numel(), [None, buffer])
    if flat.dtype == torch.bfloat16:
        elements = pa.ExtensionArray.from_storage(kind, elements)
    return pa.FixedSizeListArray.from_arrays(elements, values.shape[1:].numel())


def as_tensor(
    column: "pa.FixedSizeListArray | pa.ChunkedArray", site: StoredSite
) -> Shaped[Tensor, "row ..."]:
    """Show torch a column of a site in its shape; only what lies in several chunks is copied.

    The tensor shares the column's memory, which must not be written to.
    """
    import numpy as np
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    rows, dtype = len(column), site.torch_dtype
    if not rows:
        return torch.empty((0, *site.shape), dtype=dtype)
    elements = column.flatten()  # of a window on a larger column, only what is in it
    if isinstance(elements, pa.ExtensionArray):
        elements = elements.storage
    bits = _Bytes(elements.buffers()[1], elements.offset * dtype.itemsize, rows * site.nbytes)
    return torch.from_numpy(np.asarray(bits)).view(dtype).view(rows, *site.shape)


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
