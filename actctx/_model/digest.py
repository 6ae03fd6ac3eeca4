"""Digests of tensors: exact for weights, up to rounding for tensors that a model recomputes.

# NOTE [What a digest covers]
The sum of a tensor's bits as integers, and a few of its elements with their positions. Integer sums
are the same on every device and in every order, and as fast as memory is read. A change of any
single element changes the digest. It distinguishes tensors that differ by accident; it is not
secure against deliberate collisions.

Tensors that a model computes when it is created, such as rotary frequencies, differ slightly
between devices. For such a tensor one number is kept: the weighted mean of its elements, each with
its own weight, on a scale that is logarithmic except near zero. Rounding changes it by less than
`TOLERANCE`.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float64, Shaped
from torch import Tensor, nn

TOLERANCE = 1e-3
"""How far apart two sketches of the same tensor may be."""

_SAMPLED = 16
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FINE = 1e3  # below its inverse, elements are compared by their differences, above by their ratios


def bits_of(weights: Tensor) -> list[int]:
    """Sum up the bits of a tensor of any kind, and sample some; see the note above."""
    return [number for part in _parts(weights) for number in _bits(part)]


def digest_of(bits: list[int]) -> str:
    """Shorten the bits of one tensor."""
    return hashlib.blake2b(str(bits).encode(), digest_size=4).hexdigest()


def exact(weights: Tensor) -> str:
    """Describe a tensor by its dtype, shape and digest."""
    return f"{kind_of(weights)} {digest_of(bits_of(weights))}"


def sketched(values: Tensor) -> str | list[Any]:
    """Describe a tensor that is recomputed; integers are compared exactly."""
    is_dense = type(values) in (Tensor, nn.Parameter) and values.layout is torch.strided
    if not is_dense or not (values.is_floating_point() or values.is_complex()):
        return exact(values)
    flat = values.detach().resolve_conj().reshape(-1)
    real = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    return [kind_of(values), _sketch(real.double())]


def is_alike(was: Any, now: Any) -> bool:
    """Compare two descriptions of tensors or of anything else; sketches up to rounding."""
    if is_sketch(was) and is_sketch(now):
        return bool(was[0] == now[0] and abs(was[1] - now[1]) <= TOLERANCE)
    return bool(was == now)


def is_sketch(described: Any) -> bool:
    """Return whether a description is one that `sketched` makes of a recomputed tensor."""
    return isinstance(described, list) and [type(each) for each in described] == [str, float]


def kind_of(weights: Tensor) -> str:
    """Name the dtype and the shape of a tensor."""
    return f"{str(weights.dtype).removeprefix('torch.')} {tuple(weights.shape)}"


def _sketch(flat: Float64[Tensor, " _"]) -> float:
    if not flat.numel():
        return 0.0
    scaled = torch.asinh(flat.nan_to_num() * _FINE)
    each = 1 + torch.arange(len(flat), dtype=torch.float64, device=flat.device).sin() / 2
    return round((scaled * each).sum().item() / math.sqrt(len(flat)), 6)


def _parts(weights: Tensor) -> Iterator[Tensor]:
    """List the dense tensors that a tensor consists of: one, except for some kinds."""
    if hasattr(weights, "full_tensor"):  # a DTensor, which is gathered
        yield from _parts(weights.full_tensor())
    elif weights.is_quantized:
        yield weights.int_repr()
        yield from _quantizers(weights)
    elif weights.layout is torch.sparse_coo:
        whole = weights.coalesce()
        yield from (whole.indices(), whole.values())
    elif weights.layout in {torch.sparse_csr, torch.sparse_bsr}:
        yield from (weights.crow_indices(), weights.col_indices(), weights.values())
    elif weights.layout in {torch.sparse_csc, torch.sparse_bsc}:
        yield from (weights.ccol_indices(), weights.row_indices(), weights.values())
    elif hasattr(weights, "__tensor_flatten__"):  # as torchao's are
        names, _ = weights.__tensor_flatten__()
        for name in names:
            yield from _parts(getattr(weights, name))
    else:
        yield weights


def _quantizers(weights: Tensor) -> Iterator[Tensor]:
    if weights.qscheme() in {torch.per_tensor_affine, torch.per_tensor_symmetric}:
        yield torch.tensor([weights.q_scale(), weights.q_zero_point()], dtype=torch.float64)
    else:
        yield from (weights.q_per_channel_scales(), weights.q_per_channel_zero_points())


def _bits(weights: Shaped[Tensor, "..."]) -> list[int]:
    flat = weights.resolve_conj().resolve_neg().contiguous().reshape(-1)
    if not flat.numel():
        return []
    words = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    words = words.view(_WORDS[words.element_size()])
    places = torch.linspace(0, len(words) - 1, _SAMPLED, dtype=torch.float64).long()
    sampled = words[places.to(words.device)].long()
    return torch.cat([_sum(words), sampled]).tolist()


def _sum(words: Shaped[Tensor, " _"]) -> Shaped[Tensor, " 1"]:
    """Sum up integers, as wider integers if they divide evenly; overflow wraps around."""
    per_long = 8 // words.element_size()
    if len(words) % per_long == 0:
        aligned = words.storage_offset() % per_long == 0
        words = (words if aligned else words.clone()).view(torch.int64)
    return words.sum(dtype=torch.int64).reshape(1)
