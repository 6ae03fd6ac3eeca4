"""Read a data set that `extract` wrote: by index, whole, or in shuffled batches for training."""

import reprlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor, nn
from torch.utils.data import Dataset, get_worker_info

from actctx._errors import DataError, OptionError
from actctx._files import check_place, describe, expanded, refuse_existing, write_safetensors
from actctx._model.axes import Axes
from actctx._model.fingerprint import describe_model, versions
from actctx._model.same_model import (
    ANEW,
    FINGERPRINT,
    differences,
    is_of_weights,
    summed_up,
)
from actctx._results.table import Row, as_html, as_text
from actctx._select.own import device_of
from actctx._stats.statistic import JointStatistic, Statistic
from actctx._store.indexing import Index, is_int, rows_of, whole_number
from actctx._store.layout import layout_of
from actctx._store.loader import Loader
from actctx._store.mixing import Mixing, warn_of_pool
from actctx._store.reducing import ORIGIN, reduce_rows
from actctx._store.rows import StoredBatch, StoredRows, dtypes_of
from actctx._store.saelens import read_saelens, write_saelens
from actctx._store.shuffle import Order, batches_of, rank_of
from actctx._store.site_columns import StoredSite
from actctx._store.validation import check_fragments, reading
from actctx._store.verification import Verified, check_whole
from actctx._store.where import find_site, find_sites
from actctx._text import counted, format_bytes, printable

__all__ = ["ActivationDataset", "Loader", "Mixing", "StoredSite", "Verified"]
for _public in (Loader, Mixing, StoredSite, Verified):
    _public.__module__ = __name__  # where users find them
del _public

_FEW = 4  # rows, too few to detect shuffling


class ActivationDataset(Dataset[StoredBatch]):
    """The rows of a data set on disk, read on request.

    `data[i]` is a dict of row `i`: each site under its name, in its stored dtype and shape, such as
    `head d_head`; `token`, `sequence` and `position`; and carried columns, such as labels. A slice,
    a list or tensor of positions, or a boolean mask reads several rows: one tensor per column, or a
    list if it does not contain numbers. Tensors are on the CPU, contiguous, and yours.

    Columns that others added are read too: uint16 and uint32 as int64, uint64 as a list of ints,
    and integers or booleans with nulls as a list with None. To find nulls, such columns are read
    once, when the data set is opened.

    It is a map-style torch dataset, but `data.loader(...)` reads much faster than a `DataLoader`.
    The workers of a `DataLoader` must be spawned, since Lance's threads do not survive a fork. A
    data set that is still being written can be read: it has the rows that were committed when it
    was opened. It can be pickled, and read by several threads at once.

    Args:
        path: Where `extract` wrote it: a directory, or the address of an object store.
        sites: The names of the sites to read, or of their hooks, or suffixes or globs of either, as
            in `capture`, or the alias of several; by default all. The others cost nothing. Each is
            read under the requested name, or the name that a suffix or a glob matches.
        where: Which rows to read, as in SQL: `"position > 0 AND token != 50256"`. It may name any
            site, in backticks if the name has dots, and its elements, counted from 1. Matching rows
            are found once, which takes 0.15 bytes of memory for each row of the data set.
        model: A model that the activations must be of; see `check`.

    Attributes:
        layout: The metadata of the data set: `model`, `rows` (whether a row is a `"token"` or a
            `"sequence"`), `input`, `versions`, `finished`.
        sites: The sites that are read, by name, each with `hook`, `axes`, `shape` and `dtype`.

    Raises:
        DataError: There is no data set at the path, or it is damaged, of a later version, or of
            another model. If only its newest versions are damaged, as after power loss, the newest
            complete one is read, with a warning.
        NotCapturedError: It has no such site, or several of the hook.
        HookNameError: A glob has an invalid bracket.
        OptionError: Lance does not understand the condition, or is not installed.

    Example:
        >>> data = ActivationDataset("acts.lance", where="position > 0", model=model)
        >>> data[:2]["blocks.1.hook_resid_post"].shape
        torch.Size([2, 32])

    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        sites: str | Iterable[str] | None = None,
        where: str | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.path = expanded(path)
        self.where = where
        opened = StoredRows(self.path)
        lance = opened.lance
        self.layout = layout_of(lance, self.path)
        if model is not None:
            self.check(model)
        stored = {site.name: site for site in self.layout.sites}
        chosen = find_sites(stored, sites)
        self.sites: Mapping[str, StoredSite] = chosen
        with reading(self.path):
            check_fragments(lance, self.layout.columns(chosen.values()), self.path)
            others = dtypes_of(lance, self.layout, opened.files)
        self._rows = StoredRows(self.path, lance.version, chosen, others, self.layout.texts)
        if where is not None:
            self._rows.find(where, stored)
        self._length = len(self._rows)
        self._warned = False

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Index) -> StoredBatch:
        """Read a row, or several, into memory.

        All selected rows are in memory at once: `nbytes / len(data)` bytes per row, plus strings. A
        few megabytes more are needed, and for a list, tensor or mask about 16 bytes per row. For
        more rows than fit in memory, use `loader`.

        Args:
            index: A position; or a slice, a list, tensor or array of positions, or a boolean mask
                with an entry for each row. Negative positions count from the end.

        Raises:
            SelectionError: There is no such row, or a mask has another length.
            OptionError: The index cannot select rows.

        """
        batch = self._rows.read(rows_of(index, len(self)))
        if not is_int(index):
            return batch
        return {name: values[0] for name, values in batch.items()}

    def __getitems__(self, indices: list[int]) -> list[StoredBatch]:
        """Read the rows of a `DataLoader`'s batch together; warn if it shuffles."""
        self._warn_of_scattered(indices)
        batch = self[indices]
        return [
            {name: _owned(values[k]) for name, values in batch.items()} for k in range(len(indices))
        ]

    def _warn_of_scattered(self, indices: list[int]) -> None:
        """Warn once that a `DataLoader` shuffles slowly; of several workers, only in the first."""
        worker = get_worker_info()
        if self._warned or len(indices) < _FEW or (worker and worker.id):
            return
        if np.mean(np.diff(indices) == 1) < 0.5:  # noqa: PLR2004  half of them
            self._warned = True
            better = f"data.loader({len(indices)})"
            warnings.warn(
                "a DataLoader that shuffles reads every row separately, many times slower than "
                f"{better}, which reads blocks of rows; iterate over that, or give "
                f"DataLoader({better}, batch_size=None)",
                stacklevel=3,
            )

    @property
    def tokens(self) -> Int32[Tensor, "row"]:
        """The token of each row, all in memory, which takes 4 bytes per row."""
        tokens: Tensor = self.read("token")
        return tokens

    @property
    def nbytes(self) -> int:
        """The size in bytes of the activations and numbers of all rows in memory."""
        return len(self) * self._rows.row_bytes

    def read(self, name: str) -> Any:
        """Read one site, or another column, of all rows into memory.

        All of it is in memory at once: for a site, `len(data) * data.sites[name].nbytes` bytes. A
        few megabytes more are needed.

        Args:
            name: The name of a site that is read, or of its hook, or a suffix or a glob that
                matches no other; or the name of another column.

        Returns:
            A tensor with one row for each row of the data set; or a list if the column does not
            contain numbers, or integers or booleans with nulls.

        Raises:
            NotCapturedError: It has no such site or column.

        """
        return self._only(name).read(range(len(self)))[name]

    def loader(
        self,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        workers: int = 1,
        device: torch.device | str | None = None,
        pool: int | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> Loader:
        """Return batches for training, each a dict like `data[...]`, read ahead in threads.

        Rows are shuffled over the whole file, in another order each epoch. They are read in blocks
        of 32 neighbouring rows: the blocks are permuted and divided into pools, and the rows of
        each pool are dealt to its batches, so that the rows of a block go to as many batches as
        possible. `Loader.mixing` measures how well this mixes. A data set that fits into one pool
        is permuted row by row.

        An iteration is an epoch. Every row comes once, at one rank. The order depends only on the
        seed, the epoch, the batch size, the pool and the number of ranks. It can be resumed in the
        middle of an epoch; see `Loader.state_dict`.

        Args:
            batch_size: The number of rows in a batch.
            shuffle: Whether to shuffle; otherwise rows come in the order of the file.
            seed: The seed of the order. All ranks must have the same.
            drop_last: Whether to drop a last batch that is not full. All ranks then have exactly as
                many batches; otherwise they may differ by one.
            workers: The number of threads that read. With 0, batches are read on request.
            device: The device that batches move to.
            pool: The most rows that are shuffled among each other; these and eight batches are in
                memory. By default 131,072 rows or 32 batches, whichever is more, so that pools have
                at least half of that. Smaller pools give a warning that says how they mix.
                `Loader.memory` is the size in bytes; a warning is given if it is more than half of
                the machine's memory.
            rank: The share to return; by default that of torch's distributed group.
            world_size: The number of shares.

        Returns:
            Batches that can be iterated over once per epoch, any number of times.

        Raises:
            OptionError: A number is not valid, or there is no such device.

        Example:
            >>> for batch in data.loader(8, seed=0):
            ...     resid = batch["blocks.1.hook_resid_post"]  # row d_model
            >>> resid.shape
            torch.Size([4, 32])

        """
        batch_size = whole_number("batch_size", batch_size, least=1)
        workers = whole_number("workers", workers, least=0)
        seed = whole_number("seed", seed, least=0)
        rank, world_size = rank_of(rank, world_size)
        if pool is not None:
            pool = whole_number("pool", pool, least=1)
        elif not shuffle:  # then it is only what is read ahead
            pool = 4 * self._rows.at_once
        order = Order(
            rows=len(self),
            batch_size=batch_size,
            pool=batches_of(pool, batch_size, rows=-(-len(self) // world_size)),
            shuffle=shuffle,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
            seed=seed,
            epoch=0,
        )
        loader = Loader(self._rows, order, workers=workers, device=device)
        warn_of_pool(order, pool, memory=loader.memory)
        return loader

    def reduce(
        self,
        statistic: Statistic | JointStatistic,
        site: str | None = None,
        *,
        where: str | None = None,
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> Any:
        """Compute a statistic of the rows, in the memory of the result and of some rows.

        The rows are read once, in their order. Sequences and positions are those of the columns
        `sequence` and `position`; of rows of tokens, `TopK(context=...)` finds the tokens around
        them in the data set, also where `where` leaves these rows out.

        Args:
            statistic: What to compute, such as `Moments()`; it stays as it is.
            site: The name of a site that is read, or of its hook, or a suffix or a glob that means
                no other; by default each site has a statistic of its own.
            where: Which rows to take, in addition to those that the data set was opened with.
            device: Where it is computed; the CPU by default.
            progress: Whether a progress bar is shown, on a terminal or in a notebook; elsewhere a
                line a minute.

        Returns:
            The statistic of the site; without `site`, a dict of one for each site, by name. Of a
            `JointStatistic`, such as `LinearCKA`, the one of all sites.

        Raises:
            NotCapturedError: It has no such site.
            OptionError: It is not a statistic, or not one of such values; the condition is not
                valid; or there is no such device. A `JointStatistic` was given one site.
            AxisError: A site does not have the axes to reduce.

        Example:
            >>> from actctx.stats import Moments
            >>> data.reduce(Moments(), "blocks.1.hook_resid_post", progress=False).mean.shape
            torch.Size([32])

        """
        if isinstance(statistic, type) or not isinstance(statistic, Statistic | JointStatistic):
            raise OptionError(
                f"{statistic!r} is not a statistic; give one, such as actctx.stats.Moments()"
            )
        if isinstance(statistic, JointStatistic) and site is not None:
            raise OptionError(
                f"{type(statistic).__name__} compares several sites, but site={site!r} names one; "
                "leave site= out, and open the data set with sites= those to compare"
            )
        sites = dict(self.sites)
        if site is not None:
            wanted = find_site(self.sites, site, self._rows.others)
            sites = {name: each for name, each in sites.items() if each is wanted}
        rows = self._with_where(where)
        others = {name: kind for name, kind in rows.others.items() if name in ORIGIN}
        rows = StoredRows(rows.path, rows.version, sites, others, (), rows.matching)
        found: Any
        if isinstance(statistic, JointStatistic):
            found = statistic.empty()
        else:
            found = {name: statistic.empty() for name in sites}
        axis = self._first_axis
        reduce_rows(rows, found, axis=axis, device=device_of(device), progress=progress)
        return found if site is None else found[next(iter(sites))]

    def _with_where(self, where: str | None) -> StoredRows:
        """Return the rows that another condition holds of as well."""
        if where is None:
            return self._rows
        both = where if self.where is None else f"({self.where}) AND ({where})"
        rows = replace(self._rows, matching=None)
        rows.find(both, {site.name: site for site in self.layout.sites})
        return rows

    def check(self, model: nn.Module) -> None:
        """Make sure that the activations are of this model.

        Args:
            model: The model, compared by its weights, buffers and settings.

        Raises:
            DataError: They are from another model; or the model is unknown, as for a data set that
                `from_saelens` made.
            OptionError: It is not a model.

        """
        if not isinstance(model, nn.Module):
            raise OptionError(f"{reprlib.repr(model)} is not a model; give a torch.nn.Module")
        here, there = describe_model(model), self.layout.model
        if not there["fingerprint"]:
            raise DataError(
                f"{self.path!r} does not say which model its activations come from, like "
                "everything that from_saelens made, so they cannot be compared with "
                f"{_described(here)}; leave out model= and check()"
            )
        found = differences(
            there, here, versions_differ=self.layout.versions != versions(), is_run=False
        )
        for fact in summed_up(found):
            name, was, now = fact
            which = (
                "" if name == FINGERPRINT else f": its {name} is {was!r} there, but {now!r} here"
            )
            hint = f" ({ANEW})" if is_of_weights(fact) else ""
            raise DataError(
                f"{self.path!r} holds activations of {_described(there)}, but this model is "
                f"{_described(here)}{which}; give the model that they were extracted from, or "
                f"extract them from this one{hint}"
            )

    def verify(self) -> Verified:
        """Compare the data on disk with what was written, byte for byte.

        All rows and columns are read, whatever `sites` and `where` select, and compared with the
        digests that each commit stored next to the data. They detect damage, such as a flipped bit,
        but not forgery.

        Returns:
            What was compared, and what could not be, such as columns that others added, and rows of
            versions of actctx without digests.

        Raises:
            DataError: Something differs; the message names the columns and rows.

        Example:
            >>> data.verify().unchecked
            ()

        """
        return check_whole(self._rows.lance, self.path)

    def to_saelens(
        self,
        path: str | PathLike[str],
        *,
        context: int,
        rename: Mapping[str, str] | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> int:
        """Write the activations for SAELens' training with `use_cached_activations=True`.

        The rows are cut into runs of `context`, in order; remaining rows at the end are dropped.
        Each site is a column under its name, with heads flattened as in SAELens. bfloat16 and
        float8, which these files do not support, become float32, with a warning. A few megabytes of
        rows are in memory at a time.

        SAELens reads the runs in order, and mixes no more rows than its buffer holds. With
        `shuffle` they are written in the random order of `loader`, which takes its memory.

        Args:
            path: The directory to write, SAELens' `cached_activations_path`, written whole or not
                at all.
            context: The `context_size` of SAELens' config, in rows.
            rename: SAELens' `hook_name` for sites that have another name here, by their name.
            shuffle: Whether to write the rows in random order; the dropped rows are then random
                too.
            seed: The seed of that order.

        Returns:
            The number of dropped rows.

        Raises:
            DataError: There is something at the path already, or it cannot be written to.
            OptionError: `context` is not a number of rows, or there are fewer; `rename` names a
                site that is not read, or two columns would have the same name; a site has integers
                or bools.

        Example:
            >>> data.to_saelens("cached", context=7)
            0

        """
        context = whole_number("context", context, least=1)
        seed = whole_number("seed", seed, least=0)
        write_saelens(
            self._rows, path, context=context, rename=rename or {}, seed=seed if shuffle else None
        )
        return len(self) % context

    @classmethod
    def from_saelens(
        cls, path: str | PathLike[str], out: str | PathLike[str]
    ) -> "ActivationDataset":
        """Convert activations that SAELens cached to a data set.

        A `sequence` is a run of SAELens' context. The directory says nothing about the model, so
        `check` refuses every model. About 4096 rows are in memory at a time.

        Args:
            path: The directory, SAELens' `new_cached_activations_path`.
            out: Where to write the data set, whole or not at all.

        Returns:
            The opened data set.

        Raises:
            DataError: It is not such a directory, or `out` already exists or cannot be written
                to.

        Example:
            >>> left_out = data.to_saelens("of_saelens", context=7)
            >>> len(ActivationDataset.from_saelens("of_saelens", "back.lance"))
            28

        """
        read_saelens(path, out)
        return cls(out)

    def to_safetensors(self, path: str | PathLike[str]) -> None:
        """Write all columns of numbers to one safetensors file.

        This takes as much memory as they do: read fewer with `sites=` and `where=`. The metadata
        has `axes`, a JSON object of axes by name, `model`, the class of the model, and versions.

        Args:
            path: Where to write, whole or not at all.

        Raises:
            DataError: There is already something at the path, or it cannot be written to.

        Example:
            >>> data.to_safetensors("acts.safetensors")

        """
        refuse_existing(check_place(path))  # before everything is read
        batch = self[:]
        tensors = {name: values for name, values in batch.items() if isinstance(values, Tensor)}
        axes: dict[str, Axes] = dict.fromkeys(tensors, (self._first_axis,))
        axes |= {name: (self._first_axis, *site.axes) for name, site in self.sites.items()}
        write_safetensors(tensors, path, describe(axes, self.layout.model["class"]))

    @property
    def _first_axis(self) -> str:
        return "token" if self.layout.rows == "token" else "batch"

    def _only(self, name: str) -> StoredRows:
        """Select one column."""
        rows = self._rows
        if isinstance(name, str) and name in rows.others:
            kept = {name: rows.others[name]}
            texts = (name,) if name in rows.texts else ()
            return StoredRows(rows.path, rows.version, {}, kept, texts, rows.matching)
        site = find_site(self.sites, name, rows.others)
        return StoredRows(rows.path, rows.version, {name: site}, {}, (), rows.matching)

    def __repr__(self) -> str:
        return as_text(*self._summary())

    def _repr_html_(self) -> str:
        return as_html(*self._summary())

    def _summary(self) -> tuple[str, list[Row]]:
        unit = "row" if self.where else self.layout.rows
        size = format_bytes(self.nbytes)
        title = f"ActivationDataset: {counted(len(self), unit)}, "
        title += f"{counted(len(self.sites), 'site')}, {size}"
        if not self.layout.finished:
            title += ", unfinished"
        rows = [
            Row(
                site=name,
                axes=" ".join((self._first_axis, *site.axes)),
                shape=str((len(self), *site.shape)),
                dtype=site.dtype,
                device="disk",
                nbytes=len(self) * site.nbytes,
            )
            for name, site in self.sites.items()
        ]
        return title, rows


def _owned(value: Any) -> Any:
    """Copy a row out of the memory of the batch that it was read with."""
    return value.clone() if isinstance(value, Tensor) else value


def _described(model: Mapping[str, Any]) -> str:
    name = f" {model['name']!r}" if model["name"] else ""
    return printable(f"a {model['class']}{name} with the fingerprint {model['fingerprint']}")
