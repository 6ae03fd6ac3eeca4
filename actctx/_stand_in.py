"""A stand-in of a model: the same modules under the same names, with fake tensors for its weights.

TransformerLens' adapters prepare a model for a bridge: they replace its modules and forwards,
change its config, and split its weights. A stand-in takes all of that, so that the model itself
stays as it is, and nothing is computed or held twice. It also runs, without values, to tell which
of its modules a forward calls.
"""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def stand_in(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Make a stand-in of a model.

    Args:
        model: The model, which is left as it is.
        mode: The mode that its tensors belong to, in which alone it can run.

    Returns:
        A model of the same classes with the same modules, fake tensors on the CPU for all
        parameters and buffers, and copies of its configs; with no hooks, and not in training.
        Modules that are shared are shared.

    """
    with torch.inference_mode(mode=False), mode:
        return _copied(model, {}, {})


def _copied(module: nn.Module, made: dict[int, nn.Module], memo: dict[int, Any]) -> nn.Module:
    if id(module) in made:
        return made[id(module)]
    # Not `copy.copy`, which a module may refuse, as one does that computes its weights.
    new = made[id(module)] = object.__new__(type(module))
    new.__dict__.update(vars(module))
    new.__dict__["_parameters"] = {
        name: None if each is None else nn.Parameter(_fake(each), requires_grad=False)
        for name, each in module._parameters.items()
    }
    new.__dict__["_buffers"] = {
        name: None if each is None else _fake(each) for name, each in module._buffers.items()
    }
    new.__dict__["_modules"] = {
        name: None if each is None else _copied(each, made, memo)
        for name, each in module._modules.items()
    }
    for name, value in vars(module).items():
        if name in _HOOKS:
            new.__dict__[name] = OrderedDict()
        elif name not in {"_parameters", "_buffers", "_modules"}:
            new.__dict__[name] = _own(value, made, memo)
    # Of a capture that is open, of a library that offloads, or compiled: all run the model itself.
    for name in ("forward", "_compiled_call_impl"):
        new.__dict__.pop(name, None)
    new.__dict__["training"] = False
    return new


def _own(value: Any, made: dict[int, nn.Module], memo: dict[int, Any]) -> Any:
    """Copy what a forward or an adapter may change, and modules that are held as attributes."""
    if isinstance(value, nn.Module):
        return _copied(value, made, memo)
    if hasattr(value, "model_type"):  # a config
        return copy.deepcopy(value, memo)
    if type(value) in {list, tuple}:
        return type(value)(_own(each, made, memo) for each in value)
    return copy.copy(value) if type(value) in {dict, set} else value


def _fake(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
