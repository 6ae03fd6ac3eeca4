"""One extraction: forwards in the caller's thread, reading and writing in threads beside it.

# NOTE [Memory]
Beside the model and a forward there are, at most: a few batches of token ids that were read ahead,
a window of single sequences that are sorted together, the rows of `_WAITING` forwards that wait to
be written, and what Lance holds of the file that it is writing, some 8 MiB a column and 100 MiB in
all. None of it grows with the data set.
"""

import contextlib
import logging
import math
import shutil
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from actctx._capture.capture import Capture
from actctx._capture.watched import WatchedSite, why_silent
from actctx._errors import DataError, NeverFiredError, OptionError, SeveralFiringsError
from actctx._extract.batching import Batch, with_padding_behind
from actctx._extract.compatibility import Facts, picks_of, slice_of, taken_of
from actctx._extract.context_length import Positions
from actctx._extract.decoder_sites import check_sides
from actctx._extract.inputs import Reading
from actctx._extract.leaks import Alone, one_alone
from actctx._extract.pipe import Pipe
from actctx._extract.progress import count_on, progress_bar, tell_what_is_kept
from actctx._extract.reader import Reader
from actctx._extract.row_choice import Choosing, Work, pool_rows
from actctx._extract.run_model import RunModel
from actctx._extract.value_checks import ValueChecks
from actctx._extract.writer import Left, Writer, carried_array
from actctx._model.axes import axis_sizes
from actctx._model.fingerprint import versions
from actctx._model.known_faults import warn
from actctx._model.offloaded import input_device
from actctx._model.places import uncompiled
from actctx._results.activations import Activations
from actctx._results.chunks import wait_for
from actctx._select.cast_loss import loss_of
from actctx._select.own import Owned
from actctx._select.padding import Chosen
from actctx._select.slices import Selector
from actctx._store.destination import Target
from actctx._store.layout import TAKEN, Layout
from actctx._store.site_columns import StoredSite, check_rows, column_name
from actctx._text import dtype_name, format_bytes, is_utf8, shortened

_LOG = logging.getLogger("actctx")
_READ_AHEAD = 4
"""The batches that wait to be run, at most."""
_COUNTED_BYTES = 24
"""What a row takes beside its sites: its token, sequence, position, and a digest of its input."""


class Extraction:
    """One extraction: what is run, and what is kept of it.

    Args:
        model: The model.
        capturing: What is captured, with `chosen` for its mask.
        chosen: The rows to keep of each forward.
        reading: How the input is read.
        drop: The tokens and positions that leave no rows.
        pool: How the rows of a sequence are joined; None where they are not.
        finite: Whether values that are no numbers, or infinite, are refused.

    Attributes:
        facts: What a data set must have in common with it.
        cut: The tokens that were cut off the ends of the sequences that ran so far.
        empty: The sequences that left no rows so far.

    Raises:
        OptionError: The sites do not leave the same rows, or have names that are taken.

    """

    def __init__(
        self,
        model: nn.Module,
        capturing: Capture[Any],
        *,
        chosen: Chosen,
        reading: Reading,
        drop: Mapping[str, list[int]],
        pool: str | None,
        finite: bool,
    ) -> None:
        self._model = model
        self._capturing = capturing
        self._chosen = chosen
        self._reading = reading
        self._expected: int | None = None
        self._is_planned = False
        self._against: Target | None = None
        self._finite = finite
        self._pool = pool
        self.cut = self.empty = 0
        self._sites = capturing.sites
        self._has_sliced_away = False
        self._widest = reading.limit or 0
        self._is_compared = False
        self._run_model = RunModel(model)
        self._device = torch.device("cpu")
        self._dtype = next((each.dtype for each in model.parameters()), torch.float32)
        check_sides(model, self._sites)
        self._check_names()
        slices = {site.key: slice_of(site) for site in self._sites}
        tokens, is_sequence = self._tokens_of_all()
        self._choosing = Choosing(
            tokens=tokens,
            dropped={
                name: torch.tensor(numbers, dtype=torch.long, device="cpu")
                for name, numbers in drop.items()
            },
            pools=pool is not None,
        )
        self._layout = Layout(
            model=self._run_model.described,
            sites=(),
            rows="sequence" if is_sequence or pool else "token",
            input={
                "context": reading.context,
                "pack": reading.pack,
                "batch_size": reading.batch_size,
                "equal_lengths": reading.equal_lengths,
                "tokenizer": reading.tokenizer,
                "mask": reading.mask,
                "pool": pool,
                "drop": dict(drop),
            },
            versions=versions(),
            carried=reading.carry,
        )
        self.facts = Facts(self._layout, self._sites, slices)

    def _check_names(self) -> None:
        names = [*self._reading.carry, *(site.key for site in self._sites)]
        for name in names:
            if not name or not is_utf8(name):
                raise OptionError(
                    f"a column needs a name, which {name!r} is not; give the site an alias, as in "
                    "{'resid': ...}"
                )
            if name in TAKEN or names.count(name) > 1:
                raise OptionError(
                    f"{name!r} is the name of another column; give the site an alias, as in "
                    "{'resid': ...}, or rename what is carried"
                )

    def _tokens_of_all(self) -> tuple[Selector, bool]:
        """Return what all sites select along the tokens, which is applied before the forward."""
        first = self._sites[0]
        assert first.rows is not None  # noqa: S101  as there is a mask
        for site in self._sites:
            if site.rows is None or picks_of(site.rows.tokens) != picks_of(first.rows.tokens):
                raise OptionError(
                    f"{site.shown} selects other positions than {first.shown}, but they are to "
                    "have the same rows; give them one slice along 'pos', or a data set each"
                )
        self._sites = [
            replace(
                site,
                rows=site.rows._replace(tokens=Selector(site.key, (), None)),
                cast_loss=loss_of(site.dtype),
            )
            for site in self._sites
            if site.rows is not None
        ]
        watched = self._sites
        if self._pool is not None:  # what is pooled is cast afterwards
            watched = [replace(site, dtype=None, cast_loss=None) for site in watched]
        self._capturing.watch(watched)
        return first.rows.tokens, first.rows.is_one_a_sequence

    def run(
        self,
        data: Iterable[Any],
        target: Target,
        *,
        most: int | None,
        progress: bool,
        against: Target | None = None,
    ) -> int:
        """Run what is not on disk yet, and write it.

        Args:
            data: The input.
            target: Where to write.
            most: The number of rows to stop at.
            progress: Whether a progress bar is shown.
            against: The data set that sites are added to, whose rows the input must leave.

        Returns:
            The number of rows on disk.

        Raises:
            DataError: See `extract`.

        """
        if most is not None and target.rows > most:
            raise DataError(
                f"'{target.path}' has {target.rows} rows, more than max_tokens={most}; give "
                f"max_tokens={target.rows} or more, or another path"
            )
        self._against = against
        there = (against or target).layout
        if there is not None:
            order = there.input.get("batch_size")
            self._reading = replace(self._reading, ordered_as=order)
        reader = Reader(self._reading, self._choose, self._model, target, against, most)
        self._expected = reader.count(data)
        pipe: Pipe[Work] = Pipe(_READ_AHEAD)
        thread = threading.Thread(
            target=self._read, args=(reader.works(data), pipe), name="actctx reader", daemon=True
        )
        thread.start()
        try:
            bar_of = progress_bar(
                shown=progress,
                name=target.path.name,
                total=self._expected,
                initial=target.rows,
                unit=f" {self._layout.rows}s",
            )
            with self._capturing as acts, bar_of as bar:
                row = self._row_bytes()
                if row is not None:
                    self._check_room(row, target, bar)
                rows = self._forwards(pipe, acts, target, bar)
        except BaseException as error:
            tell_what_is_kept(error, target.path, target.rows)
            raise
        finally:
            pipe.abandon()
            thread.join(timeout=1)  # it may be waiting for an input that never comes
        target.note_finished(finished=True)
        return rows

    def _read(self, works: Iterable[Work], pipe: Pipe[Work]) -> None:
        try:
            for work in works:
                if not pipe.put(work):
                    return
        except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
            pipe.close(error)
        else:
            pipe.close()

    def _choose(self, batch: Batch) -> Work:
        work = self._choosing.choose(batch)
        self._has_sliced_away |= work.is_sliced_away
        return work

    def _forwards(self, works: Iterable[Work], acts: Activations, target: Target, bar: Any) -> int:
        self._device = input_device(self._model)
        writer, checks = None, ValueChecks(self._sites, finite=self._finite)
        try:
            for work in works:
                self.empty += work.empty
                if not len(work.token):
                    continue
                left = self._forward(work, acts)
                if writer is None:
                    self._begin(left, acts, target, bar)
                    writer = Writer(target, finite=self._finite, seen=checks.see)
                acts.clear()
                if not writer.put(left):
                    break
                del left
                checks.tell()
                count_on(bar, len(work.token))
        finally:
            if writer is not None:
                writer.close()
        if writer is not None and writer.error is not None:
            raise writer.error
        checks.tell(ended=True)
        if target.layout is None:
            reason = "it has no sequences, or all of its tokens are padding or dropped; keep some"
            if self._has_sliced_away:
                reason = "slice= selects none of the tokens that are left; give another"
            raise DataError(f"the input leaves no rows: {reason}")
        return target.rows

    def _forward(self, work: Work, acts: Activations) -> Left:
        batch, where = with_padding_behind(work.batch, work.where)
        # Who is not told of padding was warned of it.
        is_compared = self._is_compared or not self._reading.is_told(batch)
        alone = None if is_compared else one_alone(batch, where)
        apart = {} if alone is None else self._run_alone(alone, acts)
        with self._run_model.forward():
            self._run(batch, where)
        left = self._left(acts)
        if alone is not None:
            alone.compare({name: wait_for(own) for name, own in left.items()}, apart, self._dtype)
        if self._pool is not None:
            left = {
                site.key: Owned(
                    pool_rows(
                        site.key,
                        wait_for(left[site.key]),
                        work,
                        how=self._pool,
                        dtype=site.dtype,
                        loss=site.cast_loss,
                    )
                )
                for site in self._sites
                if site.key in left
            }
        self.cut += batch.cut
        if acts.forwards > 1:
            raise DataError(
                f"the model ran {acts.forwards} forwards for one batch, whose rows would be mixed; "
                "give the module that runs once"
            )
        return Left(work, left)

    def _run(self, batch: Batch, where: Int64[Tensor, "token 2"]) -> None:
        """Run a batch, and watch what it looks up if it is longer than any before it."""
        count, width = batch.tokens.shape
        self._chosen.choose(where, (count, width))
        given = {
            name: value.to(self._device) if isinstance(value, Tensor) else value
            for name, value in batch.given.items()
        }
        is_longer = width > self._widest
        with Positions(self._model, batch) if is_longer else contextlib.nullcontext():
            self._model(batch.tokens.to(self._device), **{**self._reading.always, **given})
        self._widest = max(width, self._widest)

    def _run_alone(self, alone: Alone, acts: Activations) -> dict[str, Tensor]:
        """Run one sequence by itself; nothing is left of it where it does not run."""
        self._is_compared = True
        try:
            self._run(alone.batch, alone.where)
            return {name: wait_for(own) for name, own in self._left(acts).items()}
        except Exception:  # noqa: BLE001  what the batch itself does is what counts
            return {}
        finally:
            acts.clear()

    def _left(self, acts: Activations) -> dict[str, Owned]:
        try:
            return {name: acts.single(name).firings[0][0] for name in acts}
        except SeveralFiringsError as error:
            raise SeveralFiringsError(
                f"{error.args[0].partition(';')[0]}; a row has one of them: give Site(..., "
                "firing=0) for the first"
            ) from None

    def _begin(self, left: Left, acts: Activations, target: Target, bar: Any) -> None:
        """Settle what a row holds, once a forward has told it, before anything is written."""
        self._check_fired(left)
        sites = tuple(
            self._stored(site, left.activations[site.key], acts)
            for site in self._sites
            if site.key in left.activations
        )
        self.facts.check_hooks(self._against or target, self._run_model.changing)
        if target.layout is not None:
            self.facts.check_sites(target, sites)
            warn(self.facts.on_batch_size(target, self._reading))
        row = sum(site.nbytes for site in sites) + _COUNTED_BYTES
        self._check_room(row, target, bar)
        if target.layout is None:
            import pyarrow as pa

            names = self._reading.carry
            kinds = [pa.field(name, carried_array(name, left.work).type) for name in names]
            texts = tuple(each.name for each in kinds if pa.types.is_string(each.type))
            described = self._run_model.described
            layout = replace(self._layout, model=described, sites=sites, texts=texts)
            target.create(layout, pa.schema(kinds))
        else:
            target.tidy()
            target.note_finished(finished=False)
        bar.row = row

    def _check_fired(self, left: Left) -> None:
        """Say which site never fired, and why."""
        self._capturing.check_fired()
        if not left.activations:
            names = shortened([site.shown for site in self._sites])
            reason = why_silent(uncompiled(self._model), self._sites[0])
            raise NeverFiredError(f"{names} never fired in 1 forward: {reason}")

    def _row_bytes(self) -> int | None:
        """Return the bytes of a row before any forward, if all sites fire and have known sizes."""
        total = _COUNTED_BYTES
        known = axis_sizes(self._model)
        for site in self._sites:
            axes = site.known_axes or ("_", "_")
            sizes = site.selected(axes, tuple(map(known.get, axes)))[1][1:]
            if not sizes or not site.exact or None in sizes:  # one number may be an integer
                return None
            total += math.prod(size or 1 for size in sizes) * (site.dtype or self._dtype).itemsize
        return total

    def _check_room(self, row: int, target: Target, bar: Any) -> None:
        """Report how much will be written, and refuse what does not fit on the disk."""
        free = shutil.disk_usage(target.path).free
        if self._expected is None or self._expected <= target.rows or self._is_planned:
            return
        self._is_planned = True
        rows = self._expected - target.rows
        needed = rows * row
        plan = f"{rows} rows of {row} bytes are {format_bytes(needed)}"
        if self._against is not None:  # they are deleted once they are copied to the others
            copied = self._expected * (row - _COUNTED_BYTES)
            needed += copied
            plan += f", with {format_bytes(copied)} more while they are added"
        if needed > free:
            raise DataError(
                f"'{target.path}' has no room: {plan}, but {format_bytes(free)} are free; give a "
                "smaller dtype, fewer sites or tokens, or another disk"
            )
        plan += f", {format_bytes(free)} are free"
        _LOG.info(plan)
        if not bar.disable:
            bar.write(plan, file=sys.stderr)

    def _stored(self, site: WatchedSite, owned: Owned, acts: Activations) -> StoredSite:
        check_rows(site.key, owned.value)
        return StoredSite(
            name=site.key,
            column=column_name(site.key),
            hook=site.place.name,
            names=site.place.names,
            axes=acts.axes(site.key)[1:],
            shape=tuple(owned.value.shape[1:]),
            dtype=dtype_name(owned.value.dtype),
            slice=self.facts.slices[site.key],
            taken=taken_of(site),
        )
