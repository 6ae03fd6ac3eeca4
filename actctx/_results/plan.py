"""What a forward would leave, as a mapping and as a table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from actctx._errors import NotCapturedError
from actctx._model.axes import Axes
from actctx._model.globs import meant
from actctx._results.table import Row, as_html, as_text
from actctx._text import counted, dtype_name, format_bytes, shortened


@dataclass(frozen=True)
class PlannedSite:
    """What one site would leave.

    Attributes:
        axes: The names of the axes; `"_"` where one is not known.
        shape: The shape of the tensor; with `capacity=`, of the part that is filled.
        dtype: Its dtype.
        device: Where it would lie.
        nbytes: The bytes that the site would hold: all of its firings, and all of the room that
            `capacity=` makes.
        firings: How often it would fire.
        is_upper_bound: Whether this is the most that can be, since the values of the mask are not
            known.

    """

    axes: Axes
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    nbytes: int
    firings: int = 1
    is_upper_bound: bool = False

    def row(self, name: str) -> Row:
        """Describe it for the table."""
        return Row(
            site=name + (f" ({self.firings} firings)" if self.firings > 1 else ""),
            axes=" ".join(self.axes),
            shape=("at most " if self.is_upper_bound else "") + str(self.shape),
            dtype=dtype_name(self.dtype),
            device=str(self.device),
            nbytes=self.nbytes,
        )


class Plan(Mapping[str, PlannedSite]):
    """What a forward would leave, by the names of the sites; made by `Capture.plan`.

    A site is found by its name, an alias, or an ending or a glob that means no other site.

    Attributes:
        nbytes: The bytes that the captured tensors would hold.
        cache_nbytes: The bytes that caching everything would hold: what `run_with_cache` keeps of a
            TransformerLens model, and of any other module what all of its modules return; memory
            that tensors share counts once. None where the rest of the forward cannot be planned.
        missing: The names of sites that a pattern matched but that would never fire.

    """

    def __init__(
        self,
        sites: Mapping[str, PlannedSite],
        *,
        names: Mapping[str, tuple[str, ...]],
        missing: tuple[str, ...] = (),
        cache_nbytes: int | None = None,
    ) -> None:
        self._sites = dict(sites)
        self._names = names
        self.missing = missing
        self.nbytes = sum(site.nbytes for site in sites.values())
        self.cache_nbytes = cache_nbytes

    def __getitem__(self, name: str) -> PlannedSite:
        """Return what a site would leave.

        Raises:
            NotCapturedError: The name means no site of the plan, or several.

        """
        if name in self._sites:
            return self._sites[name]
        found = [*meant(name, {key: self._names[key] for key in self})]
        if len(found) == 1:
            return self._sites[found[0]]
        several = f"it means {len(found)} of its sites, so read one of" if found else "it has"
        listed = shortened([*map(repr, found or self)])
        raise NotCapturedError(f"the plan has no one site {name!r}: {several} {listed}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __repr__(self) -> str:
        return as_text(self._title(), self._rows())

    def _repr_html_(self) -> str:
        return as_html(self._title(), self._rows())

    def _title(self) -> str:
        at_most = "at most " if any(site.is_upper_bound for site in self.values()) else ""
        title = f"Plan: {counted(len(self), 'site')}, {at_most}{format_bytes(self.nbytes)}"
        if self.cache_nbytes is not None:
            title += f" of {format_bytes(self.cache_nbytes)} that caching everything would hold"
        return title + (f", {len(self.missing)} missing" if self.missing else "")

    def _rows(self) -> list[Row]:
        return [site.row(name) for name, site in self.items()]


PlannedSite.__module__ = Plan.__module__ = "actctx"  # where users find them
