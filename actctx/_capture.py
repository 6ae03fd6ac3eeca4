"""The capture context: what users ask for, checked before the model is touched."""

from collections.abc import Mapping
from types import TracebackType
from typing import Never

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from actctx._activations import Activations
from actctx._axes import axis_sizes
from actctx._errors import AxisError, CaptureStateError, NeverFiredError, OptionError
from actctx._names import Names, Request, resolve
from actctx._opening import Opening, Options, Scope, WatchedSite
from actctx._places import uncompiled, why_it_never_fires
from actctx._rows import as_mask, split_rows
from actctx._select import Slice, parse_slice
from actctx._table import shortened


def capture(
    model: nn.Module,
    names: Names,
    *,
    slice: Slice = None,  # noqa: A002  the word of the field, as in TransformerLens' pos_slice
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    stop: bool = False,
    join: str | None = "batch",
    mask: Shaped[Tensor, "batch pos"] | str | None = None,
    capacity: int | None = None,
    grad: bool = False,
) -> "Capture":
    """Capture activations from the forwards that run in a `with` block, and only those.

    Inside the block the model is called as always: by itself, in a loop, through code of others.
    The captured tensors are owned: detached, contiguous, sharing storage with nothing, holding
    only what was selected. Block and forwards run without gradients. Hooks go when the block is
    left, however it is left.

    Args:
        model: A TransformerLens model of any generation, or any module.
        names: What to capture: a hook name or module name; a glob; a module of the model; a
            `Site`, which carries options of its own; a predicate on names; an iterable of these;
            or a mapping of aliases to names or sites. In a glob `*` stays within two dots and
            `**` spans them; without a dot it matches the last part of a name. Hook names are
            those of TransformerLens, aliases included; `hook_names(model)` lists them.
        slice: What to select along the named axes of every site, as in
            `{"pos": -1, "head": [0, 3]}`: an int, which drops the axis; a slice; a range; a list
            or one-dimensional tensor of positions; or a bool mask of the axis. Without a mapping
            it selects along `pos`, for an attention pattern the query axis. A tuple selects by
            position, as in `np.s_[:, -1]`. A negative position counts from the end of the
            padded sequence.
        dtype: The dtype of captured floating-point activations; others, such as token ids, keep
            theirs. By default that of the model.
        device: The device that captured activations move to. By default they stay.
        stop: Whether to end each forward as soon as every site has fired. A stopped call returns
            a `Stopped` value, which has no output.
        join: The axis along which activations of several forwards are joined, or None for a
            list of them.
        mask: Where the real tokens of padded sequences are: `"attention"` for the
            `attention_mask` that each forward is given, or a tensor of the shape `batch pos`.
            Only their rows are kept, as `token ...` instead of `batch pos ...`, and a slice
            along `pos` counts real tokens: -1 is the last of each sequence, with its rows
            `batch ...`.
        capacity: The number of elements along `join` (rows, for the batch) to make room for
            once, to be filled in place by all forwards. Without it, joining copies each forward
            once more when it is read.
        grad: Whether the captured tensors stay in the autograd graph. Block and forwards then
            run with gradients.

    Returns:
        A context manager. `with capture(...) as acts` gives an `Activations` buffer, a fresh one
        each time that it is entered.

    Raises:
        HookNameError: A name matches nothing.
        AxisError: A site does not have the axis to select from or to join along.
        SelectionError: A position lies outside an axis whose size the model's config tells.
        OptionError: Another option makes no sense.

    Example:
        >>> with capture(model, "blocks.*.hook_resid_post", slice={"pos": -1}) as acts:
        ...     for batch in loader:
        ...         logits = model(batch)
        >>> acts["blocks.0.hook_resid_post"].shape
        torch.Size([8, 32])

    """
    options = Options(stop=stop, join=join, grad=grad, mask=_checked_mask(mask), capacity=capacity)
    return Capture(model, names, options, slice=slice, dtype=dtype, device=device)


class Capture:
    """A context manager that captures activations; made by `capture`.

    It can be entered again once it was left, and gives a fresh buffer each time.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Names,
        options: Options,
        *,
        slice: Slice = None,  # noqa: A002  as in `capture`
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(
                f"cannot capture from a {type(model).__name__}; give a torch module, such as a "
                "TransformerBridge, a HookedTransformer or a Hugging Face model"
            )
        _check_capacity(options)
        self._model = model = uncompiled(model)
        self._options = options
        sizes = axis_sizes(getattr(model, "cfg", None))
        self._sites = []
        for request in resolve(model, names):
            site = _site(
                request, slice_=slice, dtype=dtype, device=device, sizes=sizes, options=options
            )
            _check_firing(site, options)
            _check_join(site, options.join)
            self._sites.append(site)
        self._opening: Opening | None = None

    def __enter__(self) -> Activations:
        """Put the hooks on, until the block is left.

        Raises:
            CaptureStateError: It is open already.
            NeverFiredError: A site that was asked for by its name is switched off in the model.

        """
        return self._begin("block")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Take the hooks off.

        Raises:
            NeverFiredError: The block ended well, but a site that was asked for by its name
                never fired. What the others left can still be read.
            CaptureStateError: It is not open.

        """
        try:
            if self._opening is None:
                raise CaptureStateError(
                    "this capture is not open; enter it with a `with` statement, or open() it"
                )
            self._opening.detach()
            if error is None:
                self._opening.check_fired()
        finally:
            if self._opening is not None:  # an interrupt may have come in between
                self._opening.detach()
            self._opening = None

    def open(self) -> Activations:
        """Put the hooks on until `close`, for a capture that spans the cells of a notebook.

        Forwards run without gradients, as in a block, but the code between them keeps its grad
        mode. All forwards of this thread are captured. A capture that nobody closes ends once
        neither it nor its buffer is held any more.

        Raises:
            CaptureStateError: It is open already.
            NeverFiredError: A site that was asked for by its name is switched off in the model.

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
        """Take the hooks off that `open` put on.

        Raises:
            NeverFiredError: A site that was asked for by its name never fired.
            CaptureStateError: It is not open.

        """
        self.__exit__(None, None, None)

    def prepared(self, scope: Scope = "block") -> Opening:
        """Return a fresh opening that holds its hooks only while it is entered, time and again."""
        for site in self._sites:
            reason = why_it_never_fires(self._model, site.place)
            if site.exact and reason:
                raise NeverFiredError(f"{site.shown} would never fire: {reason}")
        return Opening(self._model, self._sites, self._options, scope)

    def _begin(self, scope: Scope) -> Activations:
        if self._opening is not None:
            raise CaptureStateError(
                "this capture is open already; leave its block first, or make another capture"
            )
        opening = self.prepared(scope)
        try:
            self._opening = opening
            return opening.attach()
        except BaseException:  # an interrupt: the block will not run, so nothing will end it
            opening.detach()
            self._opening = None
            raise

    def __getattr__(self, name: str) -> Never:
        raise AttributeError(
            f"a capture has no {name!r}; what it captures is in the buffer: "
            "`with capture(...) as acts`"
        )

    def __getitem__(self, name: object) -> Never:
        raise CaptureStateError(
            f"a capture holds nothing under {name!r}; what it captures is in the buffer: "
            "`with capture(...) as acts`"
        )

    def __repr__(self) -> str:
        names = shortened([repr(site.key) for site in self._sites], most=3)
        state = "open" if self._opening else "not open"
        return f"<capture of {names} from {type(self._model).__name__}, {state}>"


def _site(
    request: Request,
    *,
    slice_: Slice,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    sizes: Mapping[str, int],
    options: Options,
) -> WatchedSite:
    """Settle the options of one site; those of the capture are the defaults."""
    asked, place = request.site, request.place
    axes = tuple(asked.axes.split()) if asked.axes is not None else place.axes
    dtype = asked.dtype if asked.dtype is not None else dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise OptionError(
            f"dtype={dtype!r} is no floating-point dtype; give one such as torch.float16"
        )
    taken = slice_ if asked.slice is None else asked.slice
    selector = parse_slice(request.key, taken, axes, sizes)
    rows = None
    if options.mask is not None:
        selector, rows = split_rows(selector, axes)
    return WatchedSite(
        key=request.key,
        place=place,
        exact=request.exact,
        io=asked.io,
        output=asked.output,
        firing=asked.firing,
        named_axes=None if asked.axes is None else axes,
        selector=selector,
        rows=rows,
        dtype=dtype,
        device=_device(asked.device if asked.device is not None else device),
    )


def _checked_mask(mask: Tensor | str | None) -> Tensor | str | None:
    if mask is None or (isinstance(mask, str) and mask == "attention"):
        return mask
    if isinstance(mask, Tensor):
        return as_mask(mask)
    raise OptionError(
        f"mask={mask!r} is no mask; give 'attention' for that of each forward, or a tensor of "
        "the shape batch pos"
    )


def _check_capacity(options: Options) -> None:
    capacity = options.capacity
    if capacity is None:
        return
    if not isinstance(capacity, int) or capacity < 1:
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


def _device(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"device={device!r} cannot hold activations: {reason}") from None
    return found


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
    left = site.selector.axes_after(axes)
    left = left if site.rows is None else site.rows.axes_after(left)
    if join not in left and not (join == "pos" and "query" in left):
        raise AxisError(
            f"the forwards of {site.key!r} cannot be joined along {join!r}: its axes, after the "
            f"slice, are {' '.join(left)!r}"
        )
