"""The decorator: a fresh capture for each call."""

import functools
import inspect
import typing
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from actctx._activations import Activations
from actctx._capture import Capture, capture
from actctx._errors import OptionError
from actctx._names import Names
from actctx._opening import Opening
from actctx._select import Slice

P = ParamSpec("P")
R = TypeVar("R")

ModelOf = nn.Module | Callable[..., nn.Module]


@runtime_checkable
class _Decorator(Protocol):
    @overload
    def __call__(self, function: Callable[Concatenate[Activations, P], R]) -> Callable[P, R]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[P, Coroutine[Any, Any, R]]
    ) -> Callable[P, Coroutine[Any, Any, tuple[R, Activations]]]: ...
    @overload
    def __call__(self, function: Callable[P, R]) -> Callable[P, tuple[R, Activations]]: ...


def captures(
    names: Names,
    *,
    model: ModelOf | None = None,
    slice: Slice = None,  # noqa: A002  as in `capture`
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    stop: bool = False,
    join: str | None = "batch",
    mask: Shaped[Tensor, "batch pos"] | str | None = None,
    capacity: int | None = None,
    grad: bool = False,
) -> _Decorator:
    """Decorate a function so that each call of it runs in a capture of its own.

    A function with a parameter that is annotated `Activations`, or named `acts`, receives the
    live buffer there, and its result is returned as it is. Otherwise a call returns
    `(result, acts)`, as `run_with_cache` returns `(logits, cache)`. Callers do not pass the
    buffer, and it is not in the decorated function's signature; put the parameter first and
    type checkers know that as well.

    Plain functions, methods, coroutines, generators and async generators can be decorated. The
    hooks are on while the function runs, and off while a generator waits to be resumed.

    Args:
        names: What to capture; see `capture`.
        model: The model, or a function that finds it from the call's arguments, such as
            `lambda self, *args, **kwargs: self.model`. By default the first `torch.nn.Module`
            among the arguments of the call.
        slice: See `capture`, as for all options that follow.
        dtype: See `capture`.
        device: See `capture`.
        stop: See `capture`.
        join: See `capture`.
        mask: See `capture`.
        capacity: See `capture`.
        grad: See `capture`.

    Raises:
        OptionError: What is decorated is a class or no function; or a call has no model among
            its arguments.

    Example:
        >>> @captures("blocks.0.hook_resid_post", slice={"pos": -1})
        ... def norms(acts: Activations, model, tokens):
        ...     model(tokens)
        ...     return acts.tensor.norm(dim=-1)
        >>> norms(model, tokens).shape
        torch.Size([4])

    """
    if isinstance(names, Iterator):  # it would be used up by the first call
        names = list(names)

    def open_for(arguments: Mapping[str, Any], args: tuple[Any, ...], kwargs: Any) -> Capture:
        return capture(
            _model_of(model, arguments, args, kwargs),
            names,
            slice=slice,
            dtype=dtype,
            device=device,
            stop=stop,
            join=join,
            mask=mask,
            capacity=capacity,
            grad=grad,
        )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        _check_function(function)
        call = _Call(function, open_for)
        wrapper = functools.wraps(function)(_wrapper(call))
        if call.buffer is not None:
            wrapper.__signature__ = call.shown  # type: ignore[attr-defined]
        return wrapper

    return typing.cast(_Decorator, decorate)


_Open = Callable[[Mapping[str, Any], tuple[Any, ...], Any], Capture]


class _Call:
    """How a decorated function is called, and what a call of it gives back."""

    def __init__(self, function: Callable[..., Any], open_for: _Open) -> None:
        self.function = function
        self._open_for = open_for
        self._signature = inspect.signature(function)
        self.buffer = _buffer_parameter(function, self._signature)
        self.shown = self._signature.replace(
            parameters=[p for p in self._signature.parameters.values() if p.name != self.buffer]
        )

    def bind(self, args: Any, kwargs: Any) -> tuple[Capture, Callable[[Activations], Any]]:
        """Return the capture for one call, and the call itself, which wants the buffer."""
        bound = self.shown.bind(*args, **kwargs)
        return self._open_for(bound.arguments, args, kwargs), functools.partial(self._run, bound)

    def _run(self, bound: inspect.BoundArguments, acts: Activations) -> Any:
        if self.buffer is None:
            return self.function(*bound.args, **bound.kwargs)
        given = {**bound.arguments, self.buffer: acts}
        # In the order of the parameters, as `BoundArguments` wants them.
        ordered = {name: given[name] for name in self._signature.parameters if name in given}
        call = inspect.BoundArguments(self._signature, ordered)
        return self.function(*call.args, **call.kwargs)

    def give(self, result: Any, acts: Activations) -> Any:
        """Return what a call gives back: a function that received the buffer has it already."""
        return (result, acts) if self.buffer is None else result


def _wrapper(call: _Call) -> Callable[..., Any]:
    """Wrap a function of any kind."""
    if inspect.iscoroutinefunction(call.function):
        return _around_coroutine(call)
    if inspect.isgeneratorfunction(call.function):
        return _around_generator(call)
    if inspect.isasyncgenfunction(call.function):
        return _around_async_generator(call)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        capturing, run = call.bind(args, kwargs)
        with capturing as acts:
            result = run(acts)
        return call.give(result, acts)

    return wrapper


def _around_coroutine(call: _Call) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        capturing, run = call.bind(args, kwargs)
        opening = capturing.prepared("context")
        with opening as acts:
            result = await run(acts)
        opening.check_fired()
        return call.give(result, acts)

    return wrapper


def _around_generator(call: _Call) -> Callable[..., Any]:
    def run(args: Any, kwargs: Any) -> tuple[Any, Activations]:
        capturing, start = call.bind(args, kwargs)
        opening = capturing.prepared()
        return _driven(start(opening.buffer), opening), opening.buffer

    def returning(*args: Any, **kwargs: Any) -> Any:
        return run(args, kwargs)

    def receiving(*args: Any, **kwargs: Any) -> Any:
        return (yield from run(args, kwargs)[0])

    return returning if call.buffer is None else receiving


def _around_async_generator(call: _Call) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        capturing, start = call.bind(args, kwargs)
        opening = capturing.prepared("context")
        return call.give(_driven_async(start(opening.buffer), opening), opening.buffer)

    return wrapper


def _driven(generator: Any, opening: Opening) -> Any:
    """Run a generator with hooks that are on only while it runs."""

    def step(resume: Callable[..., Any], *value: Any) -> Any:
        with opening:
            return resume(*value)

    try:
        item = step(generator.send, None)
        while True:
            try:
                sent = yield item
            except GeneratorExit:
                step(generator.close)
                raise
            except BaseException as error:  # noqa: BLE001  whatever it is, it is the generator's
                item = step(generator.throw, error)
            else:
                item = step(generator.send, sent)
    except StopIteration as end:
        opening.check_fired()
        return end.value


async def _driven_async(generator: Any, opening: Opening) -> Any:
    """Run an async generator with hooks that are on only while it runs."""

    async def step(resume: Callable[..., Any], *value: Any) -> Any:
        with opening:
            return await resume(*value)

    try:
        item = await step(generator.asend, None)
        while True:
            try:
                sent = yield item
            except GeneratorExit:
                await step(generator.aclose)
                raise
            except BaseException as error:  # noqa: BLE001  whatever it is, it is the generator's
                item = await step(generator.athrow, error)
            else:
                item = await step(generator.asend, sent)
    except StopAsyncIteration:
        opening.check_fired()


def _check_function(function: Any) -> None:
    """Refuse what cannot be wrapped, with what to do instead."""
    if isinstance(function, nn.Module):
        raise OptionError(
            f"@captures wants to decorate a function but got a {type(function).__name__}; name "
            "what to capture, as in @captures('blocks.0.hook_resid_post')"
        )
    if isinstance(function, type):
        raise OptionError(
            f"@captures cannot decorate the class {function.__name__!r}; decorate its methods"
        )
    if isinstance(function, staticmethod | classmethod):
        raise OptionError(
            f"@captures cannot decorate a {type(function).__name__}; write @captures(...) below "
            f"@{type(function).__name__}"
        )
    if not callable(function):
        raise OptionError(f"@captures decorates a function, not {function!r}")


def _buffer_parameter(function: Callable[..., Any], signature: inspect.Signature) -> str | None:
    """Find the parameter that wants the buffer: annotated `Activations`, or named `acts`."""
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError, SyntaxError, AttributeError):  # for type checkers, or no types
        hints = {name: p.annotation for name, p in signature.parameters.items()}
    for name in signature.parameters:
        hint = hints.get(name)
        if hint is Activations or Activations in typing.get_args(hint):
            return name
        if isinstance(hint, str) and hint.rpartition(".")[2] == "Activations":
            return name
    return "acts" if "acts" in signature.parameters else None


def _model_of(
    model: ModelOf | None, arguments: Mapping[str, Any], args: tuple[Any, ...], kwargs: Any
) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if model is not None:
        return model(*args, **kwargs)
    for value in arguments.values():
        nested = value if isinstance(value, tuple) else (value,)
        nested = tuple(value.values()) if isinstance(value, dict) else nested
        for inner in nested:
            if isinstance(inner, nn.Module):
                return inner
    raise OptionError(
        f"no torch module is among the arguments {', '.join(arguments) or '(none)'} of this call; "
        "pass the model, or say where it is: @captures(..., model=model), or "
        "model=lambda self, *args, **kwargs: self.model for a method"
    )
