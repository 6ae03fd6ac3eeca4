"""The decorator: a fresh capture for each call."""

import functools
import inspect
import typing
from collections.abc import Callable, Coroutine, Iterator, Mapping
from typing import (
    Any,
    Concatenate,
    ParamSpec,
    Protocol,
    TypeVar,
    Unpack,
    overload,
    runtime_checkable,
)

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from actctx._activations import Activations
from actctx._capture import Capture, CaptureOptions, S, capture
from actctx._errors import OptionError
from actctx._names import Names
from actctx._opening import Scope
from actctx._schema import Schema
from actctx._select import Slice
from actctx._typed import Claim, mentions_array_type

P = ParamSpec("P")
R = TypeVar("R")
B_co = TypeVar("B_co", covariant=True)

ModelOf = nn.Module | Callable[..., nn.Module]


@runtime_checkable
class _Decorator(Protocol[B_co]):
    @overload
    def __call__(self, function: Callable[Concatenate[B_co, P], R]) -> Callable[P, R]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[P, Coroutine[Any, Any, R]]
    ) -> Callable[P, Coroutine[Any, Any, tuple[R, B_co]]]: ...
    @overload
    def __call__(self, function: Callable[P, R]) -> Callable[P, tuple[R, B_co]]: ...


@overload
def captures(
    names: type[S], *, model: ModelOf | None = None, **options: Unpack[CaptureOptions]
) -> _Decorator[S]: ...
@overload
def captures(
    names: Names, *, model: ModelOf | None = None, **options: Unpack[CaptureOptions]
) -> _Decorator[Activations]: ...
def captures(
    names: Names | type[Schema],
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
    check: bool = True,
) -> _Decorator[Any]:
    """Decorate a function so that each call of it runs in a capture of its own.

    A function with a parameter that is annotated `Activations`, or named `acts`, receives the
    live buffer there, and with `@captures(Acts)` one that is annotated `Acts` the live `Acts`;
    its result is returned as it is. Otherwise a call returns `(result, acts)`, as
    `run_with_cache` returns `(logits, cache)`. Callers do not pass the buffer, and it is not in
    the decorated function's signature; put the parameter first and type checkers know that as
    well.

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
        check: See `capture`. With a `Schema`, the arguments and the result of each call that are
            annotated with jaxtyping are checked in one scope with its fields.

    Raises:
        OptionError: What is decorated is a class or no function; or a call has no model among
            its arguments.
        ActctxError: In a call, as `capture` and its block raise.

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

    def open_for(arguments: Mapping[str, Any], args: tuple[Any, ...], kwargs: Any) -> Capture[Any]:
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
            check=check,
        )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        _check_function(function)
        decorated = _Function(function, open_for)
        wrapper = functools.wraps(function)(_wrapper(decorated))
        if decorated.buffer is not None:
            wrapper.__signature__ = decorated.shown  # type: ignore[attr-defined]
        return wrapper

    return typing.cast(_Decorator[Any], decorate)


_Open = Callable[[Mapping[str, Any], tuple[Any, ...], Any], Capture[Any]]


class _Function:
    """A decorated function: which parameter wants the buffer, and which are annotated."""

    def __init__(self, function: Callable[..., Any], open_for: _Open) -> None:
        self.function = function
        self.open_for = open_for
        self.signature = inspect.signature(function)
        hints = _hints(function, self.signature)
        self.buffer = _buffer_parameter(self.signature, hints)
        self.arrays = {name: hint for name, hint in hints.items() if mentions_array_type(hint)}
        self.shown = self.signature.replace(
            parameters=[p for p in self.signature.parameters.values() if p.name != self.buffer]
        )

    def claims(self, arguments: Mapping[str, Any]) -> list[Claim]:
        """Say what arguments, or the result as `return`, are annotated to be, if with jaxtyping."""
        claims = []
        for name, hint in self.arrays.items():
            what = "the result" if name == "return" else f"the argument {name!r}"
            given = [arguments[name]] if name in arguments else []
            kind = self.signature.parameters[name].kind if name != "return" else None
            if given and kind is inspect.Parameter.VAR_POSITIONAL:
                given = [*given[0]]
            elif given and kind is inspect.Parameter.VAR_KEYWORD:
                given = [*given[0].values()]
            claims += [Claim(f"{what} of {self.function.__name__}", each, hint) for each in given]
        return claims


class _Call:
    """One call of a decorated function, and the capture that is its own."""

    def __init__(
        self, function: _Function, args: Any, kwargs: Any, *, scope: Scope = "block"
    ) -> None:
        self._function = function
        self._bound = function.shown.bind(*args, **kwargs)
        capturing = function.open_for(self._bound.arguments, args, kwargs)
        self.opening = capturing.prepared(scope)

    def start(self) -> Any:
        """Call the function, with the buffer where it wants it.

        Raises:
            TypedError: An argument does not fit its annotation, in the scope of a `Schema`.

        """
        function, bound = self._function, self._bound
        if isinstance(self.opening.handed, Schema):
            self.opening.handed.check(function.claims(bound.arguments))
        if function.buffer is None:
            return function.function(*bound.args, **bound.kwargs)
        given = {**bound.arguments, function.buffer: self.opening.handed}
        # In the order of the parameters, as `BoundArguments` wants them.
        ordered = {name: given[name] for name in function.signature.parameters if name in given}
        call = inspect.BoundArguments(function.signature, ordered)
        return function.function(*call.args, **call.kwargs)

    def finish(self, **result: Any) -> None:
        """Check what the call has left; `result` holds what it gives back, as `return`."""
        self.opening.finish(self._function.claims({**self._bound.arguments, **result}))

    def give(self, result: Any) -> Any:
        """Return what a call gives back: a function that received the buffer has it already."""
        return (result, self.opening.handed) if self._function.buffer is None else result


def _wrapper(function: _Function) -> Callable[..., Any]:
    """Wrap a function of any kind."""
    if inspect.iscoroutinefunction(function.function):
        return _around_coroutine(function)
    if inspect.isgeneratorfunction(function.function):
        return _around_generator(function)
    if inspect.isasyncgenfunction(function.function):
        return _around_async_generator(function)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = _Call(function, args, kwargs)
        with call.opening:
            result = call.start()
        call.finish(**{"return": result})
        return call.give(result)

    return wrapper


def _around_coroutine(function: _Function) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = _Call(function, args, kwargs, scope="context")
        with call.opening:
            result = await call.start()
        call.finish(**{"return": result})
        return call.give(result)

    return wrapper


def _around_generator(function: _Function) -> Callable[..., Any]:
    def returning(*args: Any, **kwargs: Any) -> Any:
        call = _Call(function, args, kwargs)
        return call.give(_driven(call.start(), call))

    def receiving(*args: Any, **kwargs: Any) -> Any:
        return (yield from returning(*args, **kwargs))

    return returning if function.buffer is None else receiving


def _around_async_generator(function: _Function) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = _Call(function, args, kwargs, scope="context")
        return call.give(_driven_async(call.start(), call))

    return wrapper


def _driven(generator: Any, call: _Call) -> Any:
    """Run a generator with hooks that are on only while it runs."""

    def step(resume: Callable[..., Any], *value: Any) -> Any:
        with call.opening:
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
        call.finish()
        return end.value


async def _driven_async(generator: Any, call: _Call) -> Any:
    """Run an async generator with hooks that are on only while it runs."""

    async def step(resume: Callable[..., Any], *value: Any) -> Any:
        with call.opening:
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
        call.finish()


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


def _hints(function: Callable[..., Any], signature: inspect.Signature) -> dict[str, Any]:
    """Read a function's annotations, those of parameters and of `return`."""
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, SyntaxError, AttributeError):  # for type checkers, or no types
        return {name: p.annotation for name, p in signature.parameters.items()}


def _buffer_parameter(signature: inspect.Signature, hints: Mapping[str, Any]) -> str | None:
    """Find the parameter that wants the buffer: annotated as one, or named `acts`."""
    for name in signature.parameters:
        hint = hints.get(name)
        kinds = [kind for kind in (hint, *typing.get_args(hint)) if isinstance(kind, type)]
        if any(issubclass(kind, Activations | Schema) for kind in kinds):
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
