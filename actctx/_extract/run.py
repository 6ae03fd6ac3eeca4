"""Run a plan: forwards in the caller's thread, reading and writing in threads beside it.

# NOTE [Memory]
Beside the model and a forward there are, at most: a few batches of token ids that were read ahead,
a window of single sequences that are sorted together, the rows of `_WAITING` forwards that wait to
be written, and what Lance holds of the file that it is writing, some 8 MiB a column and 100 MiB in
all. None of it grows with the data set.
"""

import contextlib
import threading
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from jaxtyping import Int64
from torch import Tensor

from actctx._capture.watched import WatchedSite, why_silent
from actctx._errors import DataError, NeverFiredError, SeveralFiringsError
from actctx._extract.batching import Batch, with_padding_behind
from actctx._extract.compatibility import taken_of
from actctx._extract.context_length import Positions
from actctx._extract.inputs import Reader
from actctx._extract.leaks import LoneSequence, one_alone
from actctx._extract.pipe import Pipe
from actctx._extract.plan import COUNTED_BYTES, ExtractionPlan
from actctx._extract.progress import add_note_of_rows, advance
from actctx._extract.resume import Remainder
from actctx._extract.room import Room
from actctx._extract.row_choice import Work, pool_rows
from actctx._extract.run_model import RunModel
from actctx._extract.value_checks import ValueChecks
from actctx._extract.writer import Outcome, Writer, carried_array
from actctx._model.known_faults import warn
from actctx._model.offloaded import input_device
from actctx._model.places import uncompiled
from actctx._results.activations import Activations
from actctx._results.chunks import wait_for
from actctx._select.own import Owned
from actctx._store.contents import Contents
from actctx._store.destination import Destination
from actctx._store.progress import progress_bar
from actctx._store.site_columns import StoredSite, check_rows, column_name
from actctx._text import dtype_name, shortened

_READ_AHEAD = 4
"""The batches that wait to be run, at most."""


class Tally(NamedTuple):
    """What a run came to; see `Extracted`."""

    row_count: int
    cut: int = 0
    empty: int = 0


def run(
    plan: ExtractionPlan,
    data: Iterable[Any],
    destination: Destination,
    *,
    most: int | None,
    progress: bool,
    whole: Contents | None = None,
) -> Tally:
    """Run what is not on disk yet, and write it.

    Args:
        plan: The extraction.
        data: The input.
        destination: Where to write.
        most: The number of rows to stop at.
        progress: Whether a progress bar is shown.
        whole: The data set that sites are added to, whose rows the input must leave.

    Raises:
        DataError: See `extract`.

    """
    path, before = destination.path, destination.row_count
    if most is not None and before > most:
        raise DataError(
            f"'{path}' has {before} rows, more than max_tokens={most}; give "
            f"max_tokens={before} or more, or another path"
        )
    reader, there = plan.reader, whole or destination.contents
    if there is not None:
        reader = replace(reader, ordered_as=there.layout.input.get("batch_size"))
    remainder = Remainder(
        reader, plan.row_choice, plan.model, destination.contents, whole=whole, most=most
    )
    expected = remainder.count(data)
    room = Room(path, row_count=before, expected=expected, is_copied=whole is not None)
    pipe: Pipe[Work] = Pipe(_READ_AHEAD)
    thread = threading.Thread(
        target=_read, args=(remainder.works(data), pipe), name="actctx reader", daemon=True
    )
    thread.start()
    try:
        bar_of = progress_bar(
            shown=progress,
            name=path.name,
            total=expected,
            initial=before,
            unit=f" {plan.facts.layout.rows}s",
        )
        with plan.capture as acts, bar_of as bar:
            row_bytes = plan.row_bytes()
            if row_bytes is not None:
                room.check(row_bytes, bar)
            forwards = _Run(plan, reader, destination, acts, room=room, bar=bar)
            contents = forwards.run(pipe, whole)
    except BaseException as error:
        add_note_of_rows(error, path, destination.row_count)
        raise
    finally:
        pipe.abandon()
        thread.join(timeout=1)  # it may be waiting for an input that never comes
    contents.record_finished(finished=True)
    return Tally(contents.row_count, forwards.cut, forwards.empty)


def _read(works: Iterable[Work], pipe: Pipe[Work]) -> None:
    try:
        for work in works:
            if not pipe.put(work):
                return
    except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
        pipe.close(error)
    else:
        pipe.close()


class _Run:
    """The forwards of one run.

    Args:
        plan: The extraction.
        reader: Reads the input.
        destination: Where to write.
        acts: What is captured.
        room: Checks that the rows fit on the disk.
        bar: The progress bar.

    Attributes:
        cut: The tokens that were cut off the ends of the sequences that ran so far.
        empty: The sequences that left no rows so far.

    """

    def __init__(
        self,
        plan: ExtractionPlan,
        reader: Reader,
        destination: Destination,
        acts: Activations,
        *,
        room: Room,
        bar: Any,
    ) -> None:
        self.cut = self.empty = 0
        self._plan, self._reader, self._acts = plan, reader, acts
        self._destination = destination
        self._room, self._bar = room, bar
        self._run_model = RunModel(plan.model, plan.facts.layout.model)
        self._device = input_device(plan.model)
        self._widest = reader.limit or 0
        self._is_compared = False

    def run(self, works: Iterable[Work], whole: Contents | None) -> Contents:
        """Run all forwards.

        Returns:
            The data set.

        """
        writer, checks = None, ValueChecks(self._plan.sites, finite=self._plan.finite)
        contents, is_sliced_away = self._destination.contents, False
        try:
            for work in works:
                self.empty += work.empty
                is_sliced_away |= work.is_sliced_away
                if not len(work.token):
                    continue
                outcome = self._forward(work)
                if writer is None:
                    contents = self._begin(outcome, whole)
                    writer = Writer(contents, finite=self._plan.finite, seen=checks.see)
                self._acts.clear()
                if not writer.put(outcome):
                    break
                del outcome
                checks.tell()
                advance(self._bar, len(work.token))
        finally:
            if writer is not None:
                writer.close()
        if writer is not None and writer.error is not None:
            raise writer.error
        checks.tell(ended=True)
        if contents is None:
            reason = "it has no sequences, or all of its tokens are padding or dropped; keep some"
            if is_sliced_away:
                reason = "slice= selects none of the remaining tokens; give another"
            raise DataError(f"the input leaves no rows: {reason}")
        return contents

    def _forward(self, work: Work) -> Outcome:
        batch, where = with_padding_behind(work.batch, work.where)
        # Who is not told of padding was warned of it.
        is_compared = self._is_compared or not self._reader.is_told(batch)
        alone = None if is_compared else one_alone(batch, where)
        apart = {} if alone is None else self._run_alone(alone)
        with self._run_model.forward():
            self._run_batch(batch, where)
        activations = self._activations()
        if alone is not None:
            together = {name: wait_for(own) for name, own in activations.items()}
            alone.compare(together, apart, self._plan.dtype)
        if self._plan.pooling is not None and work.pooled is not None:
            activations = self._pooled(activations, work.pooled, self._plan.pooling)
        self.cut += batch.cut
        if self._acts.forwards > 1:
            raise DataError(
                f"the model ran {self._acts.forwards} forwards for one batch, whose rows would be "
                "mixed; give the module that runs once"
            )
        return Outcome(work, activations)

    def _run_batch(self, batch: Batch, where: Int64[Tensor, "token 2"]) -> None:
        """Run a batch; if it is longer than any before it, check the positions it looks up."""
        count, width = batch.tokens.shape
        self._plan.chosen.choose(where, (count, width))
        given = {
            name: value.to(self._device) if isinstance(value, Tensor) else value
            for name, value in batch.given.items()
        }
        model, is_longer = self._plan.model, width > self._widest
        with Positions(model, batch) if is_longer else contextlib.nullcontext():
            model(batch.tokens.to(self._device), **{**self._reader.always, **given})
        self._widest = max(width, self._widest)

    def _run_alone(self, alone: LoneSequence) -> dict[str, Tensor]:
        """Run one sequence by itself; nothing is left of it if that fails."""
        self._is_compared = True
        try:
            self._run_batch(alone.batch, alone.where)
            return {name: wait_for(own) for name, own in self._activations().items()}
        except Exception:  # noqa: BLE001  what the batch itself does is what counts
            return {}
        finally:
            self._acts.clear()

    def _activations(self) -> dict[str, Owned]:
        """Return what each site left of the forward."""
        try:
            return {name: self._acts.single(name).firings[0][0] for name in self._acts}
        except SeveralFiringsError as error:
            raise SeveralFiringsError(
                f"{error.args[0].partition(';')[0]}; a row has one of them: give Site(..., "
                "firing=0) for the first"
            ) from None

    def _pooled(
        self, activations: dict[str, Owned], pooled: Int64[Tensor, " token"], how: str
    ) -> dict[str, Owned]:
        return {
            site.key: Owned(
                pool_rows(
                    site.key,
                    wait_for(activations[site.key]),
                    pooled,
                    how=how,
                    dtype=site.dtype,
                    loss=site.cast_loss,
                )
            )
            for site in self._plan.sites
            if site.key in activations
        }

    def _begin(self, outcome: Outcome, whole: Contents | None) -> Contents:
        """Settle what a row holds, as the first forward tells, before anything is written."""
        self._check_fired(outcome)
        facts, contents = self._plan.facts, self._destination.contents
        sites = tuple(
            self._stored(site, outcome.activations[site.key])
            for site in self._plan.sites
            if site.key in outcome.activations
        )
        there = whole or contents
        if there is not None:
            facts.check_hooks(there, self._run_model.changing)
        if contents is not None:
            facts.check_sites(contents, sites)
            warn(facts.on_batch_size(contents, self._reader))
        row_bytes = sum(site.nbytes for site in sites) + COUNTED_BYTES
        self._room.check(row_bytes, self._bar)
        if contents is None:
            contents = self._create(outcome.work, sites)
        else:
            contents.tidy()
            contents.record_finished(finished=False)
        self._bar.row_bytes = row_bytes
        return contents

    def _create(self, work: Work, sites: tuple[StoredSite, ...]) -> Contents:
        import pyarrow as pa

        kinds = [pa.field(name, carried_array(name, work).type) for name in self._reader.carry]
        texts = tuple(each.name for each in kinds if pa.types.is_string(each.type))
        described = self._run_model.described
        layout = replace(self._plan.facts.layout, model=described, sites=sites, texts=texts)
        return self._destination.create(layout, pa.schema(kinds))

    def _check_fired(self, outcome: Outcome) -> None:
        """Say which site never fired, and why."""
        self._plan.capture.check_fired()
        if not outcome.activations:
            sites = self._plan.sites
            names = shortened([site.shown for site in sites])
            reason = why_silent(uncompiled(self._plan.model), sites[0])
            raise NeverFiredError(f"{names} never fired in 1 forward: {reason}")

    def _stored(self, site: WatchedSite, owned: Owned) -> StoredSite:
        check_rows(site.key, owned.value)
        return StoredSite(
            name=site.key,
            column=column_name(site.key),
            hook=site.place.name,
            names=site.place.names,
            axes=self._acts.axes(site.key)[1:],
            shape=tuple(owned.value.shape[1:]),
            dtype=dtype_name(owned.value.dtype),
            slice=self._plan.facts.slices[site.key],
            taken=taken_of(site),
        )
