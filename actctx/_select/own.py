"""The dtype and the device that activations are cast and moved to, as users give them."""

import torch
from jaxtyping import Shaped
from torch import Tensor

from actctx._errors import OptionError


def dtype_of(dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype that floating-point activations are cast to; None where they keep theirs.

    Raises:
        OptionError: It is no dtype, or not a floating-point one.

    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise OptionError(
            f"dtype={dtype!r} is not one of torch's floating-point dtypes; give one, such as "
            "torch.float16"
        )
    return dtype


def device_of(device: torch.device | str | None) -> torch.device | None:
    """Find a device that tensors are to move to; None where they stay.

    Raises:
        OptionError: There is none of this name here.

    """
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"device={device!r} cannot hold activations: {reason}") from None
    return found


def read_to(
    device: torch.device | str | torch.dtype | None, dtype: torch.dtype | None
) -> tuple[torch.device | None, torch.dtype | None]:
    """Read what `acts.to` is given: a device and a dtype, or a dtype in the place of the device.

    Raises:
        OptionError: One of them is none, or there are two dtypes.

    """
    if isinstance(device, torch.dtype):
        if dtype is not None:
            raise OptionError(f"acts.to({device}, {dtype}) names two dtypes; give one")
        device, dtype = None, device
    return device_of(device), dtype_of(dtype)


def cast_dtype(selected: Shaped[Tensor, "..."], dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype to cast to: integers, such as token ids, and complex numbers keep theirs."""
    return dtype if dtype is not None and selected.is_floating_point() else selected.dtype
