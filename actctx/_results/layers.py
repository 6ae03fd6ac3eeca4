"""Find and stack the sites of one name over the layers of a model."""

import difflib
import re
from collections.abc import Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor

from actctx._errors import HookNameError, JoinError, NotCapturedError
from actctx._model.globs import meant
from actctx._text import shortened

# A number that is a part of a name, or the end of a part, as in `h.3` and `layer_3`.
_NUMBER = re.compile(r"(?<!\d)\d+(?=\.|$)")


def layers_of(names: Mapping[str, tuple[str, ...]], wanted: str) -> list[str]:
    """Find the sites of one name, in the order of their layers.

    Args:
        names: The names of each captured site, by its key.
        wanted: A name within a layer, or a suffix of it; an alias; or a pattern. If a layer has
            several sites with this suffix, the one whose full name within the layer it is takes
            precedence.

    Returns:
        Their keys.

    Raises:
        NotCapturedError: There are none.
        HookNameError: A layer has several, or they are of several stacks of layers.

    """
    found = in_layers(_of_kind(names, wanted))
    if not found:
        if any(wanted in (key, *every) for key, every in names.items()):
            raise NotCapturedError(
                f"{wanted!r} is one site, but stacking needs layers; give a name within a layer, "
                f"such as {_within(wanted)!r}"
            )
        within = {_within(name): None for every in names.values() for name in every}
        closest = difflib.get_close_matches(wanted, within, n=3, cutoff=0.5)
        hint = f"closest: {', '.join(map(repr, closest))}; " if closest else ""
        listed = shortened([repr(key) for key in names])
        raise NotCapturedError(
            f"no captured site is {wanted!r} within a layer; {hint}the captured names are "
            f"{listed}; give a name within a layer, as in stack('attn.hook_z'), or a pattern of "
            "whole names, as in stack('model.layers.*')"
        )
    double = several_in(found)
    if double is not None:
        what, one, other = double
        over = _NUMBER.sub("*", one, count=1)
        remedy = f"give a pattern of whole names, such as {over!r}"
        raise HookNameError(
            f"{wanted!r} means more than one {what}: {one!r} and {other!r}; "
            + (remedy if over != one else "read them one by one")
        )
    return [keys[0] for _, keys in sorted(found.items())]


def in_layers(names: Mapping[str, str]) -> dict[tuple[str, int], list[str]]:
    """Sort sites by the number of their layer.

    It is the one number in which the names differ, or else the first part that is a number.

    Args:
        names: The name of each site, by its key.

    Returns:
        The keys of those in a layer, by the text before its number, and by the number.

    """
    numbered = {key: [*_NUMBER.finditer(name)] for key, name in names.items()}
    alike = len({_NUMBER.sub("#", name) for name in names.values()}) == 1
    columns = [*zip(*numbered.values(), strict=True)] if alike else []
    varying = [dim for dim, found in enumerate(columns) if len({each[0] for each in found}) > 1]
    layers: dict[tuple[str, int], list[str]] = {}
    for key, name in names.items():
        found = numbered[key]
        if not found:
            continue
        whole = next((each for each in found if f".{name}"[each.start()] == "."), found[0])
        number = found[varying[0]] if len(varying) == 1 else whole
        layers.setdefault((name[: number.start()], int(number[0])), []).append(key)
    return layers


def several_in(layers: Mapping[tuple[str, int], list[str]]) -> tuple[str, str, str] | None:
    """Return two sites of one layer, or of two stacks of layers, with a description; or None."""
    numbered: dict[int, list[str]] = {}
    for (_, number), keys in layers.items():
        numbered.setdefault(number, []).extend(keys)
    double = next((keys for keys in numbered.values() if len(keys) > 1), None)
    if double is not None:
        return "site of a layer", double[0], double[1]
    stacks = {stack: keys[0] for (stack, _), keys in layers.items()}
    if len(stacks) > 1:
        one, other, *_ = stacks.values()
        return "stack of layers", one, other
    return None


def _of_kind(names: Mapping[str, tuple[str, ...]], wanted: str) -> dict[str, str]:
    """Find the name of each matching site, by its key."""
    direct = {
        key: next((name for name in (*every, key) if _within(name) == wanted), None)
        for key, every in names.items()
    }
    if any(direct.values()):
        return {key: name for key, name in direct.items() if name is not None}
    found = meant(wanted, names)
    if wanted in found.values():  # one site, by its full name
        return {}
    # Without the alias before it, which is not a stack of layers.
    return {
        key: next((each for each in names[key] if name.endswith(f".{each}")), name)
        for key, name in found.items()
    }


def check_layers(tensors: Mapping[str, Shaped[Tensor, "..."]]) -> None:
    """Refuse to stack layers that differ.

    Raises:
        JoinError: They do not have the same shape, dtype and device.

    """
    first, *others = tensors
    for other in others:
        one, two = tensors[first], tensors[other]
        if one.shape != two.shape:
            raise JoinError(
                f"cannot stack {first!r} of the shape {tuple(one.shape)} with {other!r} of the "
                f"shape {tuple(two.shape)}; stack layers of one shape, or read them one by one"
            )
        if (one.dtype, one.device) != (two.dtype, two.device):
            raise JoinError(
                f"cannot stack {first!r}, {one.dtype} on {one.device}, with {other!r}, {two.dtype} "
                f"on {two.device}; capture with a dtype= and a device="
            )


def stack_layers(tensors: Mapping[str, Shaped[Tensor, "..."]]) -> Shaped[Tensor, "layer ..."]:
    """Stack the values of layers, by the names of their sites.

    Raises:
        JoinError: They do not have the same shape, dtype and device.

    """
    check_layers(tensors)
    return torch.stack([*tensors.values()])


def _within(name: str) -> str:
    """Return the part of a name after the number of its layer."""
    return re.sub(r"^.*?\d+\.", "", name, count=1)
