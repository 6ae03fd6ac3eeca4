"""The capture context: it owns the hooks, the grad mode and the early stop."""

import functools
import itertools
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from actctx._activations import Activations
from actctx._axes import axis_sizes, fired_axes
from actctx._errors import (
    AxisError,
    CaptureStateError,
    HooksRemovedError,
    NeverFiredError,
    OptionError,
    OutputError,
)
from actctx._forward import Interceptor, frame_of
from actctx._grad import GradMode
from actctx._hooks import Hook
from actctx._names import Names, Place, Request, resolve, why_it_never_fires
from actctx._select import Owned, Selector, Slice, own, parse_slice
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
    return Capture(
        model, names, slice=slice, dtype=dtype, device=device, stop=stop, join=join, grad=grad
    )


@dataclass(frozen=True)
class _Site:
    """A place, and what becomes of its activations."""

    key: str
    place: Place
    exact: bool
    io: str
    selector: Selector
    dtype: torch.dtype | None
    device: torch.device | None


class Capture:
    """A context manager that captures activations; made by `capture`.

    It can be entered again once it was left, and gives a fresh buffer each time.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Names,
        *,
        slice: Slice,  # noqa: A002  as in `capture`
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        stop: bool,
        join: str | None,
        grad: bool,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise OptionError(
                f"cannot capture from a {type(model).__name__}; give a torch module, such as a "
                "TransformerBridge, a HookedTransformer or a Hugging Face model"
            )
        self._model = model
        self._stop = stop
        self._join = join
        self._grad = grad
        sizes = axis_sizes(getattr(model, "cfg", None))
        self._sites = [
            _site(request, slice, dtype, device, sizes) for request in resolve(model, names)
        ]
        for site in self._sites:
            _check_join(site, join)
        self._opening: _Opening | None = None

    def __enter__(self) -> Activations:
        """Put the hooks on.

        Raises:
            CaptureStateError: It is open already.
            NeverFiredError: A site that was asked for by its name is switched off in the model.

        """
        if self._opening is not None:
            raise CaptureStateError(
                "this capture is open already; leave its block first, or make another capture"
            )
        for site in self._sites:
            reason = why_it_never_fires(self._model, site.place)
            if site.exact and reason:
                raise NeverFiredError(f"{site.key!r} would never fire: {reason}")
        self._opening = _Opening(
            self._model, self._sites, stop=self._stop, join=self._join, grad=self._grad
        )
        return self._opening.buffer

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
        opening, self._opening = self._opening, None
        if opening is None:
            raise CaptureStateError("this capture is not open; enter it with a `with` statement")
        opening.close()
        if error is None:
            opening.check_fired()

    def __repr__(self) -> str:
        names = shortened([repr(site.key) for site in self._sites], most=3)
        state = "open" if self._opening else "not open"
        return f"<capture of {names} from {type(self._model).__name__}, {state}>"


def _site(
    request: Request,
    slice_: Slice,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    sizes: Mapping[str, int],
) -> _Site:
    """Settle the options of one site; those of the capture are the defaults."""
    asked, place = request.site, request.place
    axes = tuple(asked.axes.split()) if asked.axes is not None else place.axes
    dtype = asked.dtype if asked.dtype is not None else dtype
    if not isinstance(dtype, torch.dtype | None):
        raise OptionError(f"dtype={dtype!r} is no torch dtype; give one such as torch.float16")
    return _Site(
        key=request.key,
        place=place,
        exact=request.exact,
        io=asked.io,
        selector=parse_slice(
            request.key, slice_ if asked.slice is None else asked.slice, axes, sizes
        ),
        dtype=dtype,
        device=_device(asked.device if asked.device is not None else device),
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


def _check_join(site: _Site, join: str | None) -> None:
    """Refuse to join along an axis that the site cannot have; the batch axis is seen to later."""
    if join is None or join == "batch":
        return
    if not isinstance(join, str):
        raise OptionError(f"join={join!r} is no axis; give 'batch', 'pos' or None for a list")
    axes = site.selector.axes
    if axes is None:
        raise AxisError(
            f"the axes of {site.key!r} are not known, so its forwards cannot be joined along "
            f"{join!r}; name them, as in Site(..., axes='batch pos d_model')"
        )
    left = site.selector.axes_after(axes)
    if join not in left and not (join == "pos" and "query" in left):
        raise AxisError(
            f"the forwards of {site.key!r} cannot be joined along {join!r}: its axes, after the "
            f"slice, are {' '.join(left)!r}"
        )


_OPEN: ContextVar[frozenset[int]] = ContextVar("actctx_open", default=frozenset())
_NUMBERS = itertools.count()


class _Opening:
    """One opening of a capture: its hooks, its buffer, and what it has seen.

    Hooks and interceptor hold it weakly, so that a capture that is dropped while open is
    collected, and takes its hooks off.
    """

    def __init__(
        self, model: nn.Module, sites: list[_Site], *, stop: bool, join: str | None, grad: bool
    ) -> None:
        self.buffer = Activations(join, source=type(model).__name__)
        self.stop = stop
        self.grad = grad
        self.awaited = frozenset(
            site.key for site in sites if not why_it_never_fires(model, site.place)
        )
        self._model = model
        self._sites = sites
        self._number = next(_NUMBERS)
        self._ran = 0
        self._fired: set[str] = set()
        self._hooks: list[Hook] = []
        for site in sites:
            self.buffer.expect(site.key, site.place.names)
        with ExitStack() as undo:
            self._open(undo)
            self._finalizer = weakref.finalize(self, undo.pop_all().close)

    def _open(self, undo: ExitStack) -> None:
        undo.callback(GradMode(enabled=self.grad).restore)
        undo.callback(Interceptor.watch(self._model, self))
        reference = weakref.ref(self)
        for site in self._sites:
            hook = Hook(site.place, site.io, functools.partial(_fire, reference, site))
            undo.callback(hook.remove)
            self._hooks.append(hook)
        _OPEN.set(_OPEN.get() | {self._number})
        undo.callback(_leave, self._number)

    def close(self) -> None:
        """Take the hooks off, in reverse, and give the model back as it was."""
        self._finalizer()

    # What forwards ask and tell; see `Watcher`.

    def is_visible(self) -> bool:
        """Whether the running thread and context are those that opened the capture."""
        return self._number in _OPEN.get()

    def check_hooks(self) -> None:
        """Raise `HooksRemovedError` if somebody removed the hooks."""
        gone = [
            site.key
            for site, hook in zip(self._sites, self._hooks, strict=True)
            if not hook.is_attached
        ]
        if gone:
            raise HooksRemovedError(
                f"the hook on {gone[0]!r} was removed inside the block, as model.reset_hooks() "
                "does, so this forward would not be captured; leave the hooks alone until the "
                "block ends, or open a new capture after removing them"
            )

    def write(self, forward: dict[str, list[Owned]]) -> None:
        """Keep what one forward left."""
        self._ran += 1
        self._fired.update(forward)
        if forward:
            self.buffer.write(forward)

    # What hooks tell.

    def fire(self, site: _Site, module: nn.Module | None, value: Any) -> None:
        """Capture what a site yields, if it does so in a forward that this capture watches."""
        if module is not None and module is not site.place.module:
            return  # a copy of the model, which copied the hook with it
        frame = frame_of(self)
        if frame is None and not self.is_visible():
            return
        activation = _tensor(site, value)
        owned = own(activation, site.selector, site.dtype, site.device, grad=self.grad)
        if site.key not in self._fired:
            axes = fired_axes(site.selector.axes or site.place.axes, activation.dim())
            self.buffer.describe(site.key, site.selector.axes_after(axes))
        if frame is not None:
            frame.stage(self, site.key, owned)
        else:  # called by itself, as `generate` calls an encoder
            self.write({site.key: [owned]})

    def check_fired(self) -> None:
        """Raise `NeverFiredError` if a forward ran and a site that must fire did not."""
        silent = [site for site in self._sites if site.exact and site.key not in self._fired]
        if self._ran and silent:
            names = ", ".join(repr(site.key) for site in silent)
            reason = _why_silent(self._model, silent[0].place)
            forwards = f"{self._ran} forward{'s' * (self._ran != 1)}"
            raise NeverFiredError(f"{names} never fired in {forwards}: {reason}")


def _fire(
    reference: "weakref.ref[_Opening]", site: _Site, module: nn.Module | None, value: Any
) -> None:
    opening = reference()
    if opening is not None:
        opening.fire(site, module, value)


def _leave(number: int) -> None:
    _OPEN.set(_OPEN.get() - {number})


def _tensor(site: _Site, value: Any) -> Tensor:
    """Find the tensor in what a site yields: of a tuple or a mapping, the first value."""
    first = value
    if isinstance(value, Mapping):
        first = next(iter(value.values()), None)
    elif isinstance(value, tuple | list):
        first = value[0] if value else None
    if isinstance(first, Tensor):
        return first
    raise OutputError(
        f"{site.key!r} yields no tensor to capture but {_describe(value)}; "
        "capture from one of the modules inside it"
    )


def _describe(value: Any) -> str:
    name = type(value).__name__
    if isinstance(value, Mapping):
        inside = [f"{key}: {type(inner).__name__}" for key, inner in value.items()]
        return f"{name}({', '.join(inside)})"
    if isinstance(value, tuple | list):
        return f"{name}({', '.join(type(inner).__name__ for inner in value)})"
    return name


def _why_silent(model: nn.Module, place: Place) -> str:
    reason = why_it_never_fires(model, place)
    if reason:
        return reason
    if hasattr(model, "_orig_mod") or any(m._compiled_call_impl for m in model.modules()):
        return (
            "the model is compiled, and a hook in a compiled region may not fire; capture from "
            "the model before torch.compile"
        )
    if place.is_hook_point:
        return "the forwards did not reach this hook point; see actctx.hook_names(model)"
    return "the forwards did not call this module, or only its .forward, which skips hooks"
