"""Take values out of the transforms of `torch.func`, such as `vmap` and `grad`.

Inside a transform, tensors are wrappers that nothing can read once it has ended. A value is what
they wrap; the axes that `vmap` maps over come first, the outermost before the others.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

_FUNCTORCH = torch._C._functorch
_DIFFERENTIATES = {"Grad", "Jvp"}

is_transformed = _FUNCTORCH.is_functorch_wrapped_tensor
"""Tells whether a tensor belongs to a transform; bare, since every firing asks."""


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
    """Compute with plain tensors, of which a transform around would make its own."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def is_differentiated(*inputs: object) -> bool:
    """Return whether somebody differentiates a call by what it is given, where gradients are on.

    That is done by `torch.func.grad` and its like, and by `torch.autograd.functional.jacobian`,
    whose inputs require gradients. Where gradients are off, both give zeros.
    """
    if not torch.is_grad_enabled():
        return False
    running = _FUNCTORCH.get_interpreter_stack() or ()
    return any(each.key().name in _DIFFERENTIATES for each in running) or any(
        isinstance(each, Tensor) and each.requires_grad for each in inputs
    )
