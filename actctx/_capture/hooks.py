"""Add hooks to hook points and modules, find them again, and remove them."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from actctx._errors import CaptureStateError
from actctx._model.structure import Inputs

Fire = Callable[[Any], None]
"""The callback of a hook."""


class Hook:
    """One hook of an open capture, on a hook point or a module.

    It returns None, so it does not change the value. Adding it may be interrupted at any point, so
    it is removed wherever it is found, not by a handle that may never have been returned.
    """

    def __init__(self, module: nn.Module, name: str, fire: Fire, *, io: str) -> None:
        kind = {"in": _InputHook, "out": _OutputHook, "point": _PointHook}[io]
        self._module: Any = module
        self._hook = kind(module, name, fire)
        self._number = -1

    def put_on(self) -> None:
        """Add the hook."""
        if isinstance(self._hook, _PointHook):
            self._put_on_hook_point()
        elif isinstance(self._hook, _InputHook):
            self._number = self._module.register_forward_pre_hook(self._hook, with_kwargs=True).id
        else:
            self._number = self._module.register_forward_hook(self._hook).id

    def _put_on_hook_point(self) -> None:
        # Its own `add_hook`, since a plain torch hook would miss `hook_conversion`, which splits
        # queries into heads, for example. TransformerLens 3 does not return what it appends.
        point = self._module
        lens = point.add_hook(self._hook) or point.fwd_hooks[-1]
        self._number = lens.hook.id
        # TransformerLens registers a closure, which a copy of the model would share.
        hooks = point._forward_hooks
        hooks[self._number] = _OwnHook(self._hook, hooks[self._number])

    @property
    def is_attached(self) -> bool:
        """Whether the hook is still where it was added."""
        return self._number in self._module._forward_hooks or (
            self._number in self._module._forward_pre_hooks
        )

    def remove(self) -> None:
        """Remove the hook, if it was added."""
        module = self._module
        places = (module._forward_hooks, module._forward_pre_hooks)
        found = [n for hooks in places for n, hook in list(hooks.items()) if self._is_in(hook)]
        numbers = {self._number, *found}
        for number in numbers:
            for hooks in (*places, module._forward_pre_hooks_with_kwargs):
                hooks.pop(number, None)
        if isinstance(self._hook, _PointHook):
            module.fwd_hooks[:] = [lens for lens in module.fwd_hooks if lens.hook.id not in numbers]

    def _is_in(self, registered: Any) -> bool:
        # A closure of TransformerLens refers to its hook.
        cells = getattr(registered, "__closure__", None) or ()
        return any(each is self._hook for each in (registered, *gc.get_referents(*cells)))


def _ignore(*_args: object, **_kwargs: object) -> None:
    """Do nothing: replaces a hook in a copy of a model that was made during a capture."""


def _idle() -> Callable[..., None]:
    return _ignore


class _SiteHook:
    """A callable that names its site, since TransformerLens shows the repr of its hooks."""

    def __init__(self, module: nn.Module, site: str, fire: Fire) -> None:
        self._module = weakref.ref(module)
        self._site = site
        self._fire = fire

    def check(self, module: nn.Module) -> None:
        """Refuse another module than the one it was added to.

        Raises:
            CaptureStateError: It is a shallow copy, which shares hooks and `forward` with it.

        """
        if module is not self._module():
            raise CaptureStateError(
                f"a shallow copy of the {type(module).__name__} that is captured ran, such as a "
                "replica of DataParallel; it shares the forward and the hooks of the original, so "
                "it can neither be captured nor run by itself; capture from the module that "
                "DataParallel wraps, on one device, or run one process per device; for other "
                "copies use copy.deepcopy"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return (_idle, ())

    def __repr__(self) -> str:
        return f"actctx.capture({self._site!r})"


class _OwnHook:
    """A torch hook that is not copied with its hook point."""

    def __init__(self, made_for: _SiteHook, hook: Callable[..., Any]) -> None:
        self._made_for = made_for
        self._hook = hook

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        made_for = self._made_for
        if module is not made_for._module():
            made_for.check(module)
        if module.__dict__.get("hook_conversion", made_for) is None:
            made_for._fire(output)  # what TransformerLens' own would come to
        else:
            self._hook(module, args, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_idle, ())


class _PointHook(_SiteHook):
    def __call__(self, activation: Any, hook: Any) -> None:  # noqa: ARG002  TransformerLens passes it
        self._fire(activation)


class _InputHook(_SiteHook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.check(module)
        self._fire(Inputs(module, args, kwargs))


class _OutputHook(_SiteHook):
    def __call__(self, module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if module is not self._module():  # checked here first, since calling costs as much
            self.check(module)
        self._fire(output)
