"""Weights and buffers by name, including those that `accelerate` offloaded."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from actctx._errors import OptionError

_META = torch.device("meta")


def input_device(model: nn.Module) -> torch.device:
    """Return the device on which a model takes its tokens.

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
        OptionError: Weights are on the meta device, and nothing says where they are kept; or they
            are not initialised yet.

    """
    listed = [*model.named_parameters()]
    for name, weights in listed:
        if isinstance(weights, UninitializedParameter):
            raise OptionError(
                f"the weights of {name!r} are initialised only in the first forward, so data sets "
                "cannot identify them; run the model once first"
            )
    is_offloaded = any(weights.is_meta for _, weights in listed)
    modules = dict(model.named_modules()) if is_offloaded else {}
    tied = _tied_in(model) if is_offloaded else set()
    for name, weights in listed:
        if name not in tied:
            yield name, _kept(modules, name) if weights.is_meta else weights.detach()


def buffers_of(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """List the buffers of a model by name, and whether each is saved with its weights.

    Other saved tensors of a module are listed too, such as the scales of quantised weights.

    Raises:
        OptionError: A buffer is on the meta device, and nothing says where it is kept.

    """
    modules = dict(model.named_modules())
    for prefix, module in modules.items():
        for key, buffer in module._buffers.items():
            if buffer is not None and not _is_made_of_config(module, key):
                name = _joined(prefix, key)
                found = _kept(modules, name) if buffer.is_meta else buffer.detach()
                yield name, found, key not in module._non_persistent_buffers_set
        for key, tensor in _saved_by(module):
            yield _joined(prefix, key), tensor.detach(), True


def _saved_by(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """List the tensors that a module saves in its own way."""
    if type(module)._save_to_state_dict is nn.Module._save_to_state_dict:
        return
    saved: dict[str, Any] = {}
    module._save_to_state_dict(saved, "", keep_vars=True)
    for key, value in saved.items():
        if key in module._parameters or key in module._buffers:
            continue
        parts = {key: value}
        if isinstance(value, tuple | list):
            parts = {f"{key}.{number}": part for number, part in enumerate(value)}
        yield from ((name, part) for name, part in parts.items() if isinstance(part, Tensor))


def _is_made_of_config(module: nn.Module, key: str) -> bool:
    """Return whether a buffer is a mask of TransformerLens, which differs between its versions."""
    return key in {"mask", "IGNORE"} and type(module).__module__.startswith("transformer_lens.")


def _joined(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _kept(modules: Mapping[str, nn.Module], name: str) -> Tensor:
    """Find the weights of an offloaded parameter, which are stored by an enclosing module."""
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
        f"the weights of {name!r} are on the meta device, so it cannot run, and data sets cannot "
        "identify it; load them first, or offload the model with accelerate, which keeps them"
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
