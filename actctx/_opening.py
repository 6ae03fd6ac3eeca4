"""One opening of a capture: the hooks it puts on, and what they tell it."""

import functools
import itertools
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from actctx._activations import Activations
from actctx._axes import fired_axes
from actctx._errors import HooksRemovedError, NeverFiredError, OutputError
from actctx._forward import Interceptor, frame_of
from actctx._grad import GradMode
from actctx._hooks import Hook
from actctx._names import Place, why_it_never_fires
from actctx._select import Owned, Selector, own
from actctx._table import shortened


@dataclass(frozen=True)
class WatchedSite:
    """A place, and what becomes of its activations."""

    key: str
    place: Place
    exact: bool
    io: str
    selector: Selector
    dtype: torch.dtype | None
    device: torch.device | None

    @property
    def shown(self) -> str:
        """The name to show: the alias that the user gave, and what it stands for."""
        known = self.key in self.place.names
        return repr(self.key) if known else f"{self.key!r} ({self.place.name!r})"


_OPEN: ContextVar[frozenset[int]] = ContextVar("actctx_open", default=frozenset())
_NUMBERS = itertools.count()


class Opening:
    """One opening of a capture: its hooks, its buffer, and what it has seen.

    Hooks and interceptor hold it weakly, so that a capture that is dropped while open is
    collected, and takes its hooks off.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: list[WatchedSite],
        *,
        stop: bool,
        join: str | None,
        grad: bool,
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

    def fire(self, site: WatchedSite, module: nn.Module | None, value: Any) -> None:
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
            names = shortened([site.shown for site in silent])
            reason = _why_silent(self._model, silent[0].place)
            forwards = f"{self._ran} forward{'s' * (self._ran != 1)}"
            raise NeverFiredError(f"{names} never fired in {forwards}: {reason}")


def _fire(
    reference: "weakref.ref[Opening]", site: WatchedSite, module: nn.Module | None, value: Any
) -> None:
    opening = reference()
    if opening is not None:
        opening.fire(site, module, value)


def _leave(number: int) -> None:
    _OPEN.set(_OPEN.get() - {number})


def _tensor(site: WatchedSite, value: Any) -> Tensor:
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
