"""Watch the forwards of a model while captures are open: where they begin, end and stop.

# NOTE [One interceptor a model]
To stop a forward early, a hook raises an exception, which must be caught where the forward began,
so that the user's block continues. A context manager cannot do this: it sees an exception only when
the block has ended. So while captures are open, `model.forward` is shadowed by an `Interceptor`,
one for all captures of that model, in whatever order they open and close. It also detects the end
of a forward, so that nothing of a forward that raised is kept.

# NOTE [Frames]
A call of an intercepted forward is a `Frame`, which holds the staged values of the captures that
watch it. Frames are in a context variable: another thread or coroutine has its own frames.
Interceptors nest if captures watch a model and a part of it. A forward stops once no frame in the
whole chain waits for a site, and it stops in the outermost.
"""

import contextlib
import functools
import inspect
import types
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Never, Protocol, runtime_checkable

import torch
from torch import nn

from actctx._errors import StoppedError
from actctx._select.transforms import is_differentiated


@runtime_checkable
class Watcher(Protocol):
    """What a forward needs from an open capture."""

    @property
    def stop(self) -> bool:
        """Whether forwards end once every site has fired."""

    @property
    def grad(self) -> bool:
        """Whether forwards keep the autograd graph."""

    @property
    def awaited(self) -> frozenset[str]:
        """The keys of the sites that a forward must not stop before."""

    def is_visible(self) -> bool:
        """Return whether it captures the forwards of this thread and context."""

    def miss(self) -> None:
        """Record that a forward ran in another thread or context, and was not captured."""

    def check_hooks(self) -> None:
        """Raise `HooksRemovedError` if its hooks were removed."""

    def receive(self, value: Any, io: str) -> None:
        """Capture an input (`io` is "in") or output ("out") of the model itself."""

    def write(self, forward: dict[str, list[Any]]) -> None:
        """Keep the values of one finished forward."""


class StopForward(Exception):  # noqa: N818  a signal, not an error; torch only unwinds for Exception
    """Unwinds a forward up to its outermost frame, once its rest is not needed."""

    def __init__(self, frame: "Frame", site: str) -> None:
        super().__init__("actctx stopped this forward early; its caller catches this")
        self.frame = frame
        self.site = site


class Frame:
    """One call of an intercepted forward, with the staged values of its watchers.

    Attributes:
        staged: The values of each watcher's sites so far, firing by firing.
        waiting: The sites that each watcher waits for.
        counts: How often each site of each watcher has fired.
        masks: What watchers know about the padding of this forward.

    """

    def __init__(
        self,
        watchers: list[Watcher],
        parent: "Frame | None",
        name_inputs: Callable[[], dict[str, Any]],
    ) -> None:
        self.parent = parent
        self._name_inputs = name_inputs
        self.staged: dict[Watcher, dict[str, list[Any]]] = {watcher: {} for watcher in watchers}
        self.counts: defaultdict[tuple[Watcher, str], int] = defaultdict(int)
        self.masks: dict[object, Any] = {}
        self.waiting = {watcher: set(watcher.awaited) for watcher in watchers}
        self.stop: bool = any(watcher.stop for watcher in watchers) or (
            parent is not None and parent.stop
        )

    @functools.cached_property
    def inputs(self) -> dict[str, Any]:
        """The arguments of the forward, by name."""
        # Every masked site needs it, and it is not cheap.
        return self._name_inputs()

    def count(self, watcher: Watcher, key: str) -> int:
        """Count a firing of a site, and return how often it fired before."""
        self.counts[watcher, key] += 1
        return self.counts[watcher, key] - 1

    def write(self) -> None:
        """Make each watcher keep its staged values, when the forward ends or is stopped."""
        for watcher, forward in self.staged.items():
            watcher.write(forward)

    def chain(self) -> "list[Frame]":
        """List this frame and the enclosing ones, from the inside out."""
        return [self] if self.parent is None else [self, *self.parent.chain()]


_FRAME: ContextVar[Frame | None] = ContextVar("actctx_frame", default=None)
running_frame = _FRAME.get
"""Returns the innermost frame of this thread and context; called by every firing."""


_UNWATCHED: ContextVar[bool] = ContextVar("actctx_unwatched", default=False)
is_unwatched = _UNWATCHED.get
"""Returns whether forwards are hidden from all captures in this thread and context."""


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Hide forwards from all captures, inside a captured forward or outside."""
    frame, before = _FRAME.get(), _UNWATCHED.get()
    try:
        _FRAME.set(None)
        _UNWATCHED.set(True)
        yield
    finally:
        _FRAME.set(frame)
        _UNWATCHED.set(before)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Run forwards as if none was running around them, and nothing was hidden."""
    frame, before = _FRAME.get(), _UNWATCHED.get()
    try:
        _FRAME.set(None)
        _UNWATCHED.set(False)
        yield
    finally:
        _FRAME.set(frame)
        _UNWATCHED.set(before)


def frame_of(watcher: Watcher) -> Frame | None:
    """Find the running forward that a watcher watches, in this thread and context."""
    frame = _FRAME.get()
    while frame is not None and watcher not in frame.staged:
        frame = frame.parent
    return frame


def stop_if_done(key: str) -> None:
    """Stop the running forward if stopping was requested and nothing waits for the rest of it.

    Raises:
        StopForward: Nothing waits any more, now that the site of this key has fired.

    """
    innermost = _FRAME.get()
    if innermost is None or not innermost.stop:
        return
    chain = innermost.chain()
    if not any(waiting for frame in chain for waiting in frame.waiting.values()):
        raise StopForward(chain[-1], key)


class Interceptor:
    """Stands in for `model.forward` while captures watch the model; see the notes above."""

    def __init__(self, model: nn.Module) -> None:
        # Hugging Face's `generate` reads the signature of `forward`. This comes first, since it
        # also copies the attributes, which are those of another interceptor if that was wrapped.
        functools.update_wrapper(self, model.forward)
        self._shadowed: Any = model.__dict__.get("forward")
        self._forward: Callable[..., Any] = model.forward
        self._model = weakref.ref(model)
        self._name = type(model).__name__
        self._watchers: list[weakref.ref[Watcher]] = []

    @classmethod
    def of(cls, model: nn.Module) -> "Interceptor":
        """Return the interceptor of a model, or a new one for it."""
        found = model.__dict__.get("forward")
        if isinstance(found, cls):
            if found._model() is model:
                return found
            found._give_back(model)  # a shallow copy of the model took it along
        return cls(model)

    def watch(self, model: nn.Module, reference: "weakref.ref[Watcher]") -> None:
        """Show the forwards of the model to a watcher."""
        # Replaced, not changed, since other threads may be iterating over it.
        self._watchers = [*self._watchers, reference]
        # Not `setattr`, which a TransformerBridge passes on to the wrapped module.
        model.__dict__["forward"] = self

    def unwatch(self, reference: "weakref.ref[Watcher]") -> None:
        """Remove a watcher, and restore the model's forward after the last one."""
        self._watchers = [other for other in self._watchers if other is not reference]
        model = self._model()
        # If other code shadowed it in turn, it stays below and passes every call through.
        if not self._watchers and model is not None and model.__dict__.get("forward") is self:
            self._give_back(model)

    def _give_back(self, model: nn.Module) -> None:
        if self._shadowed is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = self._shadowed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parent = _FRAME.get()
        seen = (
            set[Watcher]().union(*(frame.staged for frame in parent.chain())) if parent else set()
        )
        alive = [watcher for reference in self._watchers if (watcher := reference())]
        watchers = [w for w in alive if w not in seen and w.is_visible()]
        if not watchers:
            for watcher in alive:
                if watcher not in seen:
                    watcher.miss()
            return self._forward(*args, **kwargs)
        inputs = functools.partial(self._inputs, args, kwargs)
        return self._run(Frame(watchers, parent, inputs), args, kwargs)

    @functools.cached_property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(self._forward)

    def _inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Name the arguments of the forward, as far as its signature does."""
        try:
            named = self._signature.bind(*args, **kwargs).arguments
        except (TypeError, ValueError):  # the call itself will raise
            return kwargs
        return {**named, **kwargs}

    def _run(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for watcher in frame.staged:
            watcher.check_hooks()
        if frame.stop and not (frame.parent and frame.parent.stop):  # what the caller gives
            self._check_cache(frame.inputs if len(args) > 1 else kwargs)
        try:
            _FRAME.set(frame)
            # One capture with `grad=True`, here or around, is enough to keep the graph.
            graph = any(watcher.grad for outer in frame.chain() for watcher in outer.staged)
            graph = graph or is_differentiated(*args, *kwargs.values())
            with torch.set_grad_enabled(graph):
                for watcher in frame.staged:
                    watcher.receive((args, kwargs), "in")
                output = self._forward(*args, **kwargs)
                for watcher in frame.staged:
                    watcher.receive(output, "out")
        except StopForward as signal:
            if signal.frame is not frame:
                frame.write()
                raise
            output = Stopped(self._name, signal.site)
            # A traceback would keep the tensors of the unwound frames alive.
            signal.__traceback__ = signal.__context__ = None
        finally:
            _FRAME.set(frame.parent)  # not by a token, which an interrupt could lose
        frame.write()
        return output

    def _check_cache(self, given: dict[str, Any]) -> None:
        for name in ("past_key_values", "cache", "past_kv_cache", "cache_params"):
            if given.get(name) is not None and not isinstance(given[name], bool):
                raise StoppedError(
                    f"this forward of {self._name} was given {name}, a cache that a capture with "
                    "stop=True would leave half filled, since not all layers run; to use a cache, "
                    "or to call generate(), capture with stop=False"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied or pickled model gets its forward without captures.
        forward = self._forward
        if not isinstance(forward, types.MethodType):
            return (_same, (forward,))
        owner, name = forward.__self__, forward.__name__
        if getattr(type(owner), name, None) is forward.__func__:
            return (getattr, (owner, name))
        return (_bound, (forward.__func__, owner))


def _same(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward


def _bound(function: Callable[..., Any], owner: object) -> Callable[..., Any]:
    return types.MethodType(function, owner)  # which cannot be pickled itself


class Stopped:
    """The return value of a stopped forward, which has no output.

    Every use of it raises a `StoppedError` that explains this.
    """

    def __init__(self, model: str, site: str) -> None:
        self.__dict__["_why"] = (model, site)

    def __repr__(self) -> str:
        model, site = self.__dict__["_why"]
        return f"<Stopped: {model}.forward ended after {site!r}, as capture(stop=True) requested>"

    def _refuse(self, *_args: object, **_kwargs: object) -> Never:
        model, site = self.__dict__["_why"]
        raise StoppedError(
            f"this forward of {model} was stopped after {site!r}, the last requested site, so it "
            "has no output; to use the output, or to call generate(), run_with_cache() or a "
            "parent module, capture with stop=False"
        )

    def __getattr__(self, name: str) -> Never:
        if (name.startswith("__") and name.endswith("__")) or name.startswith(
            ("_repr_", "_ipython")
        ):
            raise AttributeError(name)  # looked up by copy, pickle and notebooks
        self._refuse()

    @classmethod
    def __torch_function__(
        cls, func: object, types: object, args: tuple[object, ...] = (), kwargs: Any = None
    ) -> Never:
        given: list[Any] = [*args, *(kwargs or {}).values()]
        while not isinstance(given[0], cls):  # torch.stack and similar functions take lists
            first = given.pop(0)
            given += first if isinstance(first, list | tuple) else []
        given[0]._refuse()

    def __format__(self, spec: str) -> str:
        return repr(self) if not spec else self._refuse()

    __setattr__ = __getitem__ = __setitem__ = __iter__ = __len__ = __bool__ = __call__ = _refuse
    __contains__ = __float__ = __int__ = __index__ = __eq__ = __ne__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __neg__ = __pos__ = __abs__ = __invert__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _refuse
    __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _refuse
    __matmul__ = __rmatmul__ = __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = _refuse
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __divmod__ = __rdivmod__ = _refuse
    __round__ = __trunc__ = __floor__ = __ceil__ = __complex__ = _refuse
    __next__ = __reversed__ = __delitem__ = __delattr__ = __array__ = _refuse
    __hash__ = object.__hash__


Stopped.__module__ = "actctx"  # where users find it
