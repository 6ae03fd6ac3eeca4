"""Take values out of the transforms of `torch.func`, such as `vmap` and `grad`.

Inside a transform, tensors are wrappers that cannot be read after it has ended. The value is the
tensor inside; axes that `vmap` maps over come first, the outermost before the others.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

_FUNCTORCH = torch._C._functorch
_DIFFERENTIATES = {"Grad", "Jvp"}

is_transformed = _FUNCTORCH.is_functorch_wrapped_tensor
"""Return whether a tensor belongs to a transform; called by every firing."""


def value_of(tensor: Tensor) -> Tensor:
    """Return the value that a tensor of transforms wraps, as a view of it.

    Call it `outside` of the transforms.
    """
    mapped: list[int] = []  # the innermost transform first, each dim without those behind it
    while is_transformed(tensor):
        if _FUNCTORCH.is_batchedtensor(tensor):
            mapped.append(_FUNCTORCH.maybe_get_bdim(tensor))
        tensor = _FUNCTORCH.get_unwrapped(tensor)
    rest = list(range(tensor.dim()))
    first = [rest.pop(dim) for dim in reversed(mapped)]
    return tensor.permute(*first, *rest) if mapped else tensor


def is_mapped(tensor: Tensor) -> bool:
    """Return whether a tensor is of a transform that maps over an axis."""
    while is_transformed(tensor):
        if _FUNCTORCH.is_batchedtensor(tensor):
            return True
        tensor = _FUNCTORCH.get_unwrapped(tensor)
    return False


def outside() -> AbstractContextManager[object]:
    """Compute with plain tensors, which an enclosing transform would otherwise wrap."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def is_differentiated(*inputs: object) -> bool:
    """Return whether a call is differentiated by its inputs, if gradients are on.

    This is what `torch.func.grad` and similar transforms do, and
    `torch.autograd.functional.jacobian`, whose inputs require gradients. If gradients are off, both
    give zeros.
    """
    if not torch.is_grad_enabled():
        return False
    running = _FUNCTORCH.get_interpreter_stack() or ()
    return any(each.key().name in _DIFFERENTIATES for each in running) or any(
        isinstance(each, Tensor) and each.requires_grad for each in inputs
    )
