"""Find places whose values depend on positions: rotary tables, and what they rotate.

# NOTE [What depends on positions]
A rotary embedding makes scores depend only on distances. But a module that runs between it and the
scores, such as a norm of the queries, is given vectors that are rotated by their own position.
These differ if padding is counted, and so do the scores if the module weights their entries. No
value shows this, so the source of the attention is searched for values from `apply_rotary_pos_emb`
and similar functions that are passed to a module.
"""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn

from actctx._model.places import Place

_SCALES = re.compile(r"scaling\([^()]*\bposition_ids\b")
_NAMED = re.compile(r"rotary|hook_(?:rot_|cos|sin)")


def depends_on_positions(core: nn.Module, place: Place) -> bool:
    """Return whether the values of a place depend on positions, not only on distances.

    These are rotary tables, and rotated values. If a norm after a rotary embedding has unequal
    weights, or scores are scaled by positions, the whole model depends on them.
    """
    # RoFormer may rotate values too.
    if _NAMED.search(place.name) or getattr(getattr(core, "config", None), "rotary_value", False):
        return True
    if any(_scales_in(type(module).forward) for module in core.modules()):
        return True
    turned = [
        child
        for module in core.modules()
        for name, child in module.named_children()
        if name in _turned_in(type(module).forward)
    ]
    return any(child is place.module or _has_differing_weights(child) for child in turned)


def _has_differing_weights(module: nn.Module) -> bool:
    return any(bool((each != each.flatten()[0]).any()) for each in module.parameters())


@functools.lru_cache
def _scales_in(forward: Callable[..., Any]) -> bool:
    """Return whether a forward scales something by the positions, as Mistral Large 4 does."""
    return _SCALES.search(_source(forward)) is not None


@functools.lru_cache
def _turned_in(forward: Callable[..., Any]) -> frozenset[str]:
    """List the attributes of a module that its forward calls on rotated values."""
    try:
        tree = ast.parse(textwrap.dedent(_source(forward)))
    except SyntaxError:
        return frozenset()
    turned: set[str] = set()
    found: set[str] = set()
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    for node in sorted(assigned, key=lambda each: each.lineno):
        targets, given = _names(node.targets[0]), _names(node.value)
        if _turns(node.value):
            turned |= targets
        elif given & turned:
            found |= _called_on(turned, node.value)
        else:
            turned -= targets
    return frozenset(found)


def _source(forward: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(forward)
    except (OSError, TypeError):
        return ""


def _turns(value: ast.expr) -> bool:
    function = value.func if isinstance(value, ast.Call) else None
    return isinstance(function, ast.Name) and function.id.startswith("apply_rot")


def _called_on(turned: set[str], value: ast.expr) -> set[str]:
    """List the attributes of `self` that are called on a rotated value."""
    return {
        node.func.attr
        for node in ast.walk(value)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and _names(node.func.value) == {"self"}
        and any(_names(each) & turned for each in node.args)
    }


def _names(tree: ast.expr) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
