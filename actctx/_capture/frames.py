"""Masks of frames, for models that are given a mask of samples."""

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
    """Make a mask of frames from one of samples, by what a model says of their numbers.

    Args:
        mask: The mask of samples, on the CPU.
        count: How many frames there are.
        core: The model.
        place: The module that yields the frames.

    Returns:
        The mask; None where padding is not on the right, or no part of the model that holds the
        place says that so many samples make so many frames.

    """
    lengths = mask.sum(1)
    if not torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None]):
        return None  # models for sound take it to be on the right
    for count_frames in _counters(core, place):
        if count_frames(torch.tensor([mask.shape[1]])) == [count]:
            frames = torch.tensor(count_frames(lengths))
            return torch.arange(count) < frames[:, None]
    return None


def of_frames(mask: Bool[Tensor, "batch samples"], count: int) -> Bool[Tensor, "batch frames"]:
    """Return for each frame whether its first sample is real, as far as even spacing tells.

    That is good enough for a warning, and needs nothing from the model.
    """
    samples = mask.shape[-1]
    if mask.dim() != 2 or not 0 < count < samples:  # noqa: PLR2004  batch and samples
        return mask
    return mask[:, torch.arange(count, device=mask.device) * samples // count]


def _counters(core: nn.Module, place: nn.Module) -> Iterator[Callable[[Tensor], list[int]]]:
    """List what tells how many frames so many samples make, in the models that hold a place."""
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
    """Count frames; some models tell several numbers, of which the last is what comes out."""
    counted = count(lengths, **options)
    last = counted[-1] if isinstance(counted, tuple) else counted
    return [int(each) for each in last] if isinstance(last, Tensor) else []
