"""One opening of a capture: its hooks, and the forwards that they see.

# NOTE [Thread-wide openings]
`capture(...).open()` has no block that ends it, so its hooks stay as long as something refers to
the buffer. The hooks refer to the opening weakly, and the opening refers to its buffer, so the
buffer does not keep the opening alive. The user is therefore given another object with the buffer's
attributes. It keeps the opening alive, and when it is collected, so is the opening, which removes
its hooks.

# NOTE [Firings counted from the end]
`firing=-2` is known only when a forward ends. Until then the last two firings are kept, and older
ones are dropped. If a forward had fewer than two, nothing is kept.
"""

import contextlib
import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import nn

from actctx._capture.cache_size import estimate_cache_bytes
from actctx._capture.forward import (
    Interceptor,
    Watcher,
    frame_of,
    is_unwatched,
    running_frame,
    stop_if_done,
)
from actctx._capture.generation import is_batching
from actctx._capture.hooks import Hook
from actctx._capture.masks import Padding
from actctx._capture.modes import GradMode, run_compiled, run_eagerly
from actctx._capture.recorder import Recorder
from actctx._capture.undo import Action, do, take_back
from actctx._capture.watched import Options, Seen, WatchedSite, why_silent
from actctx._errors import HooksRemovedError, NeverFiredError, OutputError
from actctx._model.flags import is_repeated, is_switched_off
from actctx._model.known_faults import is_given_cache, lost_cache, warn
from actctx._model.structure import Inputs
from actctx._results.activations import Activations
from actctx._results.annotations import Claim
from actctx._results.column import Column
from actctx._results.label import Label
from actctx._results.schema import Schema
from actctx._text import counted, shortened

B = TypeVar("B")
"""What the user is given: the buffer, or a `Schema` around it."""

Scope = Literal["block", "context", "thread"]

_OPEN: ContextVar[frozenset[int]] = ContextVar("actctx_open", default=frozenset())
_NUMBERS = itertools.count()


class Opening(Generic[B]):
    """One opening of a capture: its hooks, its buffer, and what it has seen.

    Hooks and interceptor refer to it weakly, so that a capture that is dropped while open is
    collected, and removes its hooks.

    Args:
        model: The model to capture from.
        sites: What to capture.
        options: The options for all sites.
        scope: Whose forwards are captured, and what runs without gradients (or with them, if
            requested): for a `"block"`, the forwards of this context, and the whole block; for a
            `"context"`, only its forwards, since other coroutines of the thread may run in between;
            for a `"thread"`, all forwards of the thread.

    Attributes:
        detach: Removes the hooks in reverse order, and restores the model.

    """

    def __init__(
        self,
        model: nn.Module,
        sites: list[WatchedSite],
        options: Options,
        *,
        scope: Scope,
        hand_over: Callable[[Activations], B],
    ) -> None:
        self.buffer = Activations(
            options.join,
            source=type(model).__name__,
            estimate=functools.cache(functools.partial(_estimate, weakref.ref(model))),
        )
        self._hand_over = hand_over
        self.handed = hand_over(self.buffer)
        self.stop = options.stop
        self.grad = options.grad
        self.awaited = frozenset(
            site.key for site in sites if not is_switched_off(model, site.place)
        )
        self._model = model
        self._sites = sites
        # Inputs and outputs of the model itself come from the interceptor, not from a hook.
        self._roots = [
            site for site in sites if site.place.module is model and not site.place.is_hook_point
        ]
        self._hooked = [site for site in sites if site not in self._roots]
        # See the note on firings counted from the end.
        self._late = {
            site.key: site.firing
            for site in sites
            if site.firing is not None and not site.is_known_at_once
        }
        self._padding = Padding(model, options, sites)
        self._stage = Recorder(model, options, self._padding).stage
        self._scope = scope
        self._asked_of_cache = False
        self._number = next(_NUMBERS)
        self._thread: int | None = None
        self._ran = 0
        self._misses_batches = False
        self._fired: set[str] = set()
        self._hooks: dict[str, Hook] = {}
        self._undo: list[Action] = []
        self.detach = functools.partial(take_back, self._undo)
        weakref.finalize(self, take_back, self._undo)
        self._seen = {
            site.key: Seen(site, self._column(site), is_known_at_once=site.is_known_at_once)
            for site in sites
        }

    def _column(self, site: WatchedSite) -> Column[Any]:
        repeats = is_repeated(self._model, site.place)
        label = Label(site.key, site.place.names, repeats=repeats)
        return self.buffer.expect(label, site.column_options)

    def attach(self) -> B:
        """Add the hooks, all or none.

        Returns:
            The buffer. For a `"thread"`, the hooks stay as long as something refers to it.

        """
        try:
            do(self._steps(), self._undo)
            return self._lend() if self._scope == "thread" else self.handed
        except BaseException:
            self.detach()
            raise

    def _steps(self) -> Iterator[tuple[Action, Action]]:
        """Yield (undo, do) pairs; each undo must be safe even if its do was interrupted."""
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
        fire = _firing(weakref.ref(self), self._seen[site.key])
        if site.place.readout is not None and not site.exact:
            fire = _if_returned(fire)
        return Hook(site.place.module, site.place.name, fire, io=io)

    def _notes(self) -> Iterator[Hook]:
        """Make the hooks that do not capture."""
        # It refuses shallow copies of the model.
        yield Hook(self._model, type(self._model).__name__, _ignore, io="in")
        yield from self._padding.hooks()

    def _lend(self) -> B:
        lent = object.__new__(Activations)
        lent.__dict__ = self.buffer.__dict__
        # See the note on thread-wide openings.
        self._undo.append(weakref.finalize(lent, _ignore, self).detach)
        return self._hand_over(lent)

    def __enter__(self) -> B:
        return self.attach()

    def __exit__(self, *error: object) -> None:
        try:
            self.detach()
        finally:  # again, if an interrupt came in between
            self.detach()

    def is_visible(self) -> bool:
        """Whether the running thread and context are those that opened the capture."""
        if is_unwatched():
            return False
        return self._number in _OPEN.get() or self._thread == threading.get_ident()

    def miss(self) -> None:
        """Record that a forward of another thread ran, for the message about `generate_batch()`."""
        self._misses_batches = self._misses_batches or is_batching()

    @property
    def is_guessed(self) -> bool:
        """Whether a mask had no values, in a plan, and all tokens were taken to be real."""
        return self._padding.is_guessed

    def check_hooks(self) -> None:
        """Raise `HooksRemovedError` if the hooks were removed."""
        gone = [key for key, hook in self._hooks.items() if not hook.is_attached]
        if gone:
            raise HooksRemovedError(
                f"the hook on {gone[0]!r} was removed inside the block, as model.reset_hooks() "
                "does, so this forward would not be captured; leave the hooks alone until the "
                "block ends, or open a new capture after removing them"
            )

    def receive(self, value: Any, io: str) -> None:
        """Capture an input or output of the model itself."""
        frame = running_frame()
        if frame is not None and io == "in":
            self._padding.begin(frame, is_first=not self.buffer.forwards)
        elif frame is not None:
            self._padding.end(frame, value)
        if io == "in" and not self._asked_of_cache and is_given_cache(value[1]):
            self._asked_of_cache = True
            warn(lost_cache(self._model))
        for site in self._roots:
            if site.io == io:
                given = Inputs(self._model, *value) if io == "in" else value
                self.fire(self._seen[site.key], given)

    def write(self, forward: dict[str, list[Any]]) -> None:
        """Keep the values of one forward."""
        self._ran += 1
        for key, firing in self._late.items():
            last = forward.pop(key, [])
            if last and len(last) == -firing:
                forward[key] = last[:1]
        self._fired.update(forward)
        if not forward:
            self.buffer.note_silent_forward()
        else:
            self.buffer.write(forward, max([self._seen[key].tokens for key in forward]))

    def fire(self, seen: Seen, value: Any) -> None:
        """Capture the value of a site, if it fires in a forward that this capture watches."""
        frame = running_frame()  # nearly always the right one, so no search is needed
        if frame is None or self not in frame.staged:
            frame = frame_of(self)
        site = seen.site
        if frame is None:
            self._fire_outside(seen, value)
            return
        if site.firing is not None and 0 <= site.firing != frame.count(self, site.key):
            return
        staged = frame.staged[self]
        firings = staged.get(site.key)
        if firings is None:
            firings = staged[site.key] = [self._stage(seen, value, frame, 0)]
        elif site.firing is None or seen.is_known_at_once:
            firings.append(self._stage(seen, value, frame, len(firings)))
        else:
            number = min(len(firings), -site.firing - 1)
            firings.append(self._stage(seen, value, frame, number))
            del firings[: site.firing]
        if seen.is_known_at_once:
            waiting = frame.waiting[self]
            waiting.discard(site.key)
            if not waiting:
                stop_if_done(site.key)

    def _fire_outside(self, seen: Seen, value: Any) -> None:
        """Capture from a part that is called directly, as `generate` calls an encoder.

        It counts as a forward of one firing, which is its first and its last.
        """
        recomputes = torch._C._current_graph_task_id() != -1  # in a backward pass, for memory
        if self.is_visible() and not recomputes and seen.site.firing in {None, 0, -1}:
            self.write({seen.site.key: [self._stage(seen, value, None, 0)]})

    def finish(self, more: Iterable[Claim] = ()) -> None:
        """Check what the block captured, together with `more` claims of a typed function.

        Raises:
            NeverFiredError: A forward ran, and a site that must fire did not; or only
                `generate_batch()` ran, whose forwards run in another thread.
            TypedError: A field of a `Schema`, or one of `more`, does not fit its annotation.

        """
        self._padding.finish()
        for seen in self._seen.values():  # while the model still exists
            seen.column.finish()
        self._check_fired()
        if isinstance(self.handed, Schema):
            self.handed.check(more)

    def _check_fired(self) -> None:
        if self._misses_batches and not self._ran:
            raise NeverFiredError(
                f"no forward of {type(self._model).__name__} was captured: generate_batch() runs "
                "them in its own thread, and a capture only sees those of the thread that opened "
                "it; call generate(), or the model itself"
            )
        silent = [site for site in self._sites if site.exact and site.key not in self._fired]
        if self._ran and silent:
            names = shortened([site.shown for site in silent])
            forwards = counted(self._ran, "forward")
            reason = why_silent(self._model, silent[0])
            raise NeverFiredError(f"{names} never fired in {forwards}: {reason}")


def _estimate(reference: "weakref.ref[nn.Module]", batch: int, pos: int) -> int | None:
    model = reference()
    return None if model is None else estimate_cache_bytes(model, batch, pos)


def _firing(reference: "weakref.ref[Opening[Any]]", seen: Seen) -> Callable[[Any], None]:
    def fire(value: Any) -> None:
        opening = reference()
        if opening is not None:
            opening.fire(seen, value)

    return fire


def _if_returned(fire: Callable[[Any], None]) -> Callable[[Any], None]:
    """Skip a firing without the output, such as an attention pattern that was not returned.

    Sites that a glob over TransformerLens' names skips are listed in `acts.missing`.
    """

    def fire_if_returned(value: Any) -> None:
        with contextlib.suppress(OutputError):
            fire(value)

    return fire_if_returned


def _ignore(_value: object) -> None:
    """Do nothing."""


def _enter(number: int) -> None:
    _OPEN.set(_OPEN.get() | {number})


def _leave(number: int) -> None:
    _OPEN.set(_OPEN.get() - {number})
