"""Join the activations of several forwards into one tensor, freeing each as it is copied."""

import ctypes
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actctx._errors import JoinError
from actctx._select.own import Owned, plain_mode
from actctx._text import dtype_name


def check_not_quantized(key: str, tensor: Tensor) -> None:
    """Refuse a kind of tensor that torch does not join."""
    if tensor.is_quantized:
        raise JoinError(
            f"{key!r} is quantized ({dtype_name(tensor.dtype)}), and torch does not join such "
            "tensors; capture with join=None, without capacity=, and dequantize them"
        )


def check_joinable(key: str, tensors: Sequence[Tensor], dim: int, join: str) -> None:
    """Refuse tensors that differ in more than the axis of joining."""
    first = tensors[0]
    for other in tensors:
        if _others(first, dim) != _others(other, dim):
            raise JoinError(
                f"{key!r} was captured with the shapes {tuple(first.shape)} and "
                f"{tuple(other.shape)}, which do not join along {join!r}; give the forwards one "
                "length (by padding, or with a slice), join the steps of a generation along "
                "'pos', or capture with join=None for a list"
            )


def check_alike(key: str, chunks: Sequence[Owned]) -> None:
    """Refuse tensors of several dtypes or devices."""
    first = chunks[0].value
    for chunk in chunks:
        other = chunk.value
        if (first.dtype, first.device) != (other.dtype, other.device):
            raise JoinError(
                f"{key!r} was captured as {first.dtype} on {first.device} and as {other.dtype} "
                f"on {other.device}; give capture a dtype= and a device="
            )


def concatenate(chunks: deque[Owned], dim: int) -> None:
    """Replace chunks by their concatenation, releasing each as soon as it is copied."""
    if any(chunk.value.requires_grad for chunk in chunks):
        with torch.enable_grad():  # the graph was requested, whatever the reader's mode
            joined = torch.cat([chunk.value for chunk in chunks], dim)
        chunks.clear()
        chunks.append(Owned(joined))
        return
    first = chunks[0].value
    shape = list(first.shape)
    shape[dim] = sum(chunk.value.shape[dim] for chunk in chunks)
    with plain_mode():
        joined = torch.empty(shape, dtype=first.dtype, device=first.device)
    del first
    done, freed = 0, 0
    try:
        while chunks:
            size = chunks[0].value.shape[dim]
            joined.narrow(dim, done, size).copy_(chunks[0].value)
            done += size
            freed += chunks.popleft().value.nbytes
            if freed > joined.nbytes // 32:
                freed = 0
                if joined.device.type == "cpu":
                    give_back_to_system()
    finally:  # an interrupt between two chunks loses neither earlier nor later ones
        chunks.appendleft(Owned(joined.narrow(dim, 0, done) if chunks else joined))


@dataclass
class Kept:
    """Counts the bytes that a buffer keeps on the host, and returns unused memory to the system."""

    nbytes: int = 0
    trimmed: int = 0

    def add(self, nbytes: int) -> None:
        """Return freed memory to the system once enough has been kept since the last time."""
        self.nbytes += nbytes
        if self.nbytes - self.trimmed > max(2**24, self.nbytes // 16):
            self.trimmed = self.nbytes
            give_back_to_system()


def _others(tensor: Tensor, dim: int) -> list[int]:
    return [size for axis, size in enumerate(tensor.shape) if axis != dim]


def give_back_to_system() -> None:
    """Return freed host memory to the system, which glibc otherwise keeps for chunks of a few MiB.

    Otherwise the process would hold the chunks and the joined tensor at once. With another C
    library this does nothing.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
