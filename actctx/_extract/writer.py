"""Write rows to disk in a thread: whole commits, one writer at a time.

# NOTE [Commits]
Lance streams rows into a file of its own, and makes them part of the data set in one step, by a new
manifest. A commit is made of `_COMMIT_BYTES`, or of what came in `_COMMIT_SECONDS`, also where
nothing more comes. Once a hundredth of the time that has passed is more, it is as long: over weeks
a crash costs a hundredth of the work at most, and slow rows make no file a minute.
What a crash leaves is a file that no manifest knows, which the next writer deletes.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from actctx._errors import DataError
from actctx._extract.pipe import STEP_SECONDS, Pipe
from actctx._extract.row_choice import Work
from actctx._results.chunks import wait_for
from actctx._select.own import Owned
from actctx._store.contents import Contents, unwritable
from actctx._store.layout import BACK, COUNTED, DIGEST
from actctx._store.site_columns import FLOAT8, StoredSite, as_array
from actctx._store.texts import once_a_sequence, rows_back
from actctx._text import counted, dtype_name

if TYPE_CHECKING:
    import pyarrow as pa

_COMMIT_BYTES = 2**28
_COMMIT_SECONDS = 60.0
_WAITING = 4
"""The forwards whose rows wait to be written, at most."""


class Outcome(NamedTuple):
    """What one forward left: its rows, and the activations of each site."""

    work: Work
    activations: dict[str, Owned]


class Writer:
    """Writes what forwards leave, in a thread, while others run.

    Args:
        contents: The data set.
        finite: Whether NaN and infinite values are refused.
        seen: Looks at the rows of each site, and their tokens.

    Attributes:
        error: What ended the writing, if something did.

    """

    def __init__(
        self,
        contents: Contents,
        *,
        finite: bool,
        seen: Callable[[str, Shaped[Tensor, "row ..."], Int[Tensor, " row"]], None],
    ) -> None:
        self._contents, self._seen = contents, seen
        self._finite = finite
        self._pipe: Pipe[Outcome] = Pipe(_WAITING)
        self._taken = contents.row_count
        self._begun = time.monotonic()
        self.error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="actctx writer", daemon=True)
        contents.closing = self.close
        contents.marks.begin()
        self._thread.start()

    def put(self, outcome: Outcome) -> bool:
        """Hand over what a forward left, once there is room.

        Returns:
            Whether it will be written; not after an error.

        """
        return self._pipe.put(outcome)

    def close(self) -> None:
        """Write the rest, and wait until it is on disk.

        An interrupt is raised after that: if the lock were released while a thread writes, the next
        writer would write the same rows.
        """
        interrupt: BaseException | None = None
        while self._thread.ident is not None and not self._ended.is_set():
            try:
                self._pipe.close()
                self._ended.wait(STEP_SECONDS)  # a join that was interrupted takes it for ended
            except BaseException as error:  # noqa: BLE001  raised again below
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _run(self) -> None:
        try:
            while (first := self._next()) is not None:
                self._contents.append(self._commit(first))
                self._contents.marks.save()
        except OSError as error:
            self.error = self.error or unwritable(
                self._contents.path, error, self._contents.row_count
            )
            self.error.__cause__ = error
        except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
            self.error = self.error or error
        finally:
            self._pipe.abandon()
            self._ended.set()

    def _next(self, timeout: float | None = None) -> "pa.RecordBatch | None":
        """Turn what comes next into a batch; None where nothing came in time, or nothing will.

        An error is the end, so that what came before is committed.
        """
        outcome = None if self.error is not None else self._pipe.take(timeout)
        if outcome is None:
            return None
        try:
            batch = self._batch(outcome, self._taken)
        except Exception as error:  # noqa: BLE001  as above
            self.error = error
            return None
        self._taken += batch.num_rows
        self._contents.marks.reach(outcome.work.mark)
        return batch

    def _commit(self, first: "pa.RecordBatch") -> Iterator["pa.RecordBatch"]:
        now = time.monotonic()
        nbytes, end = first.nbytes, now + commit_seconds(now - self._begun)
        yield first
        del first
        while nbytes < _COMMIT_BYTES and (left := end - time.monotonic()) > 0:
            batch = self._next(left)
            if batch is None:
                return
            nbytes += batch.nbytes
            yield batch

    def _batch(self, outcome: Outcome, before: int) -> "pa.RecordBatch":
        import pyarrow as pa

        work, layout, schema = outcome.work, self._contents.layout, self._contents.schema
        columns = {name: pa.array(getattr(work, name).numpy()) for name in COUNTED}
        columns[DIGEST] = pa.array(work.digest.numpy())
        within = work.within.numpy()
        back = rows_back(within)
        if layout.texts:
            columns[BACK] = back
        for name in layout.carried:
            values = carried_array(name, work, kind=schema.field(name).type)
            is_text = name in layout.texts
            columns[name] = (
                once_a_sequence(values, within, back)
                if is_text
                else _each_row(name, values, within)
            )
        for site in layout.sites:
            values = _alike(site, outcome, before)
            if self._finite:
                _check_finite(site.name, values, work, before)
            self._seen(site.name, values, work.token)
            columns[site.column] = as_array(values)
        return layout.batch(columns, schema)


def _each_row(name: str, values: Any, within: Any) -> Any:
    """Repeat for each row what its sequence carries."""
    import pyarrow as pa

    try:
        return values.take(pa.array(within))
    except pa.ArrowInvalid:  # of texts, which older versions wrote to each row
        raise DataError(
            f"carry names {name!r}, whose values take more than 2 GiB in the rows of one forward, "
            "since an older version of actctx started this data set; give another path, where "
            "texts are stored once per sequence"
        ) from None


def commit_seconds(elapsed: float) -> float:
    """Return how long a commit waits for more, so many seconds after the first rows."""
    return max(_COMMIT_SECONDS, elapsed / 100)


def _alike(site: StoredSite, outcome: Outcome, before: int) -> Shaped[Tensor, "row ..."]:
    """Return the rows of a site, which must have the shape and dtype of those before."""
    if site.name not in outcome.activations:
        raise DataError(
            f"{site.name!r} did not fire in the forward after row {before}, so its rows would be "
            "missing; leave it out"
        )
    values = wait_for(outcome.activations[site.name])
    shape, dtype = tuple(values.shape[1:]), dtype_name(values.dtype)
    if (shape, dtype) != (site.shape, site.dtype):
        raise DataError(
            f"{site.name!r} has rows of {dtype} {shape} from row {before} on, but those before are "
            f"{site.dtype} {site.shape}; give input of one length, or select what is alike with "
            "slice="
        )
    return values


def carried_array(name: str, work: Work, *, kind: Any = None) -> Any:
    """Make a column of what came along with sequences.

    Raises:
        DataError: It is of several types.

    """
    import pyarrow as pa

    values = work.batch.carried[name]
    try:
        found = pa.array(values)
        if kind is not None and pa.types.is_integer(found.type) and pa.types.is_floating(kind):
            found = found.cast(kind)  # of ints that a float holds exactly
    except (pa.ArrowException, UnicodeEncodeError) as error:  # of half a surrogate pair
        raise DataError(
            f"carry names {name!r}, whose values cannot form a column: {error}; give ints, floats, "
            "bools or strings, of one type throughout"
        ) from None
    if isinstance(found, pa.ChunkedArray):
        raise DataError(
            f"carry names {name!r}, whose values take more than 2 GiB in a batch of "
            f"{counted(len(values), 'sequence')}; give a smaller batch_size="
        )
    if kind is not None and found.type != kind:
        raise DataError(
            f"carry names {name!r}, whose values were {kind} so far, but are {found.type} in "
            f"sequence {int(work.batch.sequences[0])} of the input or after it; give values of "
            "one type throughout"
        )
    return found


def _check_finite(name: str, values: Shaped[Tensor, "row ..."], work: Work, before: int) -> None:
    """Refuse NaN and infinite values, and those beyond the range of eight bits."""
    if not values.numel() or not values.dtype.is_floating_point:
        return
    dtype = values.dtype
    if dtype in FLOAT8:  # of which torch does not tell
        values = values.float()
        values = values.where(values.abs() < torch.finfo(dtype).max, values * math.inf)
    if all(map(torch.isfinite, torch.aminmax(values))):
        return
    values = values.reshape(len(values), -1)  # a row may be one number, without an axis
    at = int((~torch.isfinite(values)).any(1).nonzero()[0])
    found = values[at][~torch.isfinite(values[at])][0]
    raise DataError(
        f"{name!r} is {_shown(found, dtype)} in row {before + at}: token {int(work.token[at])} of "
        f"sequence {int(work.sequence[at])}, position {int(work.position[at])}; "
        f"{_remedy(found, dtype)}finite=False writes it as it is"
    )


def _shown(found: Tensor, dtype: torch.dtype) -> str:
    if dtype in FLOAT8 and bool(found.isinf()):
        return f"{math.copysign(torch.finfo(dtype).max, float(found)):g} or beyond"
    return f"{float(found)}"


def _remedy(found: Tensor, dtype: torch.dtype) -> str:
    if dtype in FLOAT8:  # some of which take nan for what is beyond their end
        end = torch.finfo(dtype).max
        return f"{dtype_name(dtype)} ends at {end:g}, but dtype=torch.bfloat16 has a larger range; "
    if dtype == torch.float16 and bool(found.isinf()):
        return "float16 ends at 65504, but dtype=torch.bfloat16 has a larger range; "
    return ""
