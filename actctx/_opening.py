"""One opening of a capture: the hooks it puts on, and what they tell it."""

import functools
import itertools
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from actctx._activations import Activations
from actctx._axes import Axes, fired_axes
from actctx._eager import run_compiled, run_eagerly
from actctx._errors import AxisError, HooksRemovedError, NeverFiredError, OptionError
from actctx._forward import Frame, Interceptor, Watcher, frame_of
from actctx._grad import GradMode
from actctx._hooks import Hook
from actctx._outputs import Inputs, tensor_of
from actctx._places import Place, why_it_never_fires
from actctx._rows import RowSelector, as_mask, find_rows
from actctx._select import Owned, Rows, Selector, own, plain_mode
from actctx._table import shortened
from actctx._undo import Action, do, take_back


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

    def check_axes(self, activation: Tensor) -> None:
        """Refuse axes that the user named but that the activation does not have."""
        if self.named_axes is not None and len(self.named_axes) != activation.dim():
            raise AxisError(
                f"{self.shown} fired with the shape {tuple(activation.shape)}, but "
                f"Site(axes={' '.join(self.named_axes)!r}) names {len(self.named_axes)} axes; name "
                "each axis that it has"
            )

    def axes_of(self, activation: Tensor) -> tuple[str, ...]:
        """Name the axes of what is captured from an activation."""
        whole = fired_axes(self.known_axes, activation.dim())
        axes = self.selector.axes_after(whole)
        return axes if self.rows is None else self.rows.axes_after(axes)


@dataclass(frozen=True)
class Options:
    """What holds for all sites of a capture."""

    stop: bool
    join: str | None
    grad: bool
    mask: Bool[Tensor, "batch pos"] | str | None
    capacity: int | None


Scope = Literal["block", "context", "thread"]

_OPEN: ContextVar[frozenset[int]] = ContextVar("actctx_open", default=frozenset())
_NUMBERS = itertools.count()


class Opening:
    """One opening of a capture: its hooks, its buffer, and what it has seen.

    Hooks and interceptor hold it weakly, so that a capture that is dropped while open is
    collected, and takes its hooks off.

    Args:
        model: The model to capture from.
        sites: What to capture.
        options: What holds for all sites.
        scope: Whose forwards are captured, and what runs without gradients (or with them, as
            asked): for a `"block"`, the forwards of this context, and all of the block; for a
            `"context"`, its forwards alone, since other coroutines of the thread may run in
            between; for a `"thread"`, all forwards of the thread.

    Attributes:
        detach: Takes the hooks off, in reverse, and gives the model back as it was.

    """

    def __init__(
        self, model: nn.Module, sites: list[WatchedSite], options: Options, scope: Scope
    ) -> None:
        self.buffer = Activations(options.join, source=type(model).__name__)
        self.stop = options.stop
        self.grad = options.grad
        self.awaited = frozenset(
            site.key for site in sites if not why_it_never_fires(model, site.place)
        )
        self._model = model
        self._sites = sites
        # What the model itself is given and returns comes from the interceptor, not from a hook.
        self._roots = [
            site for site in sites if site.place.module is model and not site.place.is_hook_point
        ]
        self._hooked = [site for site in sites if site not in self._roots]
        self._options = options
        self._scope = scope
        self._number = next(_NUMBERS)
        self._thread: int | None = None
        self._ran = 0
        self._fired: set[str] = set()
        self._hooks: dict[str, Hook] = {}
        self._undo: list[Action] = []
        self.detach = functools.partial(take_back, self._undo)
        weakref.finalize(self, take_back, self._undo)
        for site in sites:
            self.buffer.expect(site.key, site.place.names, options.capacity)

    def attach(self) -> Activations:
        """Put the hooks on, all or none.

        Returns:
            The buffer. For a `"thread"`, whoever has it keeps the hooks on, until they are off.

        """
        try:
            do(self._steps(), self._undo)
            return self._lend() if self._scope == "thread" else self.buffer
        except BaseException:
            self.detach()
            raise

    def _steps(self) -> Iterator[tuple[Action, Action]]:
        """Tell what to do to open, and before it what undoes it, were it but half done."""
        reference: weakref.ref[Watcher] = weakref.ref(self)
        if self._scope == "block":
            mode = GradMode(enabled=self.grad)
            yield mode.restore, mode.set
        if self._scope == "thread":
            self._thread = threading.get_ident()
        else:
            yield functools.partial(_leave, self._number), functools.partial(_enter, self._number)
        yield (
            functools.partial(run_compiled, self._number),
            functools.partial(run_eagerly, self._number),
        )
        interceptor = Interceptor.of(self._model)
        yield (
            functools.partial(interceptor.unwatch, reference),
            functools.partial(interceptor.watch, self._model, reference),
        )
        self._hooks = {site.key: self._hook(site) for site in self._hooked}
        for hook in (*self._hooks.values(), *self._notes()):
            yield hook.remove, hook.put_on

    def _hook(self, site: WatchedSite) -> Hook:
        io = "point" if site.place.is_hook_point else site.io
        fire = functools.partial(_fire, weakref.ref(self), site)
        return Hook(site.place.module, site.place.name, fire, io=io)

    def _notes(self) -> Iterator[Hook]:
        """Make the hooks that capture nothing."""
        # It is there for the shallow copies of the model that it refuses.
        yield Hook(self._model, type(self._model).__name__, _ignore, io="in")
        inner = getattr(self._model, "original_model", None)
        if self._options.mask == "attention" and isinstance(inner, nn.Module):
            # A bridge makes a mask of its own for texts.
            yield Hook(inner, "original_model", _note_mask, io="in")

    def _lend(self) -> Activations:
        lent = object.__new__(Activations)
        lent.__dict__ = self.buffer.__dict__
        # Not the buffer itself, which this opening holds: neither would ever be freed.
        self._undo.append(weakref.finalize(lent, _ignore, self).detach)
        return lent

    def __enter__(self) -> Activations:
        return self.attach()

    def __exit__(self, *error: object) -> None:
        try:
            self.detach()
        finally:  # where an interrupt came in between
            self.detach()

    def is_visible(self) -> bool:
        """Whether the running thread and context are those that opened the capture."""
        return self._number in _OPEN.get() or self._thread == threading.get_ident()

    def check_hooks(self) -> None:
        """Raise `HooksRemovedError` if somebody removed the hooks."""
        gone = [key for key, hook in self._hooks.items() if not hook.is_attached]
        if gone:
            raise HooksRemovedError(
                f"the hook on {gone[0]!r} was removed inside the block, as model.reset_hooks() "
                "does, so this forward would not be captured; leave the hooks alone until the "
                "block ends, or open a new capture after removing them"
            )

    def receive(self, value: Any, io: str) -> None:
        """Capture what the model itself is given or returns, which lies in its forward."""
        for site in self._roots:
            if site.io == io:
                given = Inputs(self._model, *value) if io == "in" else value
                self.fire(site, given)

    def write(self, forward: dict[str, list[Owned]]) -> None:
        """Keep what one forward left."""
        self._ran += 1
        for site in self._sites:
            if not site.is_known_at_once and site.key in forward:
                last = forward[site.key]
                forward[site.key] = last[:1] if len(last) == -(site.firing or 0) else []
        forward = {key: firings for key, firings in forward.items() if firings}
        self._fired.update(forward)
        if forward:
            self.buffer.write(forward)

    def fire(self, site: WatchedSite, value: Any) -> None:
        """Capture what a site yields, if it does so in a forward that this capture watches."""
        frame = frame_of(self)
        if frame is None:
            recomputes = torch._C._current_graph_task_id() != -1  # in a backward pass, for memory
            if self.is_visible() and not recomputes:  # as `generate` calls an encoder by itself
                self.write({site.key: [self._own(site, value, None, 0)]})
            return
        number = frame.count(self, site.key)
        if site.firing is not None and 0 <= site.firing != number:
            return
        staged = frame.staged[self].setdefault(site.key, [])
        staged.append(self._own(site, value, frame, len(staged)))
        if site.is_known_at_once:
            frame.satisfy(self, site.key)
        else:
            del staged[: site.firing]

    def _own(self, site: WatchedSite, value: Any, frame: Frame | None, number: int) -> Owned:
        activation = tensor_of(site.shown, value, site.output)
        site.check_axes(activation)
        site.selector.check(activation.shape)
        column = self.buffer.column(site.key)
        if not column.firings:
            column.axes = site.axes_of(activation)
            column.batch_dropped = site.selector.drops(0, activation.dim())
        with plain_mode():
            if not self.grad:
                activation = activation.detach()
            selected = site.selector.select(activation)
            rows = None
            if site.rows is not None:
                rows = self._rows(site.rows, site.place, selected, frame)
                selected = site.rows.keep(selected, rows.where)
            owned = own(
                selected,
                copied=site.selector.copies or rows is not None,
                dtype=site.dtype,
                device=site.device,
                room=column.room(
                    0 if site.firing == -1 else number, selected, site.dtype, site.device
                ),
            )
        return owned if rows is None else owned._replace(rows=rows)

    def _rows(
        self, selector: RowSelector, place: Place, selected: Tensor, frame: Frame | None
    ) -> Rows:
        """Find the rows of real tokens, once for all sites that select alike."""
        mask = self._mask(place, frame)
        shape = (selected.shape[0], selected.shape[selector.dim])
        found: list[Any] = [] if frame is None else frame.masks.setdefault(self, [])
        for known, steps, known_shape, rows in found:
            if known is mask and known_shape == shape and steps == selector.tokens.steps:
                return Rows(rows, shape[0])
        given = as_mask(mask)
        if self._options.mask == "attention":  # with a KV cache it covers what came before, too
            given = given[:, -shape[1] :]
        rows = find_rows(selector, given, shape)
        found.append((mask, selector.tokens.steps, shape, rows))
        return Rows(rows, shape[0])

    def _mask(self, place: Place, frame: Frame | None) -> Tensor:
        if isinstance(self._options.mask, Tensor):
            return self._options.mask
        frames = [] if frame is None else frame.chain()
        given = [(each.inputs(), each.masks.get("inner", {})) for each in frames]
        # OPT has a decoder, too, but no encoder beside it.
        encodes = any("decoder_input_ids" in inputs for pair in given for inputs in pair)
        decodes = any(part.startswith("decoder") for part in place.name.split("."))
        name = "decoder_attention_mask" if encodes and decodes else "attention_mask"
        for inputs in itertools.chain(*given):
            if isinstance(inputs.get(name), Tensor):
                mask: Tensor = inputs[name]
                return mask
        raise OptionError(
            f"mask='attention' takes the forward's {name}, but this forward of "
            f"{type(self._model).__name__} got none; pass it to the model, or give capture the "
            "mask itself"
        )

    def check_fired(self) -> None:
        """Raise `NeverFiredError` if a forward ran and a site that must fire did not."""
        silent = [site for site in self._sites if site.exact and site.key not in self._fired]
        if self._ran and silent:
            names = shortened([site.shown for site in silent])
            forwards = f"{self._ran} forward{'s' * (self._ran != 1)}"
            reason = _why_silent(self._model, silent[0])
            raise NeverFiredError(f"{names} never fired in {forwards}: {reason}")


def _fire(reference: "weakref.ref[Opening]", site: WatchedSite, value: Any) -> None:
    opening = reference()
    if opening is not None:
        opening.fire(site, value)


def _ignore(_value: object) -> None:
    """Stand in where nothing is to be done."""


def _note_mask(given: Inputs) -> None:
    frame = Frame.running()
    if frame is not None:
        frame.masks["inner"] = given.kwargs


def _enter(number: int) -> None:
    _OPEN.set(_OPEN.get() | {number})


def _leave(number: int) -> None:
    _OPEN.set(_OPEN.get() - {number})


def _why_silent(model: nn.Module, site: WatchedSite) -> str:
    reason = why_it_never_fires(model, site.place)
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
