"""Cast and move the selection into a tensor that shares no storage with anything else."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from actctx._errors import OptionError


def dtype_of(dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype that floating-point activations are cast to; None to keep theirs.

    Raises:
        OptionError: It is not a floating-point dtype.

    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise OptionError(
            f"dtype={dtype!r} is not one of torch's floating-point dtypes; give one, such as "
            "torch.float16"
        )
    return dtype


def device_of(device: torch.device | str | None) -> torch.device | None:
    """Return the device that tensors move to; None to leave them where they are.

    Raises:
        OptionError: This machine has no such device.

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
    """Read the arguments of `acts.to`: a device and a dtype, or a dtype in place of the device.

    Raises:
        OptionError: One of them is not valid, or there are two dtypes.

    """
    if isinstance(device, torch.dtype):
        if dtype is not None:
            raise OptionError(f"acts.to({device}, {dtype}) names two dtypes; give one")
        device, dtype = None, device
    return device_of(device), dtype_of(dtype)


def cast_dtype(selected: Shaped[Tensor, "..."], dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype to cast to: integers, such as token ids, and complex numbers keep theirs."""
    return dtype if dtype is not None and selected.is_floating_point() else selected.dtype


class TokenRows(NamedTuple):
    """Where the rows of a tensor come from, when only real tokens are kept.

    Attributes:
        where: The sequence and the position of each row.
        sequences: The number of sequences of the forward.
        before: With a KV cache, the number of positions in earlier forwards.
        is_all: Whether they are known to be all rows, in order.
        line: Identifies forwards that continue each other; see `_capture/generation.py`.

    """

    where: Int64[Tensor, "token 2"]
    sequences: int
    before: int = 0
    is_all: bool = False
    line: int | None = None


class Owned(NamedTuple):
    """A captured tensor that shares no storage with anything else.

    Attributes:
        value: The tensor. With `ready`, it may still be being copied.
        ready: On a GPU, the event to wait for before `value` is read on the host.
        rows: Where its rows come from, with a mask.

    """

    value: Shaped[Tensor, "..."]
    ready: torch.cuda.Event | None = None
    rows: TokenRows | None = None


def own(
    selected: Shaped[Tensor, "..."],
    *,
    copied: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    room: Shaped[Tensor, "..."] | None = None,
) -> Owned:
    """Cast and move the selection into a new tensor, in one pass if torch can.

    Args:
        selected: The selection from an activation, with or without an autograd graph.
        copied: Whether selecting made a copy already, so that no second one is needed.
        dtype: The dtype of the result; only floating-point activations are cast.
        device: The device of the result.
        room: Where to put the result; a new tensor by default.

    """
    dtype = cast_dtype(selected, dtype)
    if room is not None:
        asynchronous = selected.is_cuda and room.is_pinned()
        room.copy_(selected, non_blocking=asynchronous)
        return Owned(room, _recorded(selected) if asynchronous else None)
    if device is not None and device.type == "cpu" and selected.is_cuda and not selected.grad_fn:
        # Pinned memory and no waiting, so that the forward continues meanwhile.
        cast = selected.to(dtype)
        value = torch.empty(cast.shape, dtype=cast.dtype, pin_memory=True)
        value.copy_(cast, non_blocking=True)
        return Owned(value, _recorded(selected))
    return Owned(
        selected.to(
            device=device,
            dtype=dtype,
            copy=not copied,
            memory_format=torch.contiguous_format,
        )
    )


def _recorded(selected: Shaped[Tensor, "..."]) -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.current_stream(selected.device).record_event()
    return event


def plain_mode() -> AbstractContextManager[object]:
    """Leave inference mode, whose tensors could not train a probe later."""
    return torch.inference_mode(mode=False) if torch.is_inference_mode_enabled() else nullcontext()
