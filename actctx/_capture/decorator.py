"""The decorator: a new capture for each call."""

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

from actctx._capture.capture import Capture, CaptureOptions, S, capture
from actctx._capture.decorated import Call, Function, ModelOf, check_function, check_names, model_of
from actctx._model.sites import Names
from actctx._results.activations import Activations
from actctx._results.schema import Schema

P = ParamSpec("P")
R = TypeVar("R")
B = TypeVar("B")
First = TypeVar("First")


class _Untyped:
    """A type that only unannotated parameters accept."""


@runtime_checkable
class _Decorator(Protocol[B]):
    @overload
    def __call__(self, function: Callable[Concatenate[_Untyped, P], R]) -> Callable[..., Any]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[B, P], R]) -> Callable[P, R]: ...
    @overload
    def __call__(
        self, function: Callable[Concatenate[First, _Untyped, P], R]
    ) -> Callable[..., Any]: ...
    @overload
    def __call__(
        self, function: Callable[Concatenate[First, B, P], R]
    ) -> Callable[Concatenate[First, P], R]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, function: Callable[P, Coroutine[Any, Any, R]]
    ) -> Callable[P, Coroutine[Any, Any, tuple[R, B]]]: ...
    @overload
    def __call__(self, function: Callable[P, R]) -> Callable[P, tuple[R, B]]: ...


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
    *_misplaced: object,
    model: ModelOf | None = None,
    **options: Unpack[CaptureOptions],
) -> _Decorator[Any]:
    """Decorate a function so that each call runs in its own capture.

    A parameter that is annotated `Activations`, or named `acts`, receives the live buffer; with
    `@captures(Acts)`, a parameter that is annotated `Acts` receives the live `Acts`. A call then
    returns the function's own result. Without such a parameter, a call returns `(result, acts)`, as
    `run_with_cache` returns `(logits, cache)`. Callers do not pass the buffer, and it is not in the
    signature of the decorated function. Put the parameter first, or after `self`, so that type
    checkers know this too.

    Plain functions, methods, coroutines, generators and async generators can be decorated. The
    hooks are on while the function runs, and off while a generator waits to be resumed.

    Args:
        names: What to capture; see `capture`.
        model: The model, or a function that finds it from the call's arguments, such as
            `lambda self, *args, **kwargs: self.model`. By default the first `torch.nn.Module`
            among the arguments of the call.
        **options: Those of `capture`. With a `Schema`, `check` is also for the arguments and the
            result of each call that are annotated with jaxtyping: they are checked in one scope
            with its fields.

    Raises:
        OptionError: A class or something else than a function is decorated; its parameter `acts` is
            annotated as another kind of buffer; an annotation cannot be read; or a call has no
            model among its arguments.
        TypedError: An argument or a result of a call does not fit its annotation, in the scope
            of a `Schema`.
        ActctxError: In a call, as `capture` and its block raise.

    Example:
        >>> @captures("blocks.0.hook_resid_post", slice={"pos": -1})
        ... def norms(acts: Activations, model, tokens):
        ...     model(tokens)
        ...     return acts.tensor.norm(dim=-1)
        >>> norms(model, tokens).shape
        torch.Size([4])

    """
    check_names(names, _misplaced)
    unknown = [name for name in options if name not in CaptureOptions.__annotations__]
    if unknown:
        raise TypeError(f"captures() got an unexpected keyword argument {unknown[0]!r}")
    if isinstance(names, Iterator):  # the first call would use it up
        names = list(names)
    handed = names if isinstance(names, type) and issubclass(names, Schema) else Activations

    def open_for(arguments: Mapping[str, Any], args: tuple[Any, ...], kwargs: Any) -> Capture[Any]:
        return capture(model_of(model, arguments, args, kwargs), names, **options)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        check_function(function)
        decorated = Function(function, open_for, handed)
        wrapper = functools.wraps(function)(_wrapper(decorated))
        if decorated.buffer is not None:
            wrapper.__signature__ = decorated.shown  # type: ignore[attr-defined]
        return wrapper

    return typing.cast(_Decorator[Any], decorate)


def _with_options_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of `captures`, with the options of another function by name."""
    own = inspect.signature(captures).parameters
    options = inspect.signature(function).parameters
    listed = [own["names"], own["model"], *list(options.values())[2:]]
    return inspect.Signature(listed, return_annotation=_Decorator[Any])


captures.__module__ = "actctx"  # where users find it
captures.__signature__ = _with_options_of(capture)  # type: ignore[attr-defined]


def _wrapper(function: Function) -> Callable[..., Any]:
    """Wrap a function of any kind."""
    if inspect.iscoroutinefunction(function.function):
        return _around_coroutine(function)
    if inspect.isgeneratorfunction(function.function):
        return _around_generator(function)
    if inspect.isasyncgenfunction(function.function):
        return _around_async_generator(function)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = Call(function, args, kwargs)
        with call.opening:
            result = call.start()
        call.finish(result)
        return call.give(result)

    return wrapper


def _around_coroutine(function: Function) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = Call(function, args, kwargs, scope="context")
        with call.opening:
            result = await call.start()
        call.finish(result)
        return call.give(result)

    return wrapper


def _around_generator(function: Function) -> Callable[..., Any]:
    def returning(*args: Any, **kwargs: Any) -> Any:
        call = Call(function, args, kwargs)
        return call.give(_driven(call.start(), call))

    def receiving(*args: Any, **kwargs: Any) -> Any:
        return (yield from returning(*args, **kwargs))

    return returning if function.buffer is None else receiving


def _around_async_generator(function: Function) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = Call(function, args, kwargs, scope="context")
        return call.give(_driven_async(call.start(), call))

    return wrapper


def _driven(generator: Any, call: Call) -> Any:
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


async def _driven_async(generator: Any, call: Call) -> Any:
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
