"""The layout of a data set on disk: the order of its columns, and its metadata."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from actctx._errors import DataError
from actctx._store.metadata import LaterError, from_json, read_json
from actctx._store.site_columns import StoredSite
from actctx._store.validation import check_columns, damaged, reading
from actctx._text import printable

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
"""The column that tells of what input a row is, which is not read; see `_extract/batching.py`."""

BACK = "_back"
"""The column that says where the texts of a row are; see `_store/texts.py`."""

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

_FIRST_DTYPES = {"float32", "float16", "bfloat16"}
"""Those of the first layout."""


@dataclass(frozen=True)
class Layout:
    """The metadata of a data set: what it holds, and where that comes from.

    Attributes:
        model: What is known of the model: `name`, `class` and `fingerprint`.
        sites: What it holds, in the order of its columns.
        rows: Whether a row is a `"token"` or a `"sequence"`.
        input: What decides which rows come: masks, what is dropped, the context.
        versions: The versions that wrote it.
        carried: The names of the columns that came with the input, such as labels.
        texts: Those of them that are stored once a sequence.
        finished: Whether the input was read to its end, or to the requested number of tokens.

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
                f"'{path}' is a Lance dataset, but not one of actctx: its schema has no metadata "
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
        """Check that its parts are consistent.

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
            raise ValueError(f"'texts' has {more[0]!r}, which is not in 'carried'")
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
                raise ValueError(f"two of its columns are named {twice!r}")

    def as_metadata(self) -> str:
        """Return the JSON text that is stored under `KEY`."""
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

    @staticmethod
    def batch(columns: Mapping[str, Any], schema: "pa.Schema") -> "pa.RecordBatch":
        """Put the columns of some rows, by name, in the order of a schema."""
        import pyarrow as pa

        arrays = [columns[name] for name in schema.names]
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

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
    """Return what a layout says, once it is known to be of a format that is read."""
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
        f"'{path}' was written by {by}, whose {what} this version cannot read; upgrade actctx to "
        "read it"
    )
