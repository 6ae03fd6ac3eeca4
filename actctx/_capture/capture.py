"""The capture context: options are checked before the model is touched."""

import functools
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Generic, Never, TypedDict, TypeVar, Unpack, overload

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from actctx._capture.axis_layout import axes_before
from actctx._capture.opening import B, Opening, Scope
from actctx._capture.plan import Asked, plan_forward
from actctx._capture.settled import check_capacity, checked_mask, watch_site
from actctx._capture.watched import Options, WatchedSite
from actctx._errors import (
    CaptureStateError,
    HookNameError,
    NeverFiredError,
    OptionError,
    TypedError,
)
from actctx._model.axes import Axes, axis_sizes
from actctx._model.flags import is_switched_off, why_it_never_fires
from actctx._model.known_faults import faults_of, warn
from actctx._model.places import uncompiled
from actctx._model.sites import Names, Request, Site, resolve
from actctx._results.activations import Activations
from actctx._results.annotations import is_checking
from actctx._results.early_checks import Expected, refuse_dtype, refuse_impossible
from actctx._results.plan import Plan
from actctx._results.schema import Part, Schema, parts_of
from actctx._select.mapped import AXIS, MapFunction
from actctx._select.slices import Slice
from actctx._stats.statistic import Statistic
from actctx._text import shortened

S = TypeVar("S", bound=Schema)


class CaptureOptions(TypedDict, total=False):
    """The options of `capture`, for type checkers and for functions that pass them on.

    `capture` itself lists them in its signature, where `help()` and editors show them.
    """

    slice: Slice
    dtype: torch.dtype | None
    device: torch.device | str | None
    stop: bool
    join: str | None
    mask: Tensor | str | None
    capacity: int | None
    grad: bool
    reduce: Statistic | None
    map: MapFunction | None
    map_axis: str | None
    check: bool


@overload
def capture(
    model: nn.Module, names: type[S], **options: Unpack[CaptureOptions]
) -> "Capture[S]": ...
@overload
def capture(
    model: nn.Module, names: Names, **options: Unpack[CaptureOptions]
) -> "Capture[Activations]": ...
def capture(
    model: nn.Module,
    names: Names | type[Schema],
    *,
    slice: Slice = None,  # noqa: A002  the common term, as in TransformerLens' pos_slice
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    stop: bool = False,
    join: str | None = "batch",
    mask: Shaped[Tensor, "batch pos"] | str | None = None,
    capacity: int | None = None,
    grad: bool = False,
    reduce: Statistic | None = None,
    map: MapFunction | None = None,  # noqa: A002  what `map` does
    map_axis: str | None = AXIS,
    check: bool = True,
) -> "Capture[Any]":
    """Capture chosen activations from the forwards that run in a `with` block.

    Call the model inside the block as usual: directly, in a loop, or through other code. The
    captured tensors own their memory: they are detached, contiguous, share storage with nothing,
    and hold only the selection. The block and its forwards run without gradients. Hooks are removed
    when the block ends, however it ends.

    Args:
        model: A TransformerLens model of any generation, or any module.
        names: What to capture: a hook name or module name, or a suffix of several; a glob; a module
            of the model; a `Site` with its own options; a predicate on names; an iterable of these;
            a mapping of aliases to names or sites; or a `Schema` class. In a glob `*` stays within
            two dots, `**` spans them and `[8-11]` matches these numbers; without a dot it matches
            the last part of a name. An alias of several sites comes before the name of each, as in
            `last.blocks.0.hook_resid_post`. Hook names are those of TransformerLens, including
            aliases; `hook_names(model)` lists them.
        slice: What to select along the named axes of every site, as in
            `{"pos": -1, "head": [0, 3]}`: an int, which drops the axis; a slice; a range; a list or
            one-dimensional tensor of positions; or a bool mask of the axis. Without a mapping it
            selects along `pos`, or along `query` for an attention pattern. A tuple selects by
            position, as in `np.s_[:, -1]`. A negative position counts from the end of the padded
            sequence.
        dtype: The dtype of captured floating-point activations; others, such as token ids, keep
            theirs. By default the model's.
        device: The device that captured activations move to. By default they stay.
        stop: Whether to end each forward as soon as every site has fired. A stopped call returns
            a `Stopped` value, which has no output.
        join: The axis along which activations of several forwards are joined, or None for a
            list of them.
        mask: The real tokens of padded sequences: `"attention"` for the `attention_mask` that each
            forward is given, or a tensor of the shape `batch pos`. Only their rows are kept, as
            `token ...` instead of `batch pos ...`, and a slice along `pos` counts real tokens: -1
            is the last of each sequence, with rows `batch ...`. With `"attention"`, a model that
            counts padding on the left as positions gives a warning; without a mask, a slice that
            selects padding does.
        capacity: The number of elements along `join` (rows, for the batch) to allocate once and
            fill in place. Without it, reading copies each forward once more to join them.
        grad: Whether the captured tensors stay in the autograd graph. Block and forwards then
            run with gradients.
        reduce: A statistic of `actctx.stats`, such as `Moments()`, to compute of all forwards in
            place of keeping tensors. Every site gets one of its own, under `acts[name]`.
        map: A function, such as the encoder of a sparse autoencoder. It gets what was selected of
            an activation, and its result is kept instead. It must not change the axes before the
            last, nor what it gets. It runs in the block's grad mode, and before `dtype`, `device`
            and `reduce`.
        map_axis: The name of the last axis of what `map` returns, or None where it drops the last
            axis.
        check: Whether the fields of a `Schema` are checked against their annotations. The
            environment variable `ACTCTX_CHECK=0` disables this everywhere.

    Returns:
        A context manager. `with capture(...) as acts` yields an `Activations` buffer, or the
        requested `Schema`; a new one each time that it is entered.

    Raises:
        HookNameError: A name matches nothing, or an alias is an attribute of the buffer.
        AxisError: A site does not have the axis to select from or to join along.
        SelectionError: A position is outside an axis whose size the model's config gives.
        TypedError: A field of a `Schema` can never match its annotation.
        OptionError: Another option makes no sense.

    Example:
        >>> with capture(model, "blocks.*.hook_resid_post", slice={"pos": -1}) as acts:
        ...     for batch in loader:
        ...         logits = model(batch)
        >>> acts["blocks.0.hook_resid_post"].shape
        torch.Size([8, 32])

    """
    options = Options(
        stop=stop,
        join=join,
        grad=grad,
        mask=checked_mask(mask),
        capacity=capacity,
        check=is_checking(check),
    )
    defaults = Site("", slice, dtype, device, reduce=reduce, map=map, map_axis=map_axis)
    return Capture(model, names, options, defaults=defaults)


capture.__module__ = "actctx"  # where users find it


class Capture(Generic[B]):
    """A context manager that captures activations; created by `capture`.

    It can be entered again after it has ended, and yields a new buffer each time.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Names | type[Schema],
        options: Options,
        *,
        defaults: Site,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(
                f"cannot capture from a {type(model).__name__}; give a torch module, such as a "
                "TransformerBridge, a HookedTransformer or a Hugging Face model"
            )
        check_capacity(options)
        self._model = model = uncompiled(model)
        self._options = options
        sizes = axis_sizes(model)
        self._hand_over: Callable[[Activations], Any] = _as_it_is
        watch = functools.partial(
            watch_site,
            defaults=defaults,
            sizes=sizes,
            options=options,
            grow=functools.partial(axes_before, model, known=weakref.WeakKeyDictionary()),
        )
        if isinstance(names, type):
            _check_schema(names, options)
            parts = [
                (part, [watch(request) for request in requests])
                for part, requests in parts_of(names, model)
            ]
            self._sites = [site for _, sites in parts for site in sites]
            checked = sizes if options.check else None
            self._hand_over = functools.partial(
                names, parts=[part for part, _ in parts], sizes=checked
            )
            for part, sites in parts:
                part.field.check_kind(sites[0].reduce)
                if options.check and not part.field.is_statistic:
                    _check_part(part, sites, sizes, model)
        else:
            requests = resolve(model, names)
            for request in requests:
                _check_alias(request)
            self._sites = [watch(request) for request in requests]
        self._opening: Opening[B] | None = None
        warn(*faults_of(model, [site.place.name for site in self._sites]))

    def __enter__(self) -> B:
        """Add the hooks until the block ends.

        Raises:
            CaptureStateError: It is open already.
            NeverFiredError: A site that was requested by name is switched off in the model,
                or all that a pattern matches is.

        """
        return self._begin("block")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the hooks.

        Raises:
            NeverFiredError: The block ended without an error, but a site that was requested by name
                never fired. The other sites can still be read.
            CaptureStateError: It is not open.

        """
        try:
            if self._opening is None:
                raise CaptureStateError(
                    "this capture is not open; enter it with a `with` statement, or open() it"
                )
            self._opening.detach()
            if error is None:
                self._opening.finish()
        finally:
            if self._opening is not None:  # if an interrupt came in between
                self._opening.detach()
            self._opening = None

    def open(self) -> B:
        """Add the hooks until `close`, for a capture that spans cells of a notebook.

        Forwards run without gradients, as in a block, but the code between them keeps its grad
        mode. All forwards of this thread are captured. A capture that is never closed ends once
        nothing refers to it or its buffer.

        Raises:
            CaptureStateError: It is open already.
            NeverFiredError: A site that was requested by name is switched off in the model,
                or all that a pattern matches is.

        Example:
            >>> opened = capture(model, "blocks.0.hook_resid_post")
            >>> acts = opened.open()
            >>> logits = model(tokens)
            >>> opened.close()
            >>> acts.tensor.shape
            torch.Size([4, 7, 32])

        """
        return self._begin("thread")

    def close(self) -> None:
        """Remove the hooks that `open` added.

        Raises:
            NeverFiredError: A site that was requested by name never fired.
            CaptureStateError: It is not open.

        """
        self.__exit__(None, None, None)

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """Tell what a forward would leave in this capture, without running it.

        Only shapes are followed through the model: weights are not read, nothing is computed but
        what the inputs alone decide, such as masks, nobody's hooks fire, and the model stays as it
        is. Inputs and weights may be on the meta device; then a mask has no values and is taken to
        have no padding, which makes the rows of real tokens an upper bound.

        Args:
            args: What the model's forward would be given.
            kwargs: The same, by name.

        Returns:
            The plan: for each site its axes, shape, dtype, device and bytes.

        Raises:
            PlanError: What the forward leaves depends on values of its activations, as inside of
                experts, or torch cannot run the model without values.
            ActctxError: As a capture of this forward would raise.

        Example:
            >>> plan = capture(model, "blocks.*.hook_resid_post", slice=-1).plan(tokens)
            >>> plan["blocks.0.hook_resid_post"].shape, plan.nbytes
            ((4, 32), 1024)

        """
        _refuse_what_is_off(self._model, self._sites)
        return plan_forward(
            Asked(self._model, self._sites, self._options, self._hand_over, args, kwargs)
        )

    @property
    def sites(self) -> list[WatchedSite]:
        """The captured sites."""
        return self._sites

    def watch(self, sites: list[WatchedSite]) -> None:
        """Capture these sites instead, starting with the next time it is entered."""
        self._sites = sites

    def check_fired(self) -> None:
        """Raise what the end of the block would raise.

        Raises:
            NeverFiredError: A site that was requested by name has not fired.

        """
        if self._opening is not None:
            self._opening.finish()

    def prepared(self, scope: Scope = "block") -> Opening[B]:
        """Return a new opening that has its hooks only while it is entered, any number of times."""
        _refuse_what_is_off(self._model, self._sites)
        return Opening(
            self._model, self._sites, self._options, scope=scope, hand_over=self._hand_over
        )

    def _begin(self, scope: Scope) -> B:
        if self._opening is not None:
            raise CaptureStateError(
                "this capture is already open; leave its block first, or create another capture"
            )
        opening = self.prepared(scope)
        try:
            self._opening = opening
            return opening.attach()
        except BaseException:  # an interrupt: the block will not run, so nothing else will close it
            opening.detach()
            self._opening = None
            raise

    def __getattr__(self, name: str) -> Never:
        raise AttributeError(
            f"a capture has no {name!r}; captured tensors are in the buffer: `with capture(...) as "
            "acts`"
        )

    def __getitem__(self, name: object) -> Never:
        raise CaptureStateError(
            f"a capture has no item {name!r}; captured tensors are in the buffer: `with "
            "capture(...) as acts`"
        )

    def __repr__(self) -> str:
        names = shortened([repr(site.key) for site in self._sites], most=3)
        state = "open" if self._opening else "not open"
        return f"<capture of {names} from {type(self._model).__name__}, {state}>"


Capture.__module__ = "actctx"  # where users find it


def _as_it_is(buffer: Activations) -> Activations:
    return buffer


def _check_schema(schema: type[Schema], options: Options) -> None:
    if not issubclass(schema, Schema):
        raise OptionError(
            f"cannot capture the class {schema.__name__!r}; derive it from actctx.Schema, or give "
            "a hook name"
        )
    if options.join is None:
        raise OptionError(
            f"the fields of {schema.__name__} are tensors, but join=None keeps lists of them; "
            "join along 'batch' or 'pos', or capture by names instead"
        )


def _check_part(
    part: Part, sites: list[WatchedSite], sizes: Mapping[str, int], model: nn.Module
) -> None:
    """Refuse a field that can never match its annotation."""
    for name, site in zip(part.keys, sites, strict=True):
        what, hint = f"{part.field.what}, from {name!r},", part.field.hint
        refuse_dtype(what, hint, site.dtype)
        if site.known_axes is None:
            continue
        stacked = len(sites) if part.is_stacked else None
        try:
            refuse_impossible(what, hint, _expected(site, site.known_axes, sizes, stacked))
        except TypedError:  # names and configs propose; a run of the model decides
            if site.named_axes is not None:
                raise
            axes, own = axes_before(model, site) or (site.known_axes, {})
            layers = {axis: size for axis, size in sizes.items() if axis == "layer"}
            refuse_impossible(what, hint, _expected(site, axes, {**layers, **own}, stacked))


def _expected(
    site: WatchedSite, whole: Axes, sizes: Mapping[str, int], stacked: int | None
) -> Expected:
    """Predict the value of a site, stacked over layers if the field is."""
    axes, left = site.selected(whole, tuple(sizes.get(axis) for axis in whole))
    dropped = [axis for axis in whole if axis not in axes]
    because = f" (without {' '.join(dropped)!r}, which slice= or mask= drops)"
    if stacked is not None:
        axes, left = ("layer", *axes), (stacked, *left)
    return Expected(axes, left, sizes, because if dropped else "")


def _refuse_what_is_off(model: nn.Module, sites: list[WatchedSite]) -> None:
    """Refuse a site that was requested by name and is switched off, or a pattern of such sites.

    Raises:
        NeverFiredError: There is one.

    """
    off: dict[str | None, list[WatchedSite]] = {}
    awake = set()
    for site in sites:
        if not is_switched_off(model, site.place):
            awake.add(site.pattern)
        elif site.exact:
            reason = why_it_never_fires(model, site.place)
            raise NeverFiredError(f"{site.shown} would never fire: {reason}")
        else:
            off.setdefault(site.pattern, []).append(site)
    for pattern, silent in off.items():
        if pattern in awake or (pattern is None and awake):
            continue
        asked = "the request" if pattern is None else repr(pattern)
        names = shortened([site.shown for site in silent])
        reason = why_it_never_fires(model, silent[0].place)
        raise NeverFiredError(f"{asked} would never fire, since it matches only {names}: {reason}")


def _check_alias(request: Request) -> None:
    """Refuse an alias for which `acts.alias` would return something else."""
    alias = request.key.partition(".")[0]
    if request.key not in request.place.names and hasattr(Activations, alias):
        raise HookNameError(
            f"the alias {alias!r} is already an attribute of the buffer, so acts.{alias} could not "
            "read the site; give another alias"
        )
