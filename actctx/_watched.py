"""The sites of a capture: places, and what becomes of their activations."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from actctx._axes import Axes, fired_axes
from actctx._cast import device_of, dtype_of
from actctx._column import Column
from actctx._errors import AxisError, OptionError, TypedError
from actctx._flags import why_it_never_fired
from actctx._names import Request, Site
from actctx._places import Place
from actctx._rows import Chosen, RowSelector, as_mask, check_tokens, split_rows
from actctx._select import Selector, parse_slice
from actctx._typed import Sizes


@dataclass(frozen=True, eq=False)
class WatchedSite:
    """A place, and what becomes of its activations."""

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
    sizes: Mapping[str, int]
    pattern: str | None = None

    @property
    def shown(self) -> str:
        """The name to show: the alias that the user gave, and what it stands for."""
        known = self.key in self.place.names
        return repr(self.key) if known else f"{self.key!r} ({self.place.name!r})"

    @property
    def is_known_at_once(self) -> bool:
        """Whether a firing that is wanted is known to be it, without the end of the forward."""
        return self.firing is None or self.firing >= 0

    @property
    def known_axes(self) -> Axes | None:
        """The axes of its activations: those that the user named, or that its name tells."""
        return self.named_axes if self.named_axes is not None else self.place.axes

    @property
    def yields_it(self) -> bool:
        """Whether a tensor that it yields is the activation, of which nothing is to be made."""
        reading = self.place.reading
        is_read = reading is not None and reading.part is not None
        return self.output is None and not is_read and not self.needs_sequences

    @property
    def takes_all(self) -> bool:
        """Whether all of an activation is captured, as it is and where it is."""
        changes = self.selector.steps, self.rows, self.dtype, self.device
        return changes == ((), None, None, None)

    def check_axes(self, shape: torch.Size) -> None:
        """Refuse axes that the user named but that the activation does not have.

        Raises:
            AxisError: It has another number of axes.

        """
        if self.named_axes is not None and len(self.named_axes) != len(shape):
            raise AxisError(
                f"{self.shown} fired with the shape {tuple(shape)}, but "
                f"Site(axes={' '.join(self.named_axes)!r}) names {len(self.named_axes)} axes; name "
                "each axis that it has"
            )

    def tokens_of(self, shape: torch.Size) -> tuple[int, int]:
        """Tell the sequences and positions of an activation, as far as they are known."""
        axes = self.known_axes or ()
        pos = next((dim for dim, axis in enumerate(axes) if axis in {"pos", "query"}), len(shape))
        return (shape[0], shape[pos]) if axes[:1] == ("batch",) and pos < len(shape) else (0, 0)

    @property
    def needs_sequences(self) -> bool:
        """Whether what is asked for is found by the sequences, which some models flatten."""
        by_name = self.rows is not None or (self.selector.steps and self.selector.axes is not None)
        return bool(by_name) and (self.known_axes or ())[:2] == ("batch", "pos")

    def is_flattened(self, activation: Shaped[Tensor, "..."]) -> bool:
        """Tell whether an activation has one row a token, as those of OPT's MLP do."""
        return activation.dim() == len(self.known_axes or ()) - 1

    def selected(self, whole: Axes) -> tuple[Axes, Sizes]:
        """Name the axes of what is captured from an activation, and the sizes that are fixed."""
        axes = self.selector.axes_after(whole)
        sizes = self.selector.sizes_after(tuple(self.sizes.get(axis) for axis in whole))
        if self.rows is None:
            return axes, sizes
        return self.rows.axes_after(axes), self.rows.sizes_after(sizes)

    def check_sizes(self, shape: torch.Size) -> list[str]:
        """Refuse an activation whose axes have not the sizes that the model's config says.

        Returns:
            The axes of another size, of a site that a pattern matched.

        Raises:
            TypedError: An axis has another size, of a site that was asked for by its name.

        """
        wrong = self.wrong_axes(shape)
        if wrong and self.exact:
            axis = wrong[-1]
            raise TypedError(
                f"{self.shown} fired with the shape {tuple(shape)}, along its axes "
                f"{' '.join(self.known_axes or ())!r}, but the model's config says {axis!r} is "
                f"{self.sizes[axis]}; if the model is right, name its axes otherwise with "
                "Site(axes=...), or capture with check=False"
            )
        return wrong

    def wrong_axes(self, shape: torch.Size) -> list[str]:
        """Name the axes of an activation whose sizes are not those of the model's config."""
        axes = self.known_axes or ()
        # Where the sequences are flattened, as in OPT's MLP, the first two axes are one.
        if len(shape) not in {len(axes), len(axes) - (axes[:2] == ("batch", "pos"))}:
            return []
        # OPT's embeddings are projected, so that they need not have the size of its layers.
        free = "d_model" if self.place.name.startswith(("embed.", "unembed.")) else None
        fired = zip(reversed(axes), reversed(shape), strict=False)
        return [axis for axis, size in fired if self.sizes.get(axis, size) != size and axis != free]


@dataclass(slots=True, eq=False)
class Seen:
    """A site, and what is known of it since its last firing.

    Attributes:
        site: The site.
        column: What it leaves.
        is_plain: Whether a tensor that it yields is the activation.
        is_whole: Whether it leaves clones of all that it yields.
        is_known_at_once: Whether a firing that is wanted is known to be it before the forward ends.
        shape: The shape of its last activation.
        tokens: The sequences and positions that it covered.

    """

    site: WatchedSite
    column: Column
    is_plain: bool
    is_whole: bool
    is_known_at_once: bool
    shape: torch.Size | None = None
    tokens: tuple[int, int] = (0, 0)

    def check(self, shape: torch.Size, *, sizes: bool) -> None:
        """Check an activation of another shape than the last, and note its axes if it is the first.

        Args:
            shape: The shape of the activation.
            sizes: Whether it is held against the sizes in the model's config.

        Raises:
            AxisError, SelectionError, TypedError: Its axes or sizes are not what was asked for.

        """
        site, column = self.site, self.column
        site.check_axes(shape)
        site.selector.check(shape)
        wrong = site.check_sizes(shape) if sizes else site.wrong_axes(shape)
        if not column.firings:
            axes = fired_axes(site.place.name, site.known_axes, len(shape))
            axes = tuple("_" if axis in wrong else axis for axis in axes)
            column.axes, column.sizes = site.selected(axes)
            column.batch_dropped = site.selector.drops(0, len(shape))
        self.shape, self.tokens = shape, site.tokens_of(shape)


@dataclass(frozen=True)
class Options:
    """What holds for all sites of a capture."""

    stop: bool
    join: str | None
    grad: bool
    mask: Bool[Tensor, "batch pos"] | str | Chosen | None
    capacity: int | None
    check: bool = True


def watch_site(
    request: Request,
    *,
    defaults: Site,
    sizes: Mapping[str, int],
    options: Options,
) -> WatchedSite:
    """Settle the options of one site; those of the capture are the defaults.

    Raises:
        AxisError: It does not have the axis to select from or to join along.
        SelectionError: A position lies outside an axis whose size is known.
        OptionError: Another option makes no sense.

    """
    asked, place = request.site, request.place
    axes = tuple(asked.axes.split()) if asked.axes is not None else place.axes
    taken = defaults.slice if asked.slice is None else asked.slice
    if options.mask is None:
        selector, rows = parse_slice(request.key, taken, axes, sizes), None
    else:
        chosen = isinstance(options.mask, Chosen)
        check_tokens(request.key, axes, chosen=chosen)  # a slice by position does not do without
        selector = parse_slice(request.key, taken, axes, sizes)
        selector, rows = split_rows(selector, axes, chosen=chosen)
    site = WatchedSite(
        key=request.key,
        place=place,
        exact=request.exact,
        io=asked.io if place.reading is None else place.reading.io,
        output=asked.output if place.reading is None else place.reading.output,
        firing=asked.firing,
        named_axes=None if asked.axes is None else axes,
        selector=selector,
        rows=rows,
        dtype=dtype_of(asked.dtype if asked.dtype is not None else defaults.dtype),
        device=device_of(asked.device if asked.device is not None else defaults.device),
        sizes=sizes,
        pattern=request.pattern,
    )
    _check_firing(site, options)
    _check_join(site, options.join)
    return site


def checked_mask(mask: Tensor | str | None) -> Tensor | str | None:
    """Return the mask that was asked for.

    Raises:
        OptionError: It is none.

    """
    if mask is None or (isinstance(mask, str) and mask == "attention"):
        return mask
    if isinstance(mask, Tensor):
        return as_mask(mask)
    raise OptionError(
        f"mask={mask!r} is no mask; give 'attention' for that of each forward, or a tensor of "
        "the shape batch pos"
    )


def check_capacity(options: Options) -> None:
    """Refuse a capacity that is none, or that other options cannot fill.

    Raises:
        OptionError: It is.

    """
    capacity = options.capacity
    if capacity is None:
        return
    if type(capacity) is not int or capacity < 1:  # True is an int to Python
        raise OptionError(f"capacity={capacity!r} is no number of rows; give a positive int")
    if options.join is None or options.grad:
        other = "join=None" if options.join is None else "grad=True"
        raise OptionError(
            f"capacity= fills one tensor in place, which {other} cannot; leave one of them out"
        )


def _check_firing(site: WatchedSite, options: Options) -> None:
    if site.is_known_at_once:
        return
    if options.stop:
        raise OptionError(
            f"{site.shown} asks for firing={site.firing}, which is known only at the end of a "
            "forward, so stop=True cannot stop before it; count firings from the first"
        )
    if options.capacity is not None and site.firing != -1:
        raise OptionError(
            f"{site.shown} asks for firing={site.firing}, for which capacity= cannot make room; "
            "count firings from the first"
        )


def _check_join(site: WatchedSite, join: str | None) -> None:
    """Refuse to join along an axis that the site cannot have; the batch axis is seen to later."""
    kept_as_tokens = site.rows is not None and not site.rows.is_one_a_sequence
    if join is None or join == "batch" or kept_as_tokens:
        return
    if not isinstance(join, str):
        raise OptionError(f"join={join!r} is no axis; give 'batch', 'pos' or None for a list")
    axes = site.known_axes
    if axes is None:
        raise AxisError(
            f"the axes of {site.key!r} are not known, so its forwards cannot be joined along "
            f"{join!r}; name them, as in Site(..., axes='batch pos d_model')"
        )
    left, _ = site.selected(axes)
    if join not in left and not (join == "pos" and "query" in left):
        raise AxisError(
            f"the forwards of {site.key!r} cannot be joined along {join!r}: its axes, after the "
            f"slice, are {' '.join(left)!r}; join along one of them, or keep a list with join=None"
        )


def why_silent(model: nn.Module, site: WatchedSite) -> str:
    """Say why a site never fired, and what to do."""
    reason = why_it_never_fired(model, site.place)
    if reason:
        return reason
    if site.firing is not None:
        return f"it did not fire often enough for firing={site.firing}; see acts.firings(name)"
    if isinstance(site.place.module, nn.ModuleList | nn.ModuleDict):
        kind = type(site.place.module).__name__
        return f"a {kind} is never called itself; capture what it holds: '{site.place.name}.*'"
    if site.place.is_hook_point:
        return "the forwards did not reach this hook point; see actctx.hook_names(model)"
    return "the forwards did not call this module, or only its .forward, which skips hooks"
