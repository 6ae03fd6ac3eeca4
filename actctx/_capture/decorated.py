"""The calls of a decorated function: its parameters, and the capture of each call."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from actctx._capture.capture import Capture
from actctx._capture.opening import Scope
from actctx._errors import OptionError
from actctx._results.activations import Activations
from actctx._results.annotations import Claim, mentions_array_type
from actctx._results.schema import Schema

ModelOf = nn.Module | Callable[..., nn.Module]

Open = Callable[[Mapping[str, Any], tuple[Any, ...], Any], Capture[Any]]


class Function:
    """A decorated function: the parameter for the buffer, and the annotated parameters."""

    def __init__(self, function: Callable[..., Any], open_for: Open, handed: type) -> None:
        self.function = function
        self.open_for = open_for
        self.signature = inspect.signature(function)
        hints = _hints(function, self.signature)
        self.buffer = _buffer_parameter(self.signature, hints, handed)
        if issubclass(handed, Schema):
            _check_readable(function, hints)
        self.arrays = {name: hint for name, hint in hints.items() if mentions_array_type(hint)}
        self.shown = self.signature.replace(
            parameters=[p for p in self.signature.parameters.values() if p.name != self.buffer]
        )

    def claims(self, arguments: Mapping[str, Any]) -> list[Claim]:
        """List the jaxtyping annotations of arguments, or of the result under `return`."""
        claims = []
        for name, hint in self.arrays.items():
            what = "the result" if name == "return" else f"the argument {name!r}"
            given = [arguments[name]] if name in arguments else []
            kind = self.signature.parameters[name].kind if name != "return" else None
            if given and kind is inspect.Parameter.VAR_POSITIONAL:
                given = [*given[0]]
            elif given and kind is inspect.Parameter.VAR_KEYWORD:
                given = [*given[0].values()]
            claims += [Claim(f"{what} of {_name_of(self.function)}", each, hint) for each in given]
        return claims


class Call:
    """One call of a decorated function, with its own capture."""

    def __init__(
        self, function: Function, args: Any, kwargs: Any, *, scope: Scope = "block"
    ) -> None:
        self._function = function
        if function.buffer in kwargs:
            raise TypeError(
                f"{_name_of(function.function)}() receives {function.buffer!r} from @captures, "
                "not from its callers; leave it out of the call"
            )
        self._bound = function.shown.bind(*args, **kwargs)
        capturing = function.open_for(self._bound.arguments, args, kwargs)
        self.opening = capturing.prepared(scope)

    def start(self) -> Any:
        """Call the function, passing the buffer if it has a parameter for it.

        Raises:
            TypedError: An argument does not fit its annotation, in the scope of a `Schema`.

        """
        function, bound = self._function, self._bound
        if isinstance(self.opening.handed, Schema):
            self.opening.handed.check(function.claims(bound.arguments))
        if function.buffer is None:
            return function.function(*bound.args, **bound.kwargs)
        given = {**bound.arguments, function.buffer: self.opening.handed}
        # In the order of the parameters, as `BoundArguments` requires.
        ordered = {name: given[name] for name in function.signature.parameters if name in given}
        call = inspect.BoundArguments(function.signature, ordered)
        return function.function(*call.args, **call.kwargs)

    def finish(self, *result: Any) -> None:
        """Check what the call captured, and its result if it has one."""
        returned = dict(zip(["return"], result, strict=False))
        self.opening.finish(self._function.claims(self._bound.arguments | returned))

    def give(self, result: Any) -> Any:
        """Return the result of the call, with the buffer unless the function received it."""
        return (result, self.opening.handed) if self._function.buffer is None else result


def check_names(names: Any, misplaced: tuple[object, ...] = ()) -> None:
    """Refuse a decorator without names, which was given the function itself.

    Args:
        names: The names to capture.
        misplaced: Positional arguments after them, where `capture` has the names.

    Raises:
        OptionError: The names are a function, or there are arguments after them.

    """
    if misplaced:
        is_model = isinstance(names, nn.Module) and not isinstance(misplaced[0], nn.Module)
        wanted = misplaced[0] if is_model else names
        shown = repr(wanted) if isinstance(wanted, str) else "names"
        given = ", ".join(type(each).__name__ for each in (names, *misplaced))
        raise OptionError(
            f"@captures takes only the names by position, but got ({given}); write "
            f"@captures({shown}, model=model), or omit the model if it is an argument of the calls"
        )
    if inspect.isfunction(names) and names.__name__ != "<lambda>":
        parameters = inspect.signature(names).parameters
        if len(parameters) != 1:
            raise OptionError(
                f"@captures got the function {names.__name__!r} instead of the names to capture; "
                "give names, as in @captures('blocks.0.hook_resid_post')"
            )


def check_function(function: Any) -> None:
    """Refuse objects that cannot be wrapped, and say what to do instead."""
    if isinstance(function, nn.Module):
        raise OptionError(
            f"@captures decorates a function, but got a {type(function).__name__}; give the names "
            "to capture first, as in @captures('blocks.0.hook_resid_post')"
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
    """Read a function's annotations, those of parameters and of `return`, one by one.

    Annotations that only a type checker can read stay strings.
    """
    written = {name: p.annotation for name, p in signature.parameters.items()}
    written["return"] = signature.return_annotation
    names = getattr(inspect.unwrap(function), "__globals__", {})
    return {
        name: _hint(annotation, names)
        for name, annotation in written.items()
        if annotation is not inspect.Parameter.empty
    }


def _hint(annotation: Any, names: dict[str, Any]) -> Any:
    alone = types.SimpleNamespace(__annotations__={"it": annotation})
    try:
        return typing.get_type_hints(alone, globalns=names)["it"]
    except (NameError, TypeError, SyntaxError, AttributeError):
        return annotation


def _buffer_parameter(
    signature: inspect.Signature, hints: Mapping[str, Any], handed: type
) -> str | None:
    """Find the parameter for the buffer: one annotated as such, or named `acts`.

    Raises:
        OptionError: The parameter `acts` is annotated as another kind of buffer.

    """
    for name in signature.parameters:
        hint = hints.get(name)
        is_named = isinstance(hint, str) and hint.rpartition(".")[2] == handed.__name__
        if hint is handed or is_named:
            return name
    if "acts" not in signature.parameters:
        return None
    hint = hints.get("acts")
    if isinstance(hint, type) and issubclass(hint, Activations | Schema):
        raise OptionError(
            f"the parameter 'acts' is annotated {hint.__name__}, but it receives "
            f"{handed.__name__}; annotate it so"
        )
    return "acts"


def _check_readable(function: Any, hints: Mapping[str, Any]) -> None:
    """Refuse annotations of tensors that cannot be read, and so cannot be checked."""
    for name, hint in hints.items():
        if isinstance(hint, str) and "Tensor" in hint:
            raise OptionError(
                f"the annotation {hint} of {name!r} cannot be read, so it could not be checked "
                f"against a Schema; import what it names where the module of {_name_of(function)} "
                "can see it"
            )


def _name_of(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)


def model_of(
    model: ModelOf | None, arguments: Mapping[str, Any], args: tuple[Any, ...], kwargs: Any
) -> nn.Module:
    """Find the model of a call.

    Raises:
        OptionError: There is none, or `model` is neither one nor a function.

    """
    if isinstance(model, nn.Module):
        return model
    if callable(model):
        return model(*args, **kwargs)
    if model is not None:
        raise OptionError(
            f"@captures(..., model={model!r}) is not a model; give one, or a function that finds "
            "it among the arguments of a call, as in model=lambda self, *args, **kwargs: "
            "self.model"
        )
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
