"""One opening of a capture: the hooks it puts on, and what they tell it."""

import functools
import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from actctx._activations import Activations
from actctx._caches import estimate_cache_bytes
from actctx._eager import run_compiled, run_eagerly
from actctx._errors import HooksRemovedError, NeverFiredError, OptionError
from actctx._forward import Frame, Interceptor, Watcher, frame_of, running_frame, stop_if_done
from actctx._grad import GradMode
from actctx._hooks import Hook
from actctx._known_faults import is_given_cache, lost_cache, warn
from actctx._outputs import Inputs, tensor_of
from actctx._parallel import gathered, pieces_of
from actctx._places import Place, why_it_never_fires
from actctx._rows import Chosen, RowSelector, as_mask, find_rows
from actctx._schema import Schema
from actctx._select import Owned, Rows, own, plain_mode
from actctx._table import counted, shortened
from actctx._typed import Claim
from actctx._undo import Action, do, take_back
from actctx._values import check_capturable
from actctx._watched import Options, Seen, WatchedSite, why_silent

B = TypeVar("B")
"""What is handed over: the buffer, or a `Schema` before it."""

Scope = Literal["block", "context", "thread"]

_OPEN: ContextVar[frozenset[int]] = ContextVar("actctx_open", default=frozenset())
_NUMBERS = itertools.count()


class Opening(Generic[B]):
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
            site.key for site in sites if not why_it_never_fires(model, site.place)
        )
        self._model = model
        self._sites = sites
        # What the model itself is given and returns comes from the interceptor, not from a hook.
        self._roots = [
            site for site in sites if site.place.module is model and not site.place.is_hook_point
        ]
        self._hooked = [site for site in sites if site not in self._roots]
        # Those whose firing is known to be the one that is wanted only at the end of a forward.
        self._late = {
            site.key: site.firing
            for site in sites
            if site.firing is not None and not site.is_known_at_once
        }
        self._options = options
        self._scope = scope
        self._pieces = pieces_of(model)
        self._asked_of_cache = False
        self._number = next(_NUMBERS)
        self._thread: int | None = None
        self._ran = 0
        self._fired: set[str] = set()
        self._hooks: dict[str, Hook] = {}
        self._undo: list[Action] = []
        self.detach = functools.partial(take_back, self._undo)
        weakref.finalize(self, take_back, self._undo)
        self._seen = {
            site.key: Seen(
                site,
                self.buffer.expect(site.key, site.place.names, options.capacity),
                is_plain=site.yields_it,
                is_whole=site.takes_all and options.capacity is None,
                is_known_at_once=site.is_known_at_once,
            )
            for site in sites
        }

    def attach(self) -> B:
        """Put the hooks on, all or none.

        Returns:
            The buffer. For a `"thread"`, whoever has it keeps the hooks on, until they are off.

        """
        try:
            do(self._steps(), self._undo)
            return self._lend() if self._scope == "thread" else self.handed
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
        fire = _firing(weakref.ref(self), self._seen[site.key])
        return Hook(site.place.module, site.place.name, fire, io=io)

    def _notes(self) -> Iterator[Hook]:
        """Make the hooks that capture nothing."""
        # It is there for the shallow copies of the model that it refuses.
        yield Hook(self._model, type(self._model).__name__, _ignore, io="in")
        inner = getattr(self._model, "original_model", None)
        if self._options.mask == "attention" and isinstance(inner, nn.Module):
            # A bridge makes a mask of its own for texts.
            yield Hook(inner, "original_model", _note_mask, io="in")

    def _lend(self) -> B:
        lent = object.__new__(Activations)
        lent.__dict__ = self.buffer.__dict__
        # Not the buffer itself, which this opening holds: neither would ever be freed.
        self._undo.append(weakref.finalize(lent, _ignore, self).detach)
        return self._hand_over(lent)

    def __enter__(self) -> B:
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
        if io == "in" and not self._asked_of_cache and is_given_cache(value[1]):
            self._asked_of_cache = True
            warn(lost_cache(self._model))
        for site in self._roots:
            if site.io == io:
                given = Inputs(self._model, *value) if io == "in" else value
                self.fire(self._seen[site.key], given)

    def write(self, forward: dict[str, list[Owned]]) -> None:
        """Keep what one forward left."""
        self._ran += 1
        for key, firing in self._late.items():
            last = forward.pop(key, [])
            if last and len(last) == -firing:
                forward[key] = last[:1]
        self._fired.update(forward)
        if forward:
            self.buffer.write(forward, max([self._seen[key].tokens for key in forward]))

    def fire(self, seen: Seen, value: Any) -> None:
        """Capture what a site yields, if it does so in a forward that this capture watches."""
        frame = running_frame()  # nearly always its own, so that no search is needed
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
            firings = staged[site.key] = [self._own(seen, value, frame, 0)]
        else:
            firings.append(self._own(seen, value, frame, len(firings)))
        if seen.is_known_at_once:
            waiting = frame.waiting[self]
            waiting.discard(site.key)
            if not waiting:
                stop_if_done(site.key)
        else:
            del firings[: site.firing]

    def _fire_outside(self, seen: Seen, value: Any) -> None:
        """Capture from a part that is called by itself, as `generate` calls an encoder."""
        recomputes = torch._C._current_graph_task_id() != -1  # in a backward pass, for memory
        # A forward of one firing, its first and last.
        if self.is_visible() and not recomputes and seen.site.firing in {None, 0, -1}:
            self.write({seen.site.key: [self._own(seen, value, None, 0)]})

    def _own(self, seen: Seen, value: Any, frame: Frame | None, number: int) -> Owned:
        is_it = seen.is_plain and type(value) is Tensor and self._pieces is None
        activation: Tensor = value if is_it else self._activation(seen.site, value, frame)
        if activation.is_nested or activation.shape != seen.shape or not seen.column.firings:
            site = seen.site
            check_capturable(site.shown, activation, dtype=site.dtype, device=site.device)
            seen.check(activation.shape, sizes=self._options.check)
        if activation.requires_grad and not self.grad:
            activation = activation.detach()
        if torch.is_inference_mode_enabled():
            with plain_mode():
                return self._take(seen, activation, frame, number)
        if seen.is_whole:  # what `_take` comes to, at once
            if activation.is_contiguous():
                return Owned(activation.clone())  # torch takes a while to read the option below
            return Owned(activation.clone(memory_format=torch.contiguous_format))
        return self._take(seen, activation, frame, number)

    def _activation(self, site: WatchedSite, value: Any, frame: Frame | None) -> Tensor:
        found = tensor_of(site.shown, value, site.output)
        activation = gathered(found)
        if self._pieces is not None and activation is found:
            self._pieces.check(site.shown, site.place.module, found, io=site.io)
        if site.place.reading is not None:
            activation = site.place.reading.of(activation)
        is_dense = activation.layout is torch.strided
        if site.needs_sequences and is_dense and site.is_flattened(activation):
            sequences = self._sequences(frame)
            if sequences and len(activation) % sequences == 0:
                activation = activation.reshape(sequences, -1, *activation.shape[1:])
        return activation

    def _sequences(self, frame: Frame | None) -> int | None:
        """Tell how many sequences the forward was given, as far as that is known."""
        if isinstance(self._options.mask, Chosen):
            return self._options.mask.shape[0]
        frames = [] if frame is None else frame.chain()
        given = itertools.chain.from_iterable(each.inputs.values() for each in frames)
        tensors = (each for each in given if isinstance(each, Tensor) and each.dim() > 1)
        return next(map(len, tensors), None)

    def _take(self, seen: Seen, activation: Tensor, frame: Frame | None, number: int) -> Owned:
        site = seen.site
        selected = site.selector.select(activation)
        rows, copied = None, site.selector.copies
        if site.rows is not None:
            rows = self._rows(site.rows, site.place, selected, frame)
            selected = site.rows.keep(selected, rows)
            copied |= not rows.is_all
        room = seen.column.room(
            0 if site.firing == -1 else number, selected, site.dtype, site.device
        )
        owned = own(
            selected,
            copied=copied,
            dtype=site.dtype,
            device=site.device,
            room=room,
        )
        return owned._replace(rows=rows)

    def _rows(
        self, selector: RowSelector, place: Place, selected: Tensor, frame: Frame | None
    ) -> Rows:
        """Find the rows of real tokens, once for all sites that select alike."""
        shape = (selected.shape[0], selected.shape[selector.dim])
        if isinstance(self._options.mask, Chosen):
            return self._options.mask.rows(selector.site, shape)
        mask = self._mask(place, frame)
        found: list[tuple[Any, ...]] = [] if frame is None else frame.masks.setdefault(self, [])
        for known, steps, known_shape, rows in found:
            if known is mask and known_shape == shape and steps == selector.tokens.steps:
                return rows  # type: ignore[no-any-return]
        given, before = as_mask(mask), 0
        if self._options.mask == "attention":  # with a KV cache it covers what came before, too
            before = max(0, given.shape[1] - shape[1])
            given = given[:, before:]
        rows = Rows(find_rows(selector, given, shape), shape[0], before)
        found.append((mask, selector.tokens.steps, shape, rows))
        return rows

    def _mask(self, place: Place, frame: Frame | None) -> Tensor:
        if isinstance(self._options.mask, Tensor):
            return self._options.mask
        if frame is None:
            raise OptionError(
                f"mask='attention' takes the attention_mask of a forward of "
                f"{type(self._model).__name__}, but a part of it that holds {place.name!r} was "
                "called by itself, as generate() calls an encoder; capture from that part, as in "
                "capture(model.encoder, ...), or give capture the mask itself"
            )
        given = [(each.inputs, each.masks.get("inner", {})) for each in frame.chain()]
        # OPT has a decoder, too, but no encoder beside it.
        encodes = any("decoder_input_ids" in inputs for pair in given for inputs in pair)
        decodes = any(part.startswith("decoder") for part in place.name.split("."))
        name = "decoder_attention_mask" if encodes and decodes else "attention_mask"
        for inputs in itertools.chain(*given):
            if isinstance(inputs.get(name), Tensor):
                mask: Tensor = inputs[name]
                return mask
        if frame.unpadded is not None:
            return frame.unpadded
        raise OptionError(
            f"mask='attention' takes the forward's {name}, but this forward of "
            f"{type(self._model).__name__} got none; pass it to the model, or give capture the "
            "mask itself"
        )

    def finish(self, more: Iterable[Claim] = ()) -> None:
        """Check what the block has left, together with `more` where it is typed.

        Raises:
            NeverFiredError: A forward ran, and a site that must fire did not.
            TypedError: A field of a `Schema`, or one of `more`, does not fit its annotation.

        """
        self._check_fired()
        if isinstance(self.handed, Schema):
            self.handed.check(more)

    def _check_fired(self) -> None:
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


def _ignore(_value: object) -> None:
    """Stand in where nothing is to be done."""


def _note_mask(given: Inputs) -> None:
    frame = running_frame()
    if frame is not None:
        frame.masks["inner"] = given.kwargs


def _enter(number: int) -> None:
    _OPEN.set(_OPEN.get() | {number})


def _leave(number: int) -> None:
    _OPEN.set(_OPEN.get() - {number})
