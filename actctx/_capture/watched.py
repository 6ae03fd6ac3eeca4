"""The sites of a capture: places with their final options."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from actctx._errors import AxisError
from actctx._model.axes import POSITIONS, Axes, position_dims
from actctx._model.flags import why_it_never_fired
from actctx._model.places import Place
from actctx._model.structure import tensor_of
from actctx._model.translation import Readout
from actctx._results.annotations import Sizes
from actctx._results.column import Column, ColumnOptions
from actctx._results.label import Named
from actctx._select.cast_loss import CastLoss
from actctx._select.mapped import Mapped
from actctx._select.padding import Chosen, RowSelector, check_tokens, split_rows
from actctx._select.slices import Selector, Slice, parse_slice
from actctx._stats.statistic import Statistic


@runtime_checkable
class Change(Protocol):
    """A step from an activation to what is kept of it."""

    def axes_after(self, axes: Axes, /) -> Axes:
        """Return the axes that it leaves."""

    def sizes_after(self, sizes: Sizes, /) -> Sizes:
        """Return the sizes that it leaves."""


Changes = tuple[Change, ...]


@dataclass(frozen=True, eq=False)
class WatchedSite:
    """A place, with the options for capturing its activations."""

    key: str
    place: Place
    exact: bool
    io: str
    output: int | str | None
    firing: int | None
    named_axes: Axes | None
    selector: Selector
    rows: RowSelector | None
    dtype: torch.dtype | None
    device: torch.device | None
    asked: Slice
    options: "Options"
    pattern: str | None = None
    told_axes: Axes | None = None
    cast_loss: CastLoss | None = None
    mapped: Mapped | None = None
    reduce: Statistic | None = None

    @property
    def shown(self) -> str:
        """The name for messages: the user's alias, and its site."""
        known = self.key in self.place.names
        return repr(self.key) if known else f"{self.key!r} ({self.place.name!r})"

    @property
    def is_known_at_once(self) -> bool:
        """Whether each firing shows if it is the requested one, before the forward ends."""
        return self.firing is None or self.firing >= 0

    @property
    def known_axes(self) -> Axes | None:
        """The axes of its activations: from the user, from a run of the model, or from its name."""
        known = self.named_axes, self.told_axes, self.place.axes
        return next((axes for axes in known if axes is not None), None)

    @property
    def selects_by_name(self) -> bool:
        """Whether the selection is along axes that are found by name."""
        return bool(self.selector.steps) and not isinstance(self.asked, tuple)

    @property
    def column_options(self) -> ColumnOptions:
        """The options for its column."""
        options = self.options
        return ColumnOptions(options.join, options.capacity, self.dtype, self.device, self.reduce)

    @functools.cached_property
    def reader(self) -> Callable[[Any], Tensor]:
        """Finds the activation in the inputs or outputs of its module.

        It raises an `OutputError` if there is none.
        """
        return functools.partial(_read, self.shown, self.output, self.place.readout)

    def found(self, value: Any) -> Tensor:
        """Find the tensor that the activation is read from; see `reader`."""
        return _found(self.shown, self.output, self.place.readout, value)

    def along(self, axes: Axes, sizes: Mapping[str, int] | None = None) -> "WatchedSite":
        """Select along these axes, which a run of the model determined.

        Raises:
            AxisError: A selected axis is missing.
            SelectionError: A position is outside an axis of these sizes.

        """
        selector, rows = selecting(self.key, self.asked, axes, sizes or {}, self.options)
        if rows is not None and self.rows is not None:  # an extraction has already chosen tokens
            rows = rows._replace(tokens=self.rows.tokens)
        return replace(self, told_axes=axes, selector=selector, rows=rows)

    @property
    def yields_it(self) -> bool:
        """Whether the hooked value can be captured as it is, if it is a tensor."""
        readout = self.place.readout
        is_read = readout is not None and (readout.part, readout.pattern) != (None, None)
        return self.output is None and not is_read and not self.needs_sequences

    @property
    def takes_all(self) -> bool:
        """Whether the whole activation is captured, without a cast or a move."""
        changes = self.selector.steps, self.rows, self.mapped, self.dtype, self.device
        return changes == ((), None, None, None, None)

    def check_axes(self, shape: torch.Size) -> None:
        """Refuse axes that the user named but that the activation does not have.

        Raises:
            AxisError: It has another number of axes.

        """
        if self.named_axes is not None and len(self.named_axes) != len(shape):
            chosen = self.options.mask
            if isinstance(chosen, Chosen) and len(shape) == len(self.named_axes) - 1:
                sequences, positions = chosen.shape
                raise AxisError(
                    f"a data set has one row per token, but {self.shown} fired with the shape "
                    f"{tuple(shape)} for {sequences} x {positions} tokens, so it does not have one "
                    "row for each; leave it out"
                )
            raise AxisError(
                f"{self.shown} fired with the shape {tuple(shape)}, but "
                f"Site(axes={' '.join(self.named_axes)!r}) names {len(self.named_axes)} axes; name "
                "all axes that it has"
            )

    def tokens_of(self, shape: torch.Size) -> tuple[int, int]:
        """Return the sequences and positions of an activation, as far as they are known."""
        axes = self.known_axes or ()
        pos = next(iter(position_dims(axes)), len(shape))
        return (shape[0], shape[pos]) if axes[:1] == ("batch",) and pos < len(shape) else (0, 0)

    @property
    def needs_sequences(self) -> bool:
        """Whether the selection needs sequences, which some models flatten."""
        by_name = self.rows is not None or (self.selector.steps and self.selector.axes is not None)
        return bool(by_name) and (self.known_axes or ())[:2] == ("batch", "pos")

    def is_flattened(self, activation: Shaped[Tensor, "..."]) -> bool:
        """Return whether an activation may have one row per token, as in OPT's MLP."""
        return self.needs_sequences and activation.dim() == len(self.known_axes or ()) - 1

    def selected(self, whole: Axes, sizes: Sizes) -> tuple[Axes, Sizes]:
        """Name the axes of the captured part of an activation, and its fixed sizes.

        Args:
            whole: The axes of the activation.
            sizes: Their sizes, None for sizes that differ between forwards.

        """
        return axes_after(self.changes, whole, sizes)

    @property
    def changes(self) -> Changes:
        """What changes the axes of an activation, in order. It does not hold the model."""
        found = (self.selector, self.rows, self.mapped)
        return tuple(each for each in found if each is not None)

    @property
    def joins_by_name(self) -> bool:
        """Whether its forwards are joined along an axis that is found by its name."""
        return self.reduce is None and self.options.join not in {None, "batch"}

    @property
    def needs_axes(self) -> bool:
        """Whether its axes must be known from the first activation on."""
        return (
            self.rows is not None
            or self.reduce is not None
            or self.selects_by_name
            or self.joins_by_name
        )

    @property
    def may_lack_axes(self) -> bool:
        """Whether activations of which nothing names the axes are taken to be rows.

        A statistic takes them so. Axes that a name proposes, but that nothing confirms, are not.
        """
        is_named = self.place.axes is not None or self.rows is not None
        return not (is_named or self.selects_by_name or self.joins_by_name)

    def refuse_axes(self, shape: torch.Size) -> AxisError:
        """Raise an error: the axes are needed but cannot be determined."""
        proposed = self.place.axes
        named = "" if proposed is None else f", which its name says are {' '.join(proposed)!r},"
        return AxisError(
            f"{self.shown} fired with the shape {tuple(shape)}; its axes{named} cannot be "
            "determined from the sizes of the forward, nor from a run of the model with other "
            "sizes; name them, as in Site(..., axes='batch pos d_model'), or select by position "
            "with a tuple, as in slice=np.s_[:, -1]"
        )


def axes_after(changes: Changes, whole: Axes, sizes: Sizes) -> tuple[Axes, Sizes]:
    """Return the axes that changes leave of those of an activation, and their sizes."""
    for change in changes:
        whole, sizes = change.axes_after(whole), change.sizes_after(sizes)
    return whole, sizes


def named_after(changes: Changes, whole: Axes, shape: tuple[int, ...]) -> Named:
    """Name the axes of the captured part of activations of this shape."""
    sizes = fixed_sizes(whole, shape)
    own = {axis: size for axis, size in zip(whole, sizes, strict=True) if size is not None}
    return Named(*axes_after(changes, whole, sizes), own)


def _found(site: str, output: int | str | None, readout: Readout | None, value: Any) -> Tensor:
    return tensor_of(site, value, output) if readout is None else readout.found(site, value)


def _read(site: str, output: int | str | None, readout: Readout | None, value: Any) -> Tensor:
    tensor = _found(site, output, readout, value)
    return tensor if readout is None else readout.of(tensor)


def fixed_sizes(axes: Axes, shape: tuple[int, ...]) -> Sizes:
    """Return the sizes that are the same in all forwards: those of axes that no input changes."""
    free = {"batch", "token", "_", *POSITIONS}
    return tuple(None if axis in free else size for axis, size in zip(axes, shape, strict=True))


@dataclass(slots=True, eq=False)
class Seen:
    """A site, and what is known of it since its last firing.

    Attributes:
        site: The site.
        column: The column for its values.
        is_known_at_once: Whether each firing shows at once if it is the requested one.
        is_plain: Whether the hooked value can be captured as it is, if it is a tensor.
        is_whole: Whether a clone of the whole activation is captured.
        rank: The number of axes of its last activation, whose layout is known.
        shape: The shape of its last activation.
        tokens: The sequences and positions that it covered.

    """

    site: WatchedSite
    column: Column[Any]
    is_known_at_once: bool
    is_plain: bool = field(init=False)
    is_whole: bool = field(init=False)
    rank: int = -1
    shape: torch.Size | None = None
    tokens: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        self.take(self.site)

    def take(self, site: WatchedSite) -> None:
        """Select this site's part of an activation."""
        self.site = site
        self.is_plain = site.yields_it
        self.is_whole = site.takes_all and self.column.copies

    def check(self, shape: torch.Size) -> None:
        """Check an activation of another shape than the last.

        Raises:
            AxisError, SelectionError: Its axes or sizes are not those requested.

        """
        self.site.check_axes(shape)
        self.site.selector.check(shape)
        self.shape, self.tokens = shape, self.site.tokens_of(shape)

    def name_axes(self, axes: Axes | None, shape: torch.Size) -> None:
        """Name the axes of the captured part of activations of this shape; None if unknown."""
        named = axes if axes is not None else ("_",) * len(shape)
        found = named_after(self.site.changes, named, shape)
        # Axes that only the user named are checked against the config, not against themselves.
        label = self.column.label
        label.named = found._replace(whole={}) if self.site.named_axes else found
        label.batch_dropped = self.site.selector.drops(0, len(shape))


@dataclass(frozen=True)
class Options:
    """The options for all sites of a capture."""

    stop: bool
    join: str | None
    grad: bool
    mask: Bool[Tensor, "batch pos"] | str | Chosen | None
    capacity: int | None
    check: bool = True


def selecting(
    key: str, asked: Slice, axes: Axes | None, sizes: Mapping[str, int], options: "Options"
) -> tuple[Selector, RowSelector | None]:
    """Parse the selection along the axes of a site, and along its real tokens."""
    if options.mask is None:
        return parse_slice(key, asked, axes, sizes), None
    chosen = isinstance(options.mask, Chosen)
    # A mask needs axes, even if a slice by position does not.
    check_tokens(key, axes, chosen=chosen)
    return split_rows(parse_slice(key, asked, axes, sizes), axes, chosen=chosen)


def why_silent(model: nn.Module, site: WatchedSite) -> str:
    """Explain why a site never fired, and what to do."""
    reason = why_it_never_fired(model, site.place)
    if reason:
        return reason
    if site.firing is not None:
        return f"it did not fire often enough for firing={site.firing}; see acts.firings(name)"
    if isinstance(site.place.module, nn.ModuleList | nn.ModuleDict):
        kind = type(site.place.module).__name__
        return (
            f"a {kind} is never called itself; capture the modules inside it: '{site.place.name}.*'"
        )
    if site.place.is_hook_point:
        return "the forwards did not reach this hook point; see actctx.hook_names(model)"
    return "the forwards did not call this module, or only its .forward, which skips hooks"
