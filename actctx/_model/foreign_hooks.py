"""Hooks of others, which may change what is captured.

# NOTE [Which ones count]
A hook that only reads changes no value, and this is not known before it runs. So all hooks of
others are listed, and in the first forward the values before and after them are compared. Hooks of
libraries are left out, such as those of bridges, tensor parallelism and captures.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every
from torch.utils import _pytree
from torch.utils.hooks import RemovableHandle

from actctx._model.plain_values import describe_function, is_foreign

_INPUT, _OUTPUT = "input", "output"


def list_hooks(model: nn.Module) -> dict[str, list[list[str]]]:
    """List the hooks of others by place, with the name and a digest of each."""
    return {
        place: [[*describe_function(hook)] for hook in hooks]
        for place, _, _, hooks in _places(model)
    }


@contextlib.contextmanager
def noting_changes(model: nn.Module) -> Iterator[set[str]]:
    """Record, while a forward runs, the places whose hooks change values."""
    changing: set[str] = set()
    handles: list[RemovableHandle] = []
    try:
        for place, module, io, _ in _places(model):
            handles += _Between(place, changing).put_on(module, io)
        yield changing
    finally:
        for handle in handles:
            handle.remove()


def _places(model: nn.Module) -> Iterator[tuple[str, nn.Module | None, str, list[Any]]]:
    """Find where others have hooks: the place, the module, the side, and the hooks."""
    both = ((_INPUT, every._global_forward_pre_hooks), (_OUTPUT, every._global_forward_hooks))
    for io, hooks in both:
        if foreign := [hook for hook in hooks.values() if is_foreign(hook)]:
            yield f"{io} of every module", None, io, foreign
    for name, module in model.named_modules():
        for io, hooks in ((_INPUT, module._forward_pre_hooks), (_OUTPUT, module._forward_hooks)):
            if hooks and (foreign := [hook for hook in hooks.values() if is_foreign(hook)]):
                yield f"{io} of {name!r}", module, io, foreign


class _Between:
    """Compares the values before and after the hooks of a place."""

    def __init__(self, place: str, changing: set[str]) -> None:
        self._place = place
        self._changing = changing
        self._before: list[list[Tensor]] = []

    def put_on(self, module: nn.Module | None, io: str) -> list[RemovableHandle]:
        """Add a hook before all others, and one after them."""
        if module is None:
            register: Callable[..., RemovableHandle] = (
                every.register_module_forward_pre_hook
                if io == _INPUT
                else every.register_module_forward_hook
            )
            first, last = register(self._first), register(self._last)
            hooks: Any = first.hooks_dict_ref()
            hooks.move_to_end(first.id, last=False)
            return [first, last]
        if io == _INPUT:
            put = module.register_forward_pre_hook
            return [
                put(self._first, prepend=True, with_kwargs=True),
                put(self._last, with_kwargs=True),
            ]
        return [
            module.register_forward_hook(self._first, prepend=True),
            module.register_forward_hook(self._last),
        ]

    def _first(self, _module: nn.Module, *passing: Any) -> None:
        self._before.append([each.detach().clone() for each in _tensors(passing)])

    def _last(self, _module: nn.Module, *passing: Any) -> None:
        before, now = self._before.pop(), _tensors(passing)
        if len(before) != len(now) or not all(map(_is_same, before, now)):
            self._changing.add(self._place)


def _tensors(passing: Any) -> list[Tensor]:
    return [each for each in _pytree.tree_leaves(passing) if isinstance(each, Tensor)]


def _is_same(was: Tensor, now: Tensor) -> bool:
    if (was.shape, was.dtype, was.device) != (now.shape, now.dtype, now.device):
        return False
    with torch.no_grad():
        return bool(((was == now) | ((was != was) & (now != now))).all())  # noqa: PLR0124  NaN
