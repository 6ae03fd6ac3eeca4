"""The masks that forwards are given, in the forms in which they come."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from actctx._capture.generation import generating, positions_of
from actctx._model.absolute_positions import is_padded_left
from actctx._model.sides import Side
from actctx._select.padding import as_mask, real_of

MASKS = ("attention_mask", "one_zero_attention_mask")
"""What models, and dicts of data, call the mask that is 1 where tokens are not padding."""

_NAMES = (*MASKS, "decoder_attention_mask")


def mask_of_generate(
    side: Side | None,
    before: int | None,
    sequences: int,
    given: tuple[Mapping[str, Any], ...],
) -> Bool[Tensor, "batch pos"] | None:
    """Make the mask of a forward that `generate()` gave none, of what it was given itself.

    What it generates is real.

    Returns:
        The mask of what the cache holds and of what is run now; None where there is no
        `generate()`, or it does not say.

    """
    running = generating()
    known = None if running is None else running.f_locals.get("model_kwargs")
    count = next(filter(None, map(positions_of, given)), None)
    # XLNet's and XLM's append placeholders to the tokens, and count them nowhere.
    appends = any(name in inputs for inputs in given for name in ("target_mapping", "langs"))
    if not isinstance(known, dict) or count is None or appends or side == "encoder":
        return None
    name = "decoder_attention_mask" if side == "decoder" else "attention_mask"
    if side != "decoder" and name not in known:
        return None
    prompt = known.get(name)
    real = torch.ones(sequences, (before or 0) + count, dtype=torch.bool)
    if prompt is None:
        return real
    if not isinstance(prompt, Tensor) or before is None or prompt.dim() != 2:  # noqa: PLR2004
        return None
    ran = as_mask(real_of(prompt))[:, : real.shape[1]]
    if sequences % len(ran):
        return None
    real[:, : ran.shape[1]] = ran.repeat_interleave(sequences // len(ran), 0)
    return real


def left_masks(forwards: Iterable[Mapping[str, Any]]) -> list[Bool[Tensor, "batch pos"]]:
    """List the masks with padding on the left among the inputs of forwards."""
    found = {}
    for inputs in forwards:
        for name in _NAMES:
            mask = inputs.get(name)
            if isinstance(mask, Tensor) and mask.dim() == 2:  # noqa: PLR2004  batch and pos
                found[name] = as_mask(real_of(mask))
    return [*filter(is_padded_left, found.values())]


def diagonal(
    mask: Shaped[Tensor, "batch head query key"], sequences: int, before: int | None
) -> Bool[Tensor, "sequences pos"]:
    """Make a mask of two axes of one that tells who attends to whom: padding not to itself."""
    ran, keys = mask.shape[-2:]
    first = keys - ran if before is None else min(before, keys - ran)
    seen = mask.detach()[:, 0]
    seen = seen > -1 if seen.is_floating_point() else seen.bool()
    among = seen[:, :, first:]
    # A query that has no key is often given all of them, those behind it too, which do not see it.
    is_opened = seen.all(2)
    unseen = ~among & ~is_opened[:, :, None]
    is_opened &= unseen.tril(-1).any(1)[:, :ran]
    real = among.diagonal(dim1=1, dim2=2) & ~is_opened
    past = torch.ones(len(real), before or first, dtype=torch.bool, device=real.device)
    return torch.cat([past, real], 1).expand(sequences, -1)
