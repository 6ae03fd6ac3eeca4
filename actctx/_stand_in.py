"""A stand-in of a model: the same modules under the same names, on the meta device.

TransformerLens' adapters prepare a model for a bridge: they replace its modules and forwards,
change its config, and split its weights. A stand-in takes all of that, so that the model itself
stays as it is, and nothing is computed or held twice.
"""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def stand_in(model: nn.Module) -> nn.Module:
    """Make a stand-in of a model.

    Args:
        model: The model, which is left as it is.

    Returns:
        A model of the same classes with the same modules, parameters and buffers, all on the meta
        device, and copies of its configs; with no hooks. Modules that are shared are shared.

    """
    return _copied(model, {}, {})


def _copied(module: nn.Module, made: dict[int, nn.Module], memo: dict[int, Any]) -> nn.Module:
    if id(module) in made:
        return made[id(module)]
    # Not `copy.copy`, which a module may refuse, as one does that computes its weights.
    new = made[id(module)] = object.__new__(type(module))
    for name, value in vars(module).items():
        is_config = hasattr(value, "model_type") and not isinstance(value, nn.Module)
        new.__dict__[name] = copy.deepcopy(value, memo) if is_config else value
    new.__dict__.pop("forward", None)  # of a capture that is open
    for hooks in _HOOKS:
        if hooks in new.__dict__:
            new.__dict__[hooks] = OrderedDict()
    new.__dict__["_parameters"] = {
        name: None if each is None else nn.Parameter(_meta(each), requires_grad=False)
        for name, each in module._parameters.items()
    }
    new.__dict__["_buffers"] = {
        name: None if each is None else _meta(each) for name, each in module._buffers.items()
    }
    new.__dict__["_modules"] = {
        name: None if each is None else _copied(each, made, memo)
        for name, each in module._modules.items()
    }
    return new


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
