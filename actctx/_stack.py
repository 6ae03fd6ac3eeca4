"""One kind of activation over the layers of a model."""

import difflib
import re
from collections.abc import Mapping

import torch
from jaxtyping import Shaped
from torch import Tensor

from actctx._errors import HookNameError, JoinError, NotCapturedError
from actctx._places import is_glob, matches
from actctx._table import shortened


def layers_of(names: Mapping[str, tuple[str, ...]], wanted: str) -> list[str]:
    """Find the sites of one kind, in the order of their layers.

    Args:
        names: The names of each captured site, by its key.
        wanted: The name of the sites within their layer, or a pattern of whole names.

    Returns:
        Their keys.

    Raises:
        NotCapturedError: There are none.
        HookNameError: A layer has several.

    """
    found = _in_layers(names, wanted)
    if not found:
        if any(wanted in (key, *every) for key, every in names.items()):
            raise NotCapturedError(
                f"{wanted!r} is one site, but layers are to be put side by side; give a name "
                f"within a layer, such as {_within(wanted)!r}"
            )
        within = {_within(name): None for every in names.values() for name in every}
        closest = difflib.get_close_matches(wanted, within, n=3, cutoff=0.5)
        hint = f"closest: {', '.join(map(repr, closest))}; " if closest else ""
        listed = shortened([repr(key) for key in names])
        raise NotCapturedError(
            f"no captured site is {wanted!r} in some layer; {hint}the captured names are {listed}; "
            "give a name within a layer, as in stack('attn.hook_z'), or a pattern of whole names, "
            "as in stack('model.layers.*')"
        )
    double = next((keys for keys in found.values() if len(keys) > 1), None)
    if double:
        raise HookNameError(
            f"{wanted!r} means more than one site of a layer: {double[0]!r} and {double[1]!r}; "
            "give a pattern of whole names, such as 'encoder_blocks.*.hook_resid_post'"
        )
    return [found[layer][0] for layer in sorted(found)]


def check_layers(tensors: Mapping[str, Shaped[Tensor, "..."]]) -> None:
    """Refuse to stack what differs.

    Raises:
        JoinError: They do not have one shape, dtype and device.

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
    """Stack what the layers left, by the names of their sites.

    Raises:
        JoinError: They do not have one shape, dtype and device.

    """
    check_layers(tensors)
    return torch.stack([*tensors.values()])


def _within(name: str) -> str:
    """Return what comes behind the number of a layer in a name."""
    return re.sub(r"^.*?\d+\.", "", name, count=1)


def _in_layers(names: Mapping[str, tuple[str, ...]], wanted: str) -> dict[int, list[str]]:
    """Sort sites by layer.

    Args:
        names: The names of each site, by its key.
        wanted: The name of the sites within their layer, or a pattern of whole names.

    Returns:
        The keys of the sites that are wanted, by the number of their layer.

    """
    whole = is_glob(wanted)
    pattern = re.compile(r"(.*?)(\d+)" + (r"(\..*)?" if whole else rf"\.{re.escape(wanted)}"))
    found: dict[int, list[str]] = {}
    for key, every in names.items():
        for name in every:
            match = pattern.fullmatch(name)
            if match and (not whole or matches(name, wanted)):
                found.setdefault(int(match[2]), []).append(key)
                break
    return found
