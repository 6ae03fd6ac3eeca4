"""A histogram of values in one line of text."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from actctx._select.values import why_unreadable

_BARS = "▁▂▃▄▅▆▇█"
_BINS = 12
_MOST = 2**14
"""The number of values that are sampled, evenly spaced, so that showing a buffer stays quick."""
_PARTS = 2**8  # tensors are looked at, if there are more
_MANY = 1000


def sketch(tensors: Sequence[Shaped[Tensor, "..."]]) -> str:
    """Draw a histogram of values, as in `-0.91 ▁▁▂▄▇█▇▄▂▁▁▁ 1.1`.

    With many values, the ends are the 0.5 % and 99.5 % quantiles, since a few features of a
    residual stream are so large that all others would fall into one bar. Values that are not finite
    are counted separately. Nothing is drawn for tensors without values, as on the meta device, or
    with a dtype that torch cannot compute with.
    """
    if any(map(why_unreadable, tensors)):
        return ""
    tensors = tensors[:: -(-len(tensors) // _PARTS) or 1]
    samples = [_sampled(tensor, _MOST // len(tensors), at) for at, tensor in enumerate(tensors)]
    values = torch.cat(samples) if samples else torch.empty(0)
    finite = values[values.isfinite()]
    wrong = len(values) - len(finite)
    note = f" ({wrong / len(values):.1%} not finite)" if wrong else ""
    if not len(finite):
        return note.strip()
    tail = 0.005 if len(finite) >= _MANY else 0.0
    ends = torch.tensor([tail, 1 - tail], dtype=finite.dtype)
    low, high = torch.quantile(finite, ends, interpolation="nearest").tolist()
    if low == high:  # nearly all values are equal
        low, high = finite.min().item(), finite.max().item()
    if low == high:
        return f"{low:.2g}{note}"
    most = max(abs(low), abs(high))  # so that the difference of distant ends is finite
    counts = torch.histc(finite / most, _BINS, low / most, high / most)
    heights = (counts / counts.max() * (len(_BARS) - 1)).ceil().int().tolist()
    return f"{low:.2g} {''.join(_BARS[height] for height in heights)} {high:.2g}{note}"


def _sampled(tensor: Tensor, most: int, start: int) -> Tensor:
    """Copy evenly spaced values of a tensor to the host, real and in double precision."""
    tensor = tensor.detach()
    step = max(tensor.numel() // most, 1)
    while any(math.gcd(step, size) > 1 for size in tensor.shape):  # else few features
        step += 1
    start %= step  # so that small tensors do not all show the same features
    if tensor.is_contiguous():
        taken = tensor.flatten()[start::step]
    else:  # flattening would copy all of it
        taken = tensor.take(torch.arange(start, tensor.numel(), step, device=tensor.device))
    return (taken.abs() if taken.is_complex() else taken).cpu().double()
