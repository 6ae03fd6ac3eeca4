"""The ways to read the rows of a data set in shuffled batches."""

import atexit
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.ways.models import PLAIN, Setup
from benchmarks.ways.way import Run, Table, Way

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 4096
NAME = "resid"
_CHUNK = 8192
_BASE = 2048  # up to which float16 holds every integer


def _rows(first: int, end: int, width: int) -> Tensor:
    """Draw rows whose numbers can be read from their ends."""
    chance = torch.Generator().manual_seed(first)
    rows = torch.randn(end - first, width, generator=chance).half()
    number = torch.arange(first, end)
    rows[:, 0], rows[:, -1] = number // _BASE, number % _BASE
    return rows


def _chunks(rows: int, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    for first in range(0, rows, _CHUNK):
        end = min(first + _CHUNK, rows)
        yield torch.arange(first, end, dtype=torch.int32), _rows(first, end, width)


def _write_lance(path: Path, rows: int, width: int) -> None:
    import lance
    import pyarrow as pa

    from actctx._store.layout import Layout
    from actctx._store.site_columns import StoredSite, as_array

    layout = Layout(
        model={"name": "", "class": "", "fingerprint": ""},
        sites=(StoredSite(NAME, NAME, NAME, ("d_model",), (width,), "float16"),),
        rows="token",
        input={},
        versions={},
        finished=True,
    )
    schema = layout.schema(pa.schema([]))

    def batches() -> Iterator["pa.RecordBatch"]:
        for number, resid in _chunks(rows, width):
            narrow, wide = number.numpy(), number.long().numpy()
            counted = [narrow, wide, narrow, wide]
            yield pa.record_batch([*map(pa.array, counted), as_array(resid)], schema=schema)

    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), str(path))


def _write_datasets(path: Path, rows: int, width: int) -> None:
    import pyarrow as pa
    from datasets import Features, Sequence, Value
    from datasets.arrow_writer import ArrowWriter

    from actctx._store.site_columns import as_array

    features = Features({"token": Value("int32"), NAME: Sequence(Value("float16"), length=width)})
    with ArrowWriter(path=str(path), features=features) as writer:
        for number, resid in _chunks(rows, width):
            columns = [pa.array(number.numpy()), as_array(resid)]
            writer.write_table(pa.table(columns, schema=features.arrow_schema))
        writer.finalize()


def _write_safetensors(path: Path, rows: int, width: int) -> None:
    from safetensors.torch import save_file

    token, resid = map(torch.cat, zip(*_chunks(rows, width), strict=True))
    save_file({"token": token, NAME: resid}, path)


@cache
def _stored(write: Callable[[Path, int, int], None], rows: int, width: int) -> Path:
    """Write rows that are read many times, and deleted at the end of the process."""
    folder = Path(tempfile.mkdtemp(prefix="actctx-load-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    write(folder / "rows", rows, width)
    return folder / "rows"


def _by_loader(path: Path, *, permuted: bool) -> Iterator[Tensor]:
    """Read with the loader, shuffled by default, or permuted row by row like the others."""
    from actctx.dataset import ActivationDataset

    data = ActivationDataset(path)
    for batch in data.loader(BATCH, pool=len(data) if permuted else None):
        yield batch[NAME]


def _by_datasets(path: Path, *, at_once: bool, workers: int) -> Iterator[Tensor]:
    """Read with a shuffled `DataLoader`: row by row, or a batch at once."""
    from datasets import Dataset
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler

    stored: Any = Dataset.from_file(str(path))
    stored = stored.with_format("torch", columns=[NAME], dtype=torch.float16)
    loader: Iterable[Any] = DataLoader(stored, batch_size=BATCH, shuffle=True, num_workers=workers)
    if at_once:
        sampler = BatchSampler(RandomSampler(stored), BATCH, drop_last=False)
        loader = DataLoader(stored, sampler=sampler, batch_size=None, num_workers=workers)
    with warnings.catch_warnings():  # the worker reads only this file
        warnings.filterwarnings("ignore", "lance is not fork-safe")
        batches = iter(loader)
    for batch in batches:
        yield batch[NAME]


def _by_mapping(path: Path) -> Iterator[Tensor]:
    from safetensors.torch import load_file

    stored = load_file(path)
    for rows in torch.split(torch.randperm(len(stored["token"])), BATCH):
        yield stored[NAME][rows]


def _seen(batches: Iterable[Tensor]) -> Tensor:
    """Return what identifies the rows of all batches, in the order of the file."""
    ends = torch.cat([batch[:, [0, batch.shape[1] // 2, -1]] for batch in batches])
    return ends[(ends[:, 0].long() * _BASE + ends[:, -1].long()).argsort()]


def _reading(
    write: Callable[[Path, int, int], None], read: Callable[[Path], Iterator[Tensor]]
) -> tuple[Run, Callable[[Setup], object]]:
    """Read one row per token; they are written before anything is measured."""

    def run(model: Any, tokens: Tensor) -> Tensor:
        return _seen(read(_stored(write, tokens.numel(), model.config.hidden_size)))

    def prepare(setup: Setup) -> None:
        _stored(write, setup.batch * setup.batches * setup.tokens, setup.d_model)

    return run, prepare


def _ways() -> Iterator[Way]:
    for name, title, write, read in (
        (
            "loader",
            f"**`data.loader({BATCH})`**, shuffled in pools",
            _write_lance,
            partial(_by_loader, permuted=False),
        ),
        (
            "loader-permuted",
            f"**`data.loader({BATCH}, pool=len(data))`**, permuted as the others",
            _write_lance,
            partial(_by_loader, permuted=True),
        ),
        (
            "datasets",
            "`datasets`, `with_format('torch')`, a `DataLoader` of whole batches",
            _write_datasets,
            partial(_by_datasets, at_once=True, workers=0),
        ),
        (
            "datasets-worker",
            "the same, read ahead by a worker",
            _write_datasets,
            partial(_by_datasets, at_once=True, workers=1),
        ),
        (
            "datasets-rows",
            "`datasets`, a `DataLoader` of rows",
            _write_datasets,
            partial(_by_datasets, at_once=False, workers=0),
        ),
        ("safetensors", "safetensors, mapped: the limit", _write_safetensors, _by_mapping),
    ):
        run, prepare = _reading(write, read)
        yield Way(f"load-{name}", title, run, "load-safetensors", PLAIN, prepare=prepare)


LOAD_TABLE = Table(
    "load",
    f"rows of float16 from disk, in shuffled batches of {BATCH}",
    tuple(_ways()),
    setup=Setup(batch=200, tokens=1000, layers=1, vocab=1000),
    rounds=3,
    to_disk=True,
    needs=("lance", "datasets"),
)
