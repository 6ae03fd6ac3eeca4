"""Hooks on hook points and modules: put on, found again, taken off."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from actctx._outputs import Inputs
from actctx._places import Place

Fire = Callable[[nn.Module | None, Any], None]
"""What a hook calls: with the module that fired (None for a hook point), and its value."""


class Hook:
    """One hook of an open capture, on a hook point or a module.

    It changes nothing of what passes: it returns None, which torch and TransformerLens take to
    mean "as it was".
    """

    def __init__(self, place: Place, io: str, fire: Fire) -> None:
        self._place = place
        self._lens: Any = None
        if place.is_hook_point:
            self._handle = self._on_hook_point(fire)
        elif io == "in":
            self._handle = place.module.register_forward_pre_hook(
                _InputHook(place.name, fire), with_kwargs=True
            )
        else:
            self._handle = place.module.register_forward_hook(_OutputHook(place.name, fire))

    def _on_hook_point(self, fire: Fire) -> Any:
        # Its own `add_hook`, since a plain torch hook would miss `hook_conversion`, which for one
        # splits queries into heads. TransformerLens 3 does not return what it appends.
        point: Any = self._place.module
        self._lens = point.add_hook(_PointHook(self._place.name, fire)) or point.fwd_hooks[-1]
        handle = self._lens.hook
        # What TransformerLens registers is a closure, which a copy of the model would share.
        hooks = point._forward_hooks
        hooks[handle.id] = _OwnHook(point, hooks[handle.id])
        return handle

    @property
    def is_attached(self) -> bool:
        """Whether the hook is still where it was put."""
        return self._handle.id in self._place.module._forward_hooks or (
            self._handle.id in self._place.module._forward_pre_hooks
        )

    def remove(self) -> None:
        """Take the hook off; a hook that somebody else took off already stays off."""
        self._handle.remove()
        if self._lens is not None:
            point: Any = self._place.module
            point.fwd_hooks[:] = [lens for lens in point.fwd_hooks if lens is not self._lens]


def _ignore(*_args: object, **_kwargs: object) -> None:
    """Do nothing, in place of a hook, in a copy of a model that was made during a capture."""


def _idle() -> Callable[..., None]:
    return _ignore


class _OwnHook:
    """A torch hook that only the module it was put on keeps."""

    def __init__(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        self._module = weakref.ref(module)
        self._hook = hook

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self._hook(module, args, output) if module is self._module() else None

    def __reduce__(self) -> tuple[Any, ...]:
        return (_idle, ())


class _SiteHook:
    """A callable that names its site, since TransformerLens shows the repr of its hooks."""

    def __init__(self, site: str, fire: Fire) -> None:
        self._site = site
        self._fire = fire

    def __reduce__(self) -> tuple[Any, ...]:
        return (_idle, ())

    def __repr__(self) -> str:
        return f"actctx.capture({self._site!r})"


class _PointHook(_SiteHook):
    def __call__(self, activation: Any, hook: Any) -> None:  # noqa: ARG002  TransformerLens passes it
        self._fire(None, activation)


class _InputHook(_SiteHook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._fire(module, Inputs(module, args, kwargs))


class _OutputHook(_SiteHook):
    def __call__(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        self._fire(module, output)
