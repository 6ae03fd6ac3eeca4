"""The decorator: a fresh capture for each call."""

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from actctx._activations import Activations
from actctx._capture import Capture, capture
from actctx._errors import OptionError
from actctx._names import Names
from actctx._select import Slice

P = ParamSpec("P")
R = TypeVar("R")

ModelOf = nn.Module | Callable[..., nn.Module]


@runtime_checkable
class _Decorator(Protocol):
    @overload
    def __call__(self, function: Callable[Concatenate[Activations, P], R]) -> Callable[P, R]: ...
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

    Args:
        names: What to capture; see `capture`.
        model: The model, or a function that finds it from the call's arguments, such as
            `lambda self, *args: self.model`. By default the first `torch.nn.Module` among the
            arguments of the call.
        slice: See `capture`, as for all options that follow.
        dtype: See `capture`.
        device: See `capture`.
        stop: See `capture`.
        join: See `capture`.
        mask: See `capture`.
        capacity: See `capture`.
        grad: See `capture`.

    Raises:
        OptionError: What is decorated is not a plain function or method; or a call has no model
            among its arguments.

    Example:
        >>> @captures("blocks.0.hook_resid_post", slice={"pos": -1})
        ... def norms(acts: Activations, model, tokens):
        ...     model(tokens)
        ...     return acts.tensor.norm(dim=-1)
        >>> norms(model, tokens).shape
        torch.Size([4])

    """

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
        signature = inspect.signature(function)
        buffer = _buffer_parameter(function, signature)
        if buffer is None:
            return _returning(function, signature, open_for)
        return _receiving(function, signature, buffer, open_for)

    return typing.cast(_Decorator, decorate)


_Open = Callable[[Mapping[str, Any], tuple[Any, ...], Any], Capture]


def _returning(
    function: Callable[..., Any], signature: inspect.Signature, open_for: _Open
) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        with open_for(arguments, args, kwargs) as acts:
            result = function(*args, **kwargs)
        return result, acts

    return wrapper


def _receiving(
    function: Callable[..., Any], signature: inspect.Signature, buffer: str, open_for: _Open
) -> Callable[..., Any]:
    shown = signature.replace(
        parameters=[p for name, p in signature.parameters.items() if name != buffer]
    )

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        bound = shown.bind(*args, **kwargs)
        with open_for(bound.arguments, args, kwargs) as acts:
            call = signature.bind_partial()
            call.arguments.update(bound.arguments, **{buffer: acts})
            # `arguments` must be in the order of the parameters.
            call.arguments = {
                p: call.arguments[p] for p in signature.parameters if p in call.arguments
            }
            return function(*call.args, **call.kwargs)

    wrapper.__signature__ = shown  # type: ignore[attr-defined]
    return wrapper


def _check_function(function: Any) -> None:
    """Refuse what cannot be wrapped, with what to do instead."""
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
    for kind, test in (
        ("async function", inspect.iscoroutinefunction),
        ("generator", inspect.isgeneratorfunction),
        ("async generator", inspect.isasyncgenfunction),
    ):
        if test(function):
            raise OptionError(
                f"@captures cannot decorate the {kind} {function.__name__!r}; use "
                "`with capture(...)` inside it"
            )


def _buffer_parameter(function: Callable[..., Any], signature: inspect.Signature) -> str | None:
    """Find the parameter that wants the buffer: annotated `Activations`, or named `acts`."""
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError):  # annotations that only a type checker can resolve
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
        "pass the model, or say where it is: @captures(..., model=lambda self, *args: self.model)"
    )
