"""Find weights that are offloaded by `accelerate`, or spread over devices."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from actctx._errors import OptionError

_META = torch.device("meta")


def input_device(model: nn.Module) -> torch.device:
    """Return the device that a model takes its tokens on.

    An offloaded model has its weights on no device until they are needed; accelerate's hooks then
    say where each module runs.
    """
    for module in model.modules():
        for hook in _hooks_of(module):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    devices = (each.device for each in (*model.parameters(), *model.buffers()))
    return next((device for device in devices if device != _META), torch.device("cpu"))


def weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """List the parameters of a model by name; offloaded ones are read from where they are kept.

    Raises:
        OptionError: Weights are on the meta device, and nothing says where they are kept.

    """
    if not any(weights.is_meta for weights in model.parameters()):
        yield from ((name, weights.detach()) for name, weights in model.named_parameters())
        return
    modules, tied = dict(model.named_modules()), _tied_in(model)
    for name, weights in model.named_parameters():
        if name not in tied:
            yield name, _kept(modules, name) if weights.is_meta else weights.detach()


def _kept(modules: dict[str, nn.Module], name: str) -> Tensor:
    """Find the weights of an offloaded parameter through the hook of a module around it."""
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        module, rest = modules.get(".".join(parts[:end])), ".".join(parts[end:])
        for hook in _hooks_of(module):
            kept = getattr(hook, "weights_map", None)
            try:
                found = None if kept is None else kept[rest]
            except KeyError:
                continue
            if isinstance(found, Tensor):
                return found.detach()
    raise OptionError(
        f"the weights of {name!r} are on the meta device, so it cannot run, and "
        "data sets cannot tell it from others; load them first, or offload the model with "
        "accelerate, which keeps them"
    )


def _hooks_of(module: nn.Module | None) -> list[Any]:
    """List the hooks of accelerate that a module has."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else [hook, *getattr(hook, "hooks", ())]


def _tied_in(model: nn.Module) -> set[str]:
    """Name the parameters that are tied to others, which a model lists once."""
    return {
        ".".join(filter(None, (prefix, name)))
        for prefix, module in model.named_modules()
        for name in getattr(module, "all_tied_weights_keys", None) or ()
    }
