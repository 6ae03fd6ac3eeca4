"""Warn of values that look wrong: a site that is constant, or loses values in a cast."""

from collections.abc import Iterable

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from actctx._capture.watched import WatchedSite
from actctx._model.known_faults import warn
from actctx._select.cast_loss import CastLoss

_ENOUGH = 1000
"""The rows after which a site counts as constant."""

_FEW = 16
"""The rows that may be alike, unless they are 0."""

_BETWEEN = 64
"""The forwards between two checks of what was lost, each of which waits for the GPU."""


class ValueChecks:
    """Watches the values of sites, and warns once of each.

    Rows may be alike if their tokens are, unless they are 0.

    Args:
        sites: The sites, of which those with a `cast_loss` are cast.
        finite: Whether infinite values are refused.

    """

    def __init__(self, sites: Iterable[WatchedSite], *, finite: bool) -> None:
        self._finite = finite
        self._losses = {site.key: site.cast_loss for site in sites if site.cast_loss is not None}
        self._firsts = dict[str, Tensor]()
        self._rows = dict[str, int]()
        self._differing = set[str]()
        self._tokens = set[int]()
        self._forwards = 0

    def see(self, name: str, values: Shaped[Tensor, "row ..."], token: Int[Tensor, " row"]) -> None:
        """Look at rows that are about to be written, in the writer's thread."""
        if name in self._differing or not len(values):
            return
        if values.is_floating_point() and values.itemsize == 1:
            values = values.float()  # which torch compares
        first = self._firsts.get(name)
        if first is None:
            first = self._firsts[name] = values[0].clone()
        if torch.equal(values[-1], first) and torch.equal(values, first.expand_as(values)):
            self._rows[name] = self._rows.get(name, 0) + len(values)
            if len(self._tokens) < 2:  # noqa: PLR2004  of which there are several
                self._tokens |= {*token.tolist()}
        else:
            self._differing.add(name)

    def tell(self, *, ended: bool = False) -> None:
        """Warn of what was found, after a forward or at the end."""
        self._forwards += 1
        if ended or self._forwards % _BETWEEN == 1:
            for name, loss in [*self._losses.items()]:
                self._warn_loss(name, loss)
        for name, rows in [*self._rows.items()]:
            is_zero = not bool(self._firsts[name].any())
            is_odd = is_zero or (rows >= _FEW and len(self._tokens) > 1)
            if is_odd and name not in self._differing and rows >= (2 if ended else _ENOUGH):
                self._differing.add(name)  # once is enough
                what = "are 0" if is_zero else "have the same values"
                warn(
                    f"all {rows} rows of {name!r} that were written {what}; check that the site "
                    "and the slice are the ones that you want"
                )

    def _warn_loss(self, name: str, loss: CastLoss) -> None:
        if lost := loss.shown(refuses_infinite=self._finite):
            del self._losses[name]
            warn(
                f"{name!r} loses values in its cast: {lost}; give dtype=torch.bfloat16 or "
                "torch.float32"
            )
