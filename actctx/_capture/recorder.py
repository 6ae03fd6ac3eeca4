"""Read, check, select and stage the value of a site."""

import functools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from actctx._capture.axis_layout import (
    Numbers,
    has_other_positions,
    must_tell_axes,
    numbers_of,
    tell_axes,
)
from actctx._capture.forward import Frame, unwatched
from actctx._capture.growth import Known
from actctx._capture.masks import Padding
from actctx._capture.origins import origin_of
from actctx._capture.watched import Options, Seen, WatchedSite
from actctx._errors import SelectionError
from actctx._model.parallel import gathered, pieces_of
from actctx._results.column import Origin
from actctx._select.mapped import Mapped
from actctx._select.own import Owned, TokenRows, plain_mode
from actctx._select.padding import Chosen
from actctx._select.transforms import is_mapped, is_transformed, outside, value_of
from actctx._select.values import check_capturable


class Recorder:
    """Stages each firing until its forward ends.

    Args:
        model: The model that is captured from.
        options: The options for all sites.
        padding: Finds the real tokens of each forward.

    """

    def __init__(self, model: nn.Module, options: Options, padding: Padding) -> None:
        self._model = model
        self._mask = options.mask
        self._grad = options.grad
        self._padding = padding
        self._pieces = pieces_of(model)
        # The results of runs with other sizes, for as long as the capture is open.
        self._known: Known = weakref.WeakKeyDictionary()

    def stage(self, seen: Seen, value: Any, frame: Frame | None, number: int) -> Any:
        """Return the staged values of a firing, in their own memory.

        Args:
            seen: The site that fired, and what is known of it.
            value: The input or output of its module.
            frame: The forward in which it fired; None outside a forward.
            number: The index of the stage in this forward.

        Raises:
            AxisError, OutputError, SelectionError: The value does not have what was requested.

        """
        is_it = seen.is_plain and type(value) is Tensor and self._pieces is None
        activation: Tensor = value if is_it else self._read(seen.site, value, frame)
        if not is_transformed(activation):
            return self._settled(seen, activation, frame, number)
        if seen.site.rows is not None and is_mapped(activation):
            raise SelectionError(
                f"{seen.site.shown} fired inside torch.vmap, where mask= cannot determine which "
                "rows are tokens; capture it without a mask, and select afterwards"
            )
        with outside():
            return self._settled(seen, value_of(activation), frame, number)

    def _settled(self, seen: Seen, activation: Tensor, frame: Frame | None, number: int) -> Any:
        if activation.is_nested or activation.shape != seen.shape or not seen.column.firings:
            site = seen.site
            check_capturable(site.shown, activation, dtype=site.dtype, device=site.device)
            self._settle(seen, activation, frame)
        if activation.requires_grad and not self._grad:
            activation = activation.detach()
        if torch.is_inference_mode_enabled():
            with plain_mode():
                return self._take(seen, activation, frame, number)
        if seen.is_whole:  # as `_take` does, but faster
            if activation.is_contiguous():
                return Owned(activation.clone())  # torch takes a while to read the option below
            return Owned(activation.clone(memory_format=torch.contiguous_format))
        return self._take(seen, activation, frame, number)

    def _read(self, site: WatchedSite, value: Any, frame: Frame | None) -> Tensor:
        found = site.found(value)
        activation = gathered(found)
        if self._pieces is not None and activation is found:
            self._pieces.check(site.shown, site.place.module, found, io=site.io)
        readout = site.place.readout
        activation = activation if readout is None else readout.of(activation)
        is_dense = activation.layout is torch.strided
        if is_dense and site.is_flattened(activation):
            return self._by_sequence(activation, frame)
        return activation

    def _by_sequence(self, activation: Tensor, frame: Frame | None) -> Tensor:
        """Split an activation with one row per token into sequences."""
        numbers = self._numbers(frame)
        for pos in numbers.positions:
            if numbers.batch is not None and len(activation) == numbers.batch * pos:
                return activation.reshape(numbers.batch, pos, *activation.shape[1:])
        return activation

    def _settle(self, seen: Seen, activation: Tensor, frame: Frame | None) -> None:
        """Check an activation of another shape than the last, whose axes may be different.

        Raises:
            AxisError, SelectionError: It does not have what is selected.

        """
        shape, numbers = activation.shape, self._numbers(frame)
        if must_tell_axes(seen, shape, numbers):
            tell_axes(self._model, seen, shape, numbers, self._known)
        seen.check(shape)
        if has_other_positions(seen.site, shape, numbers):
            self._padding.warn_positions(seen.site)

    def _numbers(self, frame: Frame | None) -> Numbers:
        """Return the numbers of sequences and positions of the running forward."""
        if isinstance(self._mask, Chosen):
            batch, pos = self._mask.shape
            return Numbers(batch, frozenset({pos}))
        if frame is None:
            return Numbers()
        known: Numbers | None = frame.masks.get("numbers")
        if known is None:
            known = numbers_of(
                given for each in frame.chain() for given in self._padding.inputs(each)
            )
            if known.batch is not None:  # a bridge makes tokens of texts only in its forward
                frame.masks["numbers"] = known
        return known

    def _take(self, seen: Seen, activation: Tensor, frame: Frame | None, number: int) -> Any:
        site = seen.site
        selected = site.selector.select(activation)
        rows, copied = None, site.selector.copies
        if site.rows is None:
            self._padding.check_slice(site, activation.shape, frame)
        else:
            shape = (selected.shape[site.rows.batch], selected.shape[site.rows.dim])
            rows = self._padding.rows(site, shape, frame)
            selected = site.rows.keep(selected, rows)
            copied |= not rows.is_all
        if site.mapped is not None:
            selected, copied = self._mapped(site.mapped, selected), False
        if site.cast_loss is not None:
            site.cast_loss.add(selected)
        origin = functools.partial(self._origin, site, activation.shape, frame, rows)
        return seen.column.keep(selected, rows, number=number, copied=copied, origin=origin)

    def _origin(
        self, site: WatchedSite, shape: torch.Size, frame: Frame | None, rows: TokenRows | None
    ) -> Origin:
        numbers = self._numbers(frame)
        return origin_of(self._padding, site, shape, frame, rows=rows, numbers=numbers)

    def _mapped(self, mapped: Mapped, selected: Tensor) -> Tensor:
        """Return what `map=` computes. Forwards in it are captured by nobody."""
        with unwatched(), torch.set_grad_enabled(self._grad):
            found = mapped.of(selected)
        return found if self._grad else found.detach()
