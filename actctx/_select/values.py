"""Check what torch can do with a tensor, before doing it.

Some dtypes and layouts have few operations, and tensors on the meta device have no values. Torch's
own errors for them are hard to understand.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from actctx._errors import OptionError, OutputError
from actctx._text import dtype_name

# Torch's errors for unsupported operations.
_CANNOT = (RuntimeError, TypeError)  # NotImplementedError is a RuntimeError
# These can be copied, but not created like others.
_QUANTIZED = (torch.qint8, torch.quint8, torch.qint32)


def why_unreadable(tensor: Tensor) -> str | None:
    """Explain why numbers cannot be read from a tensor, as `it is ...`; None if they can."""
    if why := _why_not_dense(tensor):
        return why
    if tensor.is_quantized:
        return f"it is quantized ({dtype_name(tensor.dtype)})"
    if tensor.is_meta:
        return "it has no values, on the meta device"
    if not _can_cast(tensor.dtype, torch.complex128 if tensor.is_complex() else torch.float64):
        return f"it is {dtype_name(tensor.dtype)}, which torch cannot compute with"
    return None


def check_readable(name: str, tensor: Tensor, *, real: bool = False) -> None:
    """Refuse a tensor for a picture if its numbers cannot be read.

    Raises:
        OptionError: It has no values, or none that torch can compute with; or they are complex and
            must be real.

    """
    why = why_unreadable(tensor)
    if why is None and real and tensor.is_complex():
        why = f"it is {dtype_name(tensor.dtype)}, but real numbers are needed"
    if why is not None:
        raise OptionError(
            f"{name!r} cannot be drawn or compared: {why}; capture a site of an ordinary dtype "
            "from a model with weights, or convert it yourself"
        )


def check_capturable(
    site: str,
    tensor: Tensor,
    *,
    dtype: torch.dtype | None,
    device: torch.device | None,
) -> None:
    """Refuse a tensor that cannot be copied, or not to the requested dtype and device.

    Raises:
        OutputError: It is sparse, or of a dtype that torch cannot copy.
        OptionError: It is on the meta device and should be moved off it; or torch cannot cast it.

    """
    why = _why_not_dense(tensor)
    if why is None and not _can_copy(tensor.dtype):
        why = f"it is {dtype_name(tensor.dtype)}, which torch cannot copy"
    if why is not None:
        raise OutputError(
            f"{site} yields a tensor that cannot be captured: {why}; capture from a module whose "
            "output is an ordinary tensor"
        )
    if why := why_not_moved(tensor, dtype, device):
        raise OptionError(f"{site} cannot be captured {why}")


def why_not_moved(
    tensor: Tensor, dtype: torch.dtype | None, device: torch.device | None
) -> str | None:
    """Explain why a tensor cannot be cast and moved, and what to do; None if it can."""
    if device is not None and tensor.is_meta and device.type != "meta":
        return f"on {device}: it has no values, on the meta device; load the model's weights"
    if dtype is None or not tensor.is_floating_point() or _can_cast(tensor.dtype, dtype):
        return None
    return (
        f"as {dtype_name(dtype)}: torch cannot cast {dtype_name(tensor.dtype)}; leave dtype= out, "
        "and convert it yourself"
    )


def _why_not_dense(tensor: Tensor) -> str | None:
    if tensor.is_nested:
        return "it is a nested tensor"
    if tensor.layout is not torch.strided:
        return f"it is sparse ({dtype_name(tensor.layout)})"
    return None


@functools.cache
def _can_copy(dtype: torch.dtype) -> bool:
    return dtype in _QUANTIZED or _works(lambda: torch.empty(1, dtype=dtype).clone())


@functools.cache
def _can_cast(dtype: torch.dtype, to: torch.dtype) -> bool:
    return _works(lambda: torch.empty(1, dtype=dtype).to(to))


def _works(function: Callable[[], object]) -> bool:
    try:
        function()
    except _CANNOT:
        return False
    return True
