"""The layout of a data set on disk: its columns, its metadata, and tensors as their values.

# NOTE [Names of columns]
Lance allows no dot in the name of a column, and hook names are full of them. They are written with
slashes, `blocks/6/hook_resid_post`, and what would be mistaken then is escaped as in a URL. The
names that users know are in the metadata, and they never see the others.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from actctx._errors import DataError, OptionError
from actctx._model.axes import Axes
from actctx._store.validation import (
    MOST_ELEMENTS,
    LaterError,
    check_columns,
    damaged,
    elements_of,
    from_json,
    read_json,
    reading,
)
from actctx._text import dtype_name, printable

if TYPE_CHECKING:
    import pyarrow as pa

KEY = b"actctx"
"""The one key of the schema's metadata that is ours."""

FORMAT = 2
"""The version of the layout; a later one is not read.

The first had floating-point sites only, and texts in each row. What needs no more is written as
such, so that older versions of actctx read it.
"""

COUNTED = ("token", "sequence", "position")
"""The columns that say where a row comes from; see `extract`."""

DIGEST = "_input"
"""The column that tells of what input a row is, which is not read; see `_inputs.Batch.digests`."""

BACK = "_back"
"""The column that says where the texts of a row are; see `actctx/_store/texts.py`."""

_OF_LANCE = {
    "_rowid",
    "_rowaddr",
    "_rowoffset",
    "_row_created_at_version",
    "_row_last_updated_at_version",
}
"""The columns that Lance has of its own."""

TAKEN = {*COUNTED, DIGEST, BACK, *_OF_LANCE}
"""What neither a site nor what is carried can be called."""

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
_FIRST_DTYPES = {"float32", "float16", "bfloat16"}
"""Those of the first layout."""


def import_lance() -> Any:
    """Import Lance, which only data sets need.

    Raises:
        OptionError: It is not installed, or the process was forked from one that had used it.

    """
    try:
        import lance
        import lance.arrow  # by which Arrow knows the type of bfloat16
    except ModuleNotFoundError as error:
        raise not_installed(error) from None
    if _used_in() != os.getpid():
        raise OptionError(
            "data sets cannot be used in a process that was forked from one that had used them, "
            "since Lance's threads do not survive a fork; start it another way, such as "
            "multiprocessing.get_context('spawn')"
        )
    return lance


def not_installed(error: ModuleNotFoundError) -> OptionError:
    """Say which library of the extra for data sets is not installed."""
    return OptionError(
        f"data sets need {error.name}, which is not installed; install it with: "
        "pip install 'actctx[data]'"
    )


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
        return _list_type(self.torch_dtype, self.width)

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
        texts: Those of them that are stored once a sequence.
        finished: Whether the input came to its end, or to the number of tokens that was asked for.

    """

    model: Mapping[str, Any]
    sites: tuple[StoredSite, ...]
    rows: str
    input: Mapping[str, Any]
    versions: Mapping[str, str]
    carried: tuple[str, ...] = ()
    finished: bool = False
    texts: tuple[str, ...] = ()

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
        found = read_json(written)
        try:
            layout = from_json(cls, _of_format(found))
            layout.check()
        except LaterError as error:
            raise _later(path, error, found) from None
        there = {*schema.names}
        return replace(
            layout,
            sites=tuple(site for site in layout.sites if site.column in there),
            carried=tuple(name for name in layout.carried if name in there),
            texts=tuple(name for name in layout.texts if name in there),
        )

    def check(self) -> None:
        """Make sure that it makes sense by itself.

        Raises:
            ValueError: It does not.
            LaterError: A site is of a dtype that this version does not know.

        """
        for site in self.sites:
            site.check()
        for name in ("name", "class", "fingerprint"):
            if type(found := self.model.get(name)) is not str:
                raise ValueError(f"'model.{name}' is {found!r}, which is not text")
        if self.rows not in {"token", "sequence"}:
            raise ValueError(f"'rows' is {self.rows!r}, neither 'token' nor 'sequence'")
        if more := [name for name in self.texts if name not in self.carried]:
            raise ValueError(f"'texts' has {more[0]!r}, which 'carried' has not")
        order = self.input.get("batch_size")
        if order is not None and (type(order) is not int or order < 1):
            raise ValueError(f"'input.batch_size' is {order!r}, which is not a number of sequences")

    def check_columns(self, schema: "pa.Schema") -> None:
        """Compare it with the columns: their types and widths, and that no two are called alike.

        Raises:
            ValueError: A column is missing, or is another, or two have one name.

        """
        kinds, there = self.kinds(), {*schema.names, *COUNTED, *([BACK] if self.texts else [])}
        check_columns(schema, {name: kinds[name] for name in kinds if name in there})
        others = [*COUNTED, *self.hidden, *self.carried, *self.unlisted(schema)]
        for names in (
            [*others, *(site.column for site in self.sites)],
            [*others, *(site.name for site in self.sites)],
        ):
            if len({*names}) != len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise ValueError(f"two of its columns are called {twice!r}")

    def as_metadata(self) -> str:
        """Write it as the value of the metadata's one key."""
        said = asdict(self)
        is_first = {site.dtype for site in self.sites} <= _FIRST_DTYPES and not self.texts
        if not self.texts:
            del said["texts"]  # which older versions do not know
        return json.dumps({"format": 1 if is_first else FORMAT, **said})

    def schema(self, carried: "pa.Schema") -> "pa.Schema":
        """Make the schema of the data set, with the columns that came with the input."""
        import pyarrow as pa

        kinds = self.kinds()
        fields = [
            *(pa.field(name, kinds[name], nullable=False) for name in (*COUNTED, DIGEST)),
            *([pa.field(BACK, kinds[BACK], nullable=False)] if self.texts else []),
            *carried,
            *(pa.field(site.column, kinds[site.column]) for site in self.sites),
        ]
        return pa.schema(fields, metadata={KEY: self.as_metadata()})

    def kinds(self) -> "dict[str, pa.DataType]":
        """Return the types of the columns, but for those that came with the input."""
        import pyarrow as pa

        counted = zip(
            (*COUNTED, DIGEST), (pa.int32(), pa.int64(), pa.int32(), pa.int64()), strict=True
        )
        own: dict[str, pa.DataType] = {}
        if self.texts:
            own = {BACK: pa.int32(), **dict.fromkeys(self.texts, pa.string())}
        return {**dict(counted), **own, **{site.column: site.arrow for site in self.sites}}

    def columns(self, sites: Iterable[StoredSite]) -> dict[str, str]:
        """Name the columns that all rows must have, by their names on disk, if some sites are."""
        own = [*COUNTED, BACK] if self.texts else COUNTED
        return {**{name: name for name in own}, **{site.column: site.name for site in sites}}

    def unlisted(self, schema: "pa.Schema") -> list[str]:
        """Name the columns that somebody else added."""
        known = {*COUNTED, *self.hidden, *self.carried, *(site.column for site in self.sites)}
        return [name for name in schema.names if name not in known]

    @property
    def hidden(self) -> set[str]:
        """The columns that users do not see."""
        return {DIGEST, BACK} if self.texts else {DIGEST}

    def as_finished(self, *, finished: bool = True) -> "Layout":
        """Return it with the note that no more rows are to come."""
        return replace(self, finished=finished)


def layout_of(dataset: Any, path: str) -> Layout:
    """Read what a Lance dataset says of itself.

    Raises:
        DataError: It was not written by `extract`, or by a later version of it, or is damaged.

    """
    try:
        with reading(path):
            schema = dataset.schema
        layout = Layout.of(schema, path)
    except DataError:
        raise
    except ValueError as error:
        raise damaged(path, f"its metadata 'actctx' is damaged ({error})") from error
    try:
        layout.check_columns(schema)
    except ValueError as error:
        raise damaged(path, str(error)) from error
    return layout


def _of_format(found: dict[str, Any]) -> dict[str, Any]:
    """Return what a layout says, once it is known to be of a format that is read.

    Raises:
        ValueError: It is of none.
        LaterError: It is of a later one.

    """
    number = found.get("format")
    if type(number) is not int or number < 1:
        raise ValueError(f"'format' is {number!r}")
    if number > FORMAT:
        raise LaterError("layout")
    return {name: each for name, each in found.items() if name != "format"}


def _later(path: object, what: LaterError, found: dict[str, Any]) -> DataError:
    versions = found.get("versions")
    version = versions.get("actctx") if isinstance(versions, dict) else None
    by = f"actctx {printable(version)}" if isinstance(version, str) else "a later actctx"
    return DataError(
        f"'{path}' was written by {by}, whose {what} this version does not know; upgrade actctx to "
        "read it"
    )


def column_name(name: str) -> str:
    """Write a name without dots and backticks, so that no two names are written alike."""
    escaped = name.replace("%", "%25").replace("/", "%2F").replace("`", "%60")
    return escaped.replace(".", "/")


@lru_cache
def _list_type(dtype: torch.dtype, width: int) -> "pa.FixedSizeListType":
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
            f"{name!r} leaves rows of the shape {tuple(values.shape[1:])}, in which there is "
            "nothing; give a slice that selects something"
        )
    if values.dtype in _ARROW:
        return
    if not values.dtype.is_floating_point:
        raise OptionError(not_held(name, values.dtype))
    raise OptionError(
        f"{name!r} yields {dtype_name(values.dtype)}, which a data set does not hold; give "
        f"dtype= {', '.join(map(str, _ADVISED[:-1]))} or {_ADVISED[-1]}"
    )


def not_held(name: str, dtype: torch.dtype) -> str:
    """Explain why a site that yields complex numbers, or the like, leaves no rows."""
    # dtype= would not help, since it casts floating-point activations only.
    return (
        f"{name!r} yields {dtype_name(dtype)}, but a data set holds floating-point numbers, bools, "
        "and integers of up to 64 bits with a sign, or 8 without; leave the site out, or keep it "
        "in memory with capture()"
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
