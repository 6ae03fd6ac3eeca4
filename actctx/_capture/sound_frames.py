"""Masks of frames, for models that take a mask of samples."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

_COUNTS = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")


def counted_frames(
    mask: Bool[Tensor, "batch samples"], count: int, core: nn.Module, place: nn.Module
) -> Bool[Tensor, "batch frames"] | None:
    """Convert a mask of samples to a mask of frames, using the model's own conversion.

    Args:
        mask: The mask of samples, on the CPU.
        count: The number of frames.
        core: The model.
        place: The module that yields the frames.

    Returns:
        The mask; None if padding is not on the right, or if no part of the model that contains the
        place converts these samples to this number of frames.

    """
    lengths = mask.sum(1)
    if not torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None]):
        return None  # audio models assume that it is on the right
    for count_frames in _counters(core, place):
        if count_frames(torch.tensor([mask.shape[1]])) == [count]:
            frames = torch.tensor(count_frames(lengths))
            return torch.arange(count) < frames[:, None]
    return None


def of_frames(mask: Bool[Tensor, "batch samples"], count: int) -> Bool[Tensor, "batch frames"]:
    """Return for each frame whether its first sample is real, assuming even spacing.

    That is good enough for a warning, and needs nothing from the model.
    """
    samples = mask.shape[-1]
    if mask.dim() != 2 or not 0 < count < samples:  # noqa: PLR2004  batch and samples
        return mask
    return mask[:, torch.arange(count, device=mask.device) * samples // count]


def _counters(core: nn.Module, place: nn.Module) -> Iterator[Callable[[Tensor], list[int]]]:
    """List the methods that convert samples to frames, in the models that contain a place."""
    for module in core.modules():
        for count in filter(callable, (getattr(module, name, None) for name in _COUNTS)):
            if not any(inner is place for inner in module.modules()):
                continue
            takes = {"add_adapter"} & {*_parameters(count)}
            for options in [{}, {"add_adapter": False}, {"add_adapter": True}] if takes else [{}]:
                yield functools.partial(_counted, count, options)


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()


def _counted(count: Callable[..., Any], options: dict[str, bool], lengths: Tensor) -> list[int]:
    """Count frames; some models return several numbers, the last of which is the output's."""
    counted = count(lengths, **options)
    last = counted[-1] if isinstance(counted, tuple) else counted
    return [int(each) for each in last] if isinstance(last, Tensor) else []
