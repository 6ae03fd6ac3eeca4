"""The options of the sites of a capture, settled and checked before the model is touched."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor

from actctx._capture.watched import Options, WatchedSite, selecting
from actctx._errors import AxisError, OptionError, SelectionError
from actctx._model.axes import ROUTER_AXES, Axes
from actctx._model.sites import Request, Site
from actctx._select.mapped import Mapped, read_map
from actctx._select.own import device_of, dtype_of
from actctx._select.padding import Chosen, as_mask
from actctx._select.slices import Selector
from actctx._stats.statistic import JointStatistic, Statistic


def watch_site(
    request: Request,
    *,
    defaults: Site,
    sizes: Mapping[str, int],
    options: Options,
    grow: Callable[[WatchedSite], tuple[Axes, Mapping[str, int]] | None],
) -> WatchedSite:
    """Settle the options of one site; those of the capture are the defaults.

    Args:
        request: The requested site.
        defaults: The options of the capture.
        sizes: The sizes of axes in the model's config.
        options: The options for all sites.
        grow: Determines the axes of a site, and their sizes, by a run of the model. It is called
            before anything is refused.

    Raises:
        AxisError: It does not have the axis to select from or to join along.
        SelectionError: A position lies outside an axis whose size is known.
        OptionError: Another option makes no sense.

    """
    asked, place = request.site, request.place
    sizes = {} if asked.axes is not None else sizes
    axes = tuple(asked.axes.split()) if asked.axes is not None else place.axes
    site = WatchedSite(
        key=request.key,
        place=place,
        exact=request.exact,
        io=asked.io if place.readout is None else place.readout.io,
        output=asked.output if place.readout is None else place.readout.output,
        firing=asked.firing,
        named_axes=None if asked.axes is None else axes,
        selector=Selector(request.key, (), axes),
        rows=None,
        dtype=dtype_of(asked.dtype if asked.dtype is not None else defaults.dtype),
        device=device_of(asked.device if asked.device is not None else defaults.device),
        asked=defaults.slice if asked.slice is None else asked.slice,
        options=options,
        pattern=request.pattern,
    )
    recipe = _recipe(site.shown, asked.reduce if asked.reduce is not None else defaults.reduce)
    site = replace(site, mapped=_map_of(site.shown, asked, defaults), reduce=recipe)
    _check_firing(site, options)
    _check_reduce(site)
    try:
        return _checked(site, axes, sizes)
    except (AxisError, SelectionError):
        told = None if asked.axes is not None else grow(site)
        if told is None:
            if axes is None or asked.axes is not None:
                raise
            return _checked(site, axes, {})  # a config alone does not decide
        return _checked(replace(site, told_axes=told[0]), *told)


def _checked(site: WatchedSite, axes: Axes | None, sizes: Mapping[str, int]) -> WatchedSite:
    by_name = site.named_axes is None and site.told_axes is None
    if by_name and axes in ROUTER_AXES and isinstance(site.options.mask, Chosen):
        # A router sees the tokens in order, so they are split into sequences. Inside an expert they
        # may be in another order.
        axes = ("batch", "pos", *axes[1:])
        site = replace(site, named_axes=axes)
    selector, rows = selecting(site.key, site.asked, axes, sizes, site.options)
    site = replace(site, selector=selector, rows=rows)
    _check_join(site, site.options.join)
    return site


def checked_mask(mask: Tensor | str | None) -> Tensor | str | None:
    """Return the requested mask.

    Raises:
        OptionError: It is not a valid mask.

    """
    if mask is None or (isinstance(mask, str) and mask == "attention"):
        return mask
    if isinstance(mask, Tensor):
        return as_mask(mask)
    raise OptionError(
        f"mask={mask!r} is not a valid mask; give 'attention' for that of each forward, or a "
        "tensor of the shape batch pos"
    )


def check_capacity(options: Options) -> None:
    """Refuse a capacity that is not a positive int, or that other options rule out.

    Raises:
        OptionError: It is not a positive int, or another option rules it out.

    """
    capacity = options.capacity
    if capacity is None:
        return
    if type(capacity) is not int or capacity < 1:  # True is an int
        raise OptionError(f"capacity={capacity!r} is not a number of rows; give a positive int")
    if options.join is None or options.grad:
        other = "join=None" if options.join is None else "grad=True"
        raise OptionError(
            f"capacity= fills one tensor in place, which does not work with {other}; leave one of "
            "them out"
        )


def _map_of(shown: str, asked: Site, defaults: Site) -> Mapped | None:
    """Read what is to be computed of a site; the function and its axis belong together."""
    given = defaults if asked.map is None else asked
    return read_map(shown, given.map, given.map_axis)


def _recipe(shown: str, given: object) -> Statistic | None:
    """Read what `reduce=` was given.

    Raises:
        OptionError: It is not a statistic.

    """
    if given is None:
        return None
    if isinstance(given, type):
        raise OptionError(
            f"reduce={given.__name__} of {shown} is a class; give one of its objects, as in "
            f"reduce={given.__name__}()"
        )
    if isinstance(given, JointStatistic):
        raise OptionError(
            f"reduce={type(given).__name__}() of {shown} takes several sites at once, which a "
            "capture does not; capture tensors, and give them to its update_all"
        )
    if not isinstance(given, Statistic):
        raise OptionError(
            f"reduce={given!r} of {shown} is not a statistic; give one of actctx.stats, such as "
            "Moments(), or an object with the methods of actctx.stats.Statistic"
        )
    return given


def _check_reduce(site: WatchedSite) -> None:
    """Refuse options that make no sense beside a statistic.

    Raises:
        OptionError: There is one.

    """
    options = site.options
    if site.reduce is not None and (
        options.join is None or options.grad or options.capacity is not None
    ):
        other, why = (
            ("join=None", "keeps the forwards apart")
            if options.join is None
            else ("grad=True", "keeps the graph of tensors")
            if options.grad
            else ("capacity=", "makes room for tensors")
        )
        raise OptionError(
            f"reduce= of {site.shown} keeps a statistic of all forwards, and {other} {why}; leave "
            "one of them out"
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
            f"{site.shown} asks for firing={site.firing}, which capacity= cannot store; count "
            "firings from the first"
        )


def _check_join(site: WatchedSite, join: str | None) -> None:
    """Refuse to join along an axis that the site cannot have. The batch axis is checked later."""
    kept_as_tokens = site.rows is not None and not site.rows.is_one_a_sequence
    if join is None or join == "batch" or kept_as_tokens or site.reduce is not None:
        return
    if not isinstance(join, str):
        raise OptionError(f"join={join!r} is not an axis; give 'batch', 'pos' or None for a list")
    axes = site.known_axes
    if axes is None:
        raise AxisError(
            f"the axes of {site.key!r} are not known, so its forwards cannot be joined along "
            f"{join!r}; name them, as in Site(..., axes='batch pos d_model')"
        )
    left, _ = site.selected(axes, (None,) * len(axes))
    if join not in left and not (join == "pos" and "query" in left):
        raise AxisError(
            f"the forwards of {site.key!r} cannot be joined along {join!r}: its axes, after the "
            f"slice, are {' '.join(left)!r}; join along one of them, or keep a list with join=None"
        )
