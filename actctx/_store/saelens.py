"""Data sets as other libraries read and write them.

# NOTE [SAELens' directories]
SAELens caches activations in a directory of Hugging Face's `datasets`: a row is a run of `context`
tokens, and each hook has a column `Array2D((context, d))` beside `token_ids`. SAELens does not mind
where a sequence begins, so that any rows can be cut into runs. It reads the runs in their order and
mixes the rows of a buffer, `n_batches_in_buffer * context_size` of them, half of which it keeps: so
rows that are sorted stay so, but for that. Its dtypes are NumPy's, so there is no bfloat16.
"""

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from actctx._errors import DataError, OptionError
from actctx._files import cannot_write, expanded, local_path, refuse_existing, written_beside
from actctx._model.axes import hook_axes
from actctx._model.fingerprint import versions
from actctx._store.digests import Digest, digested, record_all
from actctx._store.layout import DIGEST, TAKEN, Layout
from actctx._store.libraries import import_datasets, import_lance
from actctx._store.loader import Loader
from actctx._store.rows import StoredBatch, StoredRows
from actctx._store.shuffle import shuffled
from actctx._store.site_columns import StoredSite, as_array, column_name, is_known_to_others
from actctx._store.validation import MOST_ELEMENTS, elements_of
from actctx._store.where import meant_sites
from actctx._text import counted, dtype_name, is_utf8, printable, shortened

if TYPE_CHECKING:
    import pyarrow as pa

_TOKENS = "token_ids"
_FILE = "data-00000-of-00001.arrow"
_UNFORMATTED: dict[str, Any] = {
    "_format_columns": None,
    "_format_kwargs": {},
    "_format_type": None,
    "_output_all_columns": False,
    "_split": None,
}


def write_saelens(
    rows: StoredRows,
    path: str | PathLike[str],
    *,
    context: int,
    rename: Mapping[str, str],
    seed: int | None,
) -> None:
    """Write rows as SAELens caches them; see `ActivationDataset.to_saelens`.

    Args:
        rows: What to write.
        path: Where to.
        context: The rows of a run.
        rename: The names of columns, by those of sites.
        seed: What the order depends on, if it is to be random.

    """
    datasets = import_datasets()
    runs = len(rows) // context
    if not runs:
        raise OptionError(
            f"context={context} does not fit {counted(len(rows), 'row')}; give the context_size of "
            "SAELens' config, and no more than there are rows"
        )
    names = _renamed(rows.sites, rename)
    place = local_path(path)
    refuse_existing(place)
    dtypes = {}
    for name, site in rows.sites.items():
        dtypes[name] = _writable(site)
    columns = {
        names[name]: datasets.Array2D(shape=(context, site.width), dtype=dtype_name(dtypes[name]))
        for name, site in rows.sites.items()
    }
    columns[_TOKENS] = datasets.Sequence(datasets.Value("int32"), length=context)
    features = datasets.Features(columns)
    with written_beside(place, directory=True) as partial:
        with datasets.arrow_writer.ArrowWriter(
            path=str(partial / _FILE), features=features
        ) as writer:
            batches = _runs(rows, runs, context=context, seed=seed)
            for table in _tables(
                batches, context=context, dtypes=dtypes, schema=features.arrow_schema
            ):
                writer.write_table(table)
            writer.finalize()
        datasets.DatasetInfo(features=features).write_to_directory(str(partial))
        state = {"_data_files": [{"filename": _FILE}], "_fingerprint": "actctx", **_UNFORMATTED}
        (partial / "state.json").write_text(json.dumps(state, indent=2))


def _renamed(sites: Mapping[str, StoredSite], rename: Mapping[str, str]) -> dict[str, str]:
    """Return the name of each site's column."""
    if not isinstance(rename, Mapping):
        raise OptionError(
            f"rename={rename!r} is not a dict; give SAELens' hook_name for sites, as in "
            "rename={'resid': 'blocks.3.hook_resid_post'}"
        )
    names = {name: name for name in sites}
    for name, new in rename.items():
        if not (isinstance(name, str) and isinstance(new, str) and new and is_utf8(new)):
            raise OptionError(
                f"rename has {new!r} for {name!r}, which are not both names; give strings"
            )
        found = meant_sites(sites, name)
        if len(found) != 1:
            what = "several sites that are read" if found else "not a site that is read"
            is_turned = not found and meant_sites(sites, new)
            first = "; give the site's own name first, then the new one" * bool(is_turned)
            raise OptionError(
                f"rename names {name!r}, which is {what}; the sites are "
                f"{shortened([repr(each) for each in sites])}{first}"
            )
        names[next(iter(found))] = new
    for name, count in Counter([_TOKENS, *names.values()]).items():
        if count > 1:
            raise OptionError(
                f"rename gives {count} columns the name {name!r}; give each a different name"
            )
    return names


def _writable(site: StoredSite) -> torch.dtype:
    """Choose the dtype that a site is written in."""
    dtype = site.torch_dtype
    if not dtype.is_floating_point:
        raise OptionError(
            f"SAELens trains on floating-point activations, but {site.name!r} is {site.dtype}; "
            "leave it out, with ActivationDataset(..., sites=)"
        )
    if is_known_to_others(dtype):
        return dtype
    times = {1: "four times", 2: "twice"}[dtype.itemsize]
    warnings.warn(
        f"SAELens' files do not support {site.dtype}: {site.name!r} is written as float32, which "
        f"has the same values and takes {times} the space",
        stacklevel=4,
    )
    return torch.float32


def _runs(rows: StoredRows, runs: int, *, context: int, seed: int | None) -> Iterator[StoredBatch]:
    """Read some runs at a time, in the order of the rows or in a random one."""
    rows = replace(rows, others={"token": rows.others["token"]})
    size = max(1, rows.at_once // context) * context
    if seed is None:
        for first in range(0, runs * context, size):
            yield rows.read(range(first, min(first + size, runs * context)))
        return
    order = shuffled(len(rows), size, seed=seed)
    for batch in Loader(rows, order, workers=1, device=None):
        whole = len(batch["token"]) // context * context
        if whole:
            yield {name: values[:whole] for name, values in batch.items()}


def _tables(
    batches: Iterator[StoredBatch],
    *,
    context: int,
    dtypes: Mapping[str, torch.dtype],
    schema: "pa.Schema",
) -> Iterator["pa.Table"]:
    import pyarrow as pa

    for batch in batches:
        columns = [
            _as_arrays(batch[name].to(dtype), field.type, context=context)
            for (name, dtype), field in zip(dtypes.items(), schema, strict=False)
        ]
        tokens = pa.FixedSizeListArray.from_arrays(pa.array(batch["token"].numpy()), context)
        yield pa.table([*columns, tokens], schema=schema)


def _as_arrays(values: Shaped[Tensor, "row ..."], kind: Any, *, context: int) -> "pa.Array":
    """Show `datasets` some runs as an `Array2D` column."""
    import pyarrow as pa

    lists = as_array(values)
    inner = pa.ListArray.from_arrays(
        np.arange(len(lists) + 1, dtype=np.int32) * lists.type.list_size, lists.flatten()
    )
    outer = pa.ListArray.from_arrays(np.arange(0, len(lists) + 1, context, dtype=np.int32), inner)
    return pa.ExtensionArray.from_storage(kind, outer)


def read_saelens(path: str | PathLike[str], out: str | PathLike[str]) -> None:
    """Write a data set of SAELens' rows; see `ActivationDataset.from_saelens`."""
    import pyarrow as pa

    import_lance()
    datasets = import_datasets()
    try:
        cached = datasets.load_from_disk(expanded(path))
    except IndexError:  # of datasets, where there is no file of rows
        raise _without_rows(path) from None
    except Exception as error:  # noqa: BLE001  it reads whatever JSON there is as its own
        found = str(error) if isinstance(error, OSError | ValueError) else repr(error)
        raise DataError(
            f"'{path}' is not a directory of SAELens' cached activations: {printable(found)}; give "
            "its new_cached_activations_path"
        ) from None
    features = cached.features if isinstance(cached, datasets.Dataset) else {}
    arrays = {name: kind for name, kind in features.items() if isinstance(kind, datasets.Array2D)}
    if not arrays:
        raise DataError(
            f"'{path}' does not contain activations as SAELens caches them, which are columns of "
            f"the type Array2D; its columns are {printable(', '.join(features))}"
        )
    _check_cached(path, runs=len(cached), arrays=arrays)
    address = expanded(out)
    is_local = "://" not in address
    if is_local:
        refuse_existing(Path(address))
    layout = Layout(
        model={"name": "", "class": "", "fingerprint": ""},
        sites=tuple(_site_of(name, kind) for name, kind in arrays.items()),
        rows="token",
        input={"from": "SAELens"},
        versions=versions(),
        finished=True,
    )
    schema = layout.schema(pa.schema([]))
    batches = _batches(cached.with_format("arrow"), layout, schema)
    if is_local:
        with written_beside(Path(address), directory=True) as partial:
            digests = {name: Digest() for name in schema.names}
            noted = digested(batches, digests)
            _write(noted, schema, address=str(partial), source=path)
            record_all(partial, digests, layout.as_metadata())
        return
    try:  # an object store, where what has no manifest is no data set
        _write(batches, schema, address=address, source=path)
    except DataError:
        raise
    except (ValueError, OSError) as error:
        raise cannot_write(address, error, "give another address") from error


def _without_rows(path: str | PathLike[str]) -> DataError:
    return DataError(
        f"'{path}' does not contain activations: its dataset has no rows; let SAELens cache some"
    )


def _check_cached(path: str | PathLike[str], *, runs: int, arrays: Mapping[str, Any]) -> None:
    """Refuse what makes no data set before anything is written."""
    if not runs:
        raise _without_rows(path)
    context = next(iter(arrays.values())).shape[0]
    for name, kind in arrays.items():
        sizes = [size for size in kind.shape if type(size) is int and 0 < size < MOST_ELEMENTS]
        if len(sizes) != 2 or sizes[0] != context:  # noqa: PLR2004  context and width
            raise DataError(
                f"'{path}' has activations of the shape {printable(kind.shape)} in its column "
                f"{name!r}, not runs of one context; let SAELens cache it again"
            )
    taken = next((name for name in arrays if name in TAKEN), None)
    if taken is not None:
        raise DataError(
            f"'{path}' has activations in a column {taken!r}, which is the name of another column "
            f"of a data set; give it the hook's name, with rename_column({taken!r}, ...) of "
            "datasets"
        )


def _write(
    batches: Iterator["pa.RecordBatch"],
    schema: "pa.Schema",
    *,
    address: str,
    source: str | PathLike[str],
) -> None:
    """Write a Lance dataset."""
    import pyarrow as pa

    failed: list[Exception] = []

    def noted() -> Iterator["pa.RecordBatch"]:
        try:
            yield from batches
        except Exception as error:
            failed.append(error)
            raise

    reader = pa.RecordBatchReader.from_batches(schema, noted())
    try:
        import_lance().write_dataset(reader, address, mode="create")
    except (ValueError, OSError):
        if not failed:
            raise
        raise DataError(
            f"'{source}' cannot be read whole: {printable(failed[0])}; let SAELens cache it again"
        ) from failed[0]


def _site_of(name: str, kind: Any) -> StoredSite:
    if kind.dtype not in {"float16", "float32"}:
        raise DataError(
            f"{name!r} is {kind.dtype} in SAELens' directory, whose activations are float32 "
            "or float16; cache it as one of them"
        )
    axes = (hook_axes(name, ()) or ())[2:]
    return StoredSite(
        name=name,
        column=column_name(name),
        hook=name,
        axes=axes if len(axes) == 1 else ("_",),  # SAELens flattens heads
        shape=(kind.shape[1],),
        dtype=kind.dtype,
    )


def _batches(cached: Any, layout: Layout, schema: "pa.Schema") -> Iterator["pa.RecordBatch"]:
    import pyarrow as pa

    context = cached.features[layout.sites[0].name].shape[0]
    some = max(1, 4096 // context)
    for first in range(0, len(cached), some):
        table = cached[first : first + some].combine_chunks()
        table.validate(full=True)
        runs = table.num_rows
        columns = {
            "token": _tokens(table, context),
            "sequence": pa.array(np.repeat(np.arange(first, first + runs), context)),
            "position": pa.array(np.tile(np.arange(context, dtype=np.int32), runs)),
            DIGEST: pa.array(np.zeros(runs * context, dtype=np.int64)),  # of no known input
        }
        for site in layout.sites:
            rows = _lists(site.name, table[site.name].combine_chunks().storage, context)
            values = _lists(site.name, rows, site.width)
            columns[site.column] = pa.FixedSizeListArray.from_arrays(values, site.width)
            elements_of(site.name, columns[site.column], site.arrow)  # which checks them
        yield layout.batch(columns, schema)


def _tokens(table: "pa.Table", context: int) -> "pa.Array":
    import pyarrow as pa

    if _TOKENS not in table.column_names:
        return pa.array(np.full(table.num_rows * context, -1, dtype=np.int32))
    return _lists(_TOKENS, table[_TOKENS].combine_chunks(), context).cast(pa.int32())


def _lists(name: str, column: "pa.Array", length: int) -> "pa.Array":
    """Join the lists of a column."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(column)
    if column.null_count or not pc.all(pc.equal(lengths, length)).as_py():
        raise ValueError(f"its column {name!r} has runs that are not of {length}")
    return column.flatten()
