"""What an extraction does, settled before its first forward."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from actctx._capture.capture import Capture
from actctx._capture.watched import WatchedSite
from actctx._errors import OptionError
from actctx._extract.compatibility import Facts, picks_of, slice_of
from actctx._extract.decoder_sites import check_sides
from actctx._extract.inputs import Reader
from actctx._extract.row_choice import RowChoice
from actctx._model.axes import axis_sizes
from actctx._model.fingerprint import describe_model, versions
from actctx._select.cast_loss import loss_of
from actctx._select.padding import Chosen, RowSelector
from actctx._select.slices import Selector
from actctx._store.layout import TAKEN, Layout
from actctx._text import is_utf8

COUNTED_BYTES = 24
"""What a row takes beside its sites: its token, sequence, position, and a digest of its input."""


@dataclass(frozen=True, eq=False)
class ExtractionPlan:
    """What an extraction does.

    Attributes:
        model: The model.
        capture: Captures the sites.
        chosen: The mask of the capture, which is given the rows to keep of each forward.
        sites: The sites.
        reader: Reads the input.
        row_choice: Chooses the rows of a batch.
        pooling: How the rows of a sequence are joined; None if they are not.
        finite: Whether NaN and infinite values are refused.
        facts: What a data set must have in common with it, its layout among them.

    """

    model: nn.Module
    capture: Capture[Any]
    chosen: Chosen
    sites: tuple[WatchedSite, ...]
    reader: Reader
    row_choice: RowChoice
    pooling: str | None
    finite: bool
    facts: Facts

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in."""
        return next((each.dtype for each in self.model.parameters()), torch.float32)

    def row_bytes(self) -> int | None:
        """Return the bytes of a row before any forward, if all sites fire and have known sizes."""
        total = COUNTED_BYTES
        known = axis_sizes(self.model)
        for site in self.sites:
            axes = site.known_axes or ("_", "_")
            sizes = site.selected(axes, tuple(map(known.get, axes)))[1][1:]
            if not sizes or not site.exact or None in sizes:  # one number may be an integer
                return None
            total += math.prod(size or 1 for size in sizes) * (site.dtype or self.dtype).itemsize
        return total


def make_plan(
    model: nn.Module,
    capture: Capture[Any],
    *,
    chosen: Chosen,
    reader: Reader,
    drop: Mapping[str, list[int]],
    pooling: str | None,
    finite: bool,
) -> ExtractionPlan:
    """Plan an extraction without the tokens and positions of `drop`; see `ExtractionPlan`.

    Raises:
        OptionError: The sites do not leave the same rows, or have names that are taken.

    """
    described = describe_model(model)
    check_sides(model, capture.sites)
    _check_options(capture.sites)
    _check_names([*reader.carry, *(site.key for site in capture.sites)])
    rows = _shared_rows(capture.sites)
    layout = Layout(
        model=described,
        sites=(),
        rows="sequence" if rows.is_one_a_sequence or pooling else "token",
        input={
            "context": reader.context,
            "pack": reader.pack,
            "batch_size": reader.batch_size,
            "equal_lengths": reader.equal_lengths,
            "tokenizer": reader.tokenizer,
            "mask": reader.mask,
            "pool": pooling,
            "drop": dict(drop),
        },
        versions=versions(),
        carried=reader.carry,
    )
    slices = {site.key: slice_of(site) for site in capture.sites}
    sites = tuple(map(_of_chosen_rows, capture.sites))
    watched = sites
    if pooling is not None:  # what is pooled is cast afterwards
        watched = tuple(replace(site, dtype=None, cast_loss=None) for site in sites)
    capture.watch([*watched])
    dropped = {
        name: torch.tensor(numbers, dtype=torch.long, device="cpu")
        for name, numbers in drop.items()
    }
    row_choice = RowChoice(rows.tokens, dropped, pools=pooling is not None)
    facts = Facts(layout, sites, slices)
    return ExtractionPlan(model, capture, chosen, sites, reader, row_choice, pooling, finite, facts)


def _check_options(sites: Sequence[WatchedSite]) -> None:
    for site in sites:
        if site.reduce is not None:
            raise OptionError(
                f"reduce= of {site.shown} keeps a statistic, but a data set has rows; leave it "
                "out, or compute it with capture"
            )
        if site.mapped is not None:
            raise OptionError(
                f"map= of {site.shown} is a function, which a data set cannot tell from another "
                "when it is resumed; leave it out, and compute it from the rows that are read"
            )


def _check_names(names: list[str]) -> None:
    for name in names:
        if not name or not is_utf8(name):
            raise OptionError(
                f"{name!r} cannot be the name of a column; give the site an alias, as in "
                "{'resid': ...}"
            )
        if name in TAKEN or names.count(name) > 1:
            raise OptionError(
                f"{name!r} is the name of another column; give the site an alias, as in "
                "{'resid': ...}, or rename the carried entry"
            )


def _shared_rows(sites: Sequence[WatchedSite]) -> RowSelector:
    """Return what all sites select along the tokens, which is chosen before the forward."""
    shared = next(site.rows for site in sites if site.rows is not None)
    for site in sites:
        if site.rows is None or picks_of(site.rows.tokens) != picks_of(shared.tokens):
            raise OptionError(
                f"{site.shown} selects other positions than {sites[0].shown}, but all sites need "
                "the same rows; give them one slice along 'pos', or a data set each"
            )
    return shared


def _of_chosen_rows(site: WatchedSite) -> WatchedSite:
    """Return a site that keeps all of the rows that were chosen."""
    if site.rows is None:
        return site
    rows = site.rows._replace(tokens=Selector(site.key, (), None))
    return replace(site, rows=rows, cast_loss=loss_of(site.dtype))
