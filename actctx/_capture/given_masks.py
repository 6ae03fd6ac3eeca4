"""The masks that forwards are given, in their different forms."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from actctx._capture.generation import generating, ran_of
from actctx._errors import OptionError
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
    """Make the mask of a forward without one, from the arguments of a running `generate()`.

    Generated tokens are real.

    Returns:
        The mask of the cached and the new tokens; None if there is no `generate()`, or if it
        does not say.

    """
    running = generating()
    known = None if running is None else running.f_locals.get("model_kwargs")
    ran = next(filter(None, map(ran_of, given)), None)
    # XLNet and XLM append placeholders to the tokens, which are not counted anywhere.
    appends = any(name in inputs for inputs in given for name in ("target_mapping", "langs"))
    if not isinstance(known, dict) or ran is None or appends or side == "encoder":
        return None
    name = "decoder_attention_mask" if side == "decoder" else "attention_mask"
    if side != "decoder" and name not in known:
        return None
    prompt, (batch, count) = known.get(name), ran
    sequences = batch if sequences == 1 else sequences  # one for all is refused
    real = torch.ones(sequences, (before or 0) + count, dtype=torch.bool)
    if prompt is None:
        return real
    if not isinstance(prompt, Tensor) or before is None or prompt.dim() != 2:  # noqa: PLR2004
        return None
    kept = as_mask(real_of(prompt))[:, : real.shape[1]]
    if sequences % len(kept):
        return None
    real[:, : kept.shape[1]] = kept.repeat_interleave(sequences // len(kept), 0)
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
    """Convert a mask of who attends to whom to one of two axes: padding does not attend to itself.

    Raises:
        OptionError: Tokens attend to themselves, but judging by the others they may be padding.

    """
    ran, keys = mask.shape[-2:]
    first = keys - ran if before is None else min(before, keys - ran)
    seen = mask.detach()[:, 0]
    seen = seen > -1 if seen.is_floating_point() else seen.bool()
    among = seen[:, :, first:]
    is_opened = _opened(seen, among)
    real = among.diagonal(dim1=1, dim2=2) & ~is_opened
    if bool(_alone(seen & ~is_opened[:, :, None], first, real).any()):
        raise OptionError(
            "the forward's mask of four axes does not say which tokens are padding: some attend to "
            "themselves, but no other attends to them; pass the mask to capture, of the shape "
            "batch pos"
        )
    past = torch.ones(len(real), before or first, dtype=torch.bool, device=real.device)
    return torch.cat([past, real], 1).expand(sequences, -1)


def _opened(
    seen: Bool[Tensor, "batch query key"], among: Bool[Tensor, "batch query later"]
) -> Bool[Tensor, "batch query"]:
    """Find queries without a key, which are often given all keys.

    The last token of a text also has all keys, but only the last.
    """
    is_opened = seen.all(2)
    unseen = ~among & ~is_opened[:, :, None]
    ran = seen.shape[1]
    behind, is_opened = unseen.tril(-1).any(1)[:, :ran], is_opened & unseen.any(1)[:, :ran]
    return is_opened & (behind | is_opened[:, :-1].any(1, keepdim=True))


def _alone(
    seen: Bool[Tensor, "batch query key"], first: int, real: Bool[Tensor, "batch query"]
) -> Bool[Tensor, "batch query"]:
    """Find tokens that no other token attends to, although one should if they were real.

    The last token of a text is also such a token. But it attends to those before it, and no later
    token does: a token that attends past it, or that it sees from behind, belongs to the same text.
    """
    among = seen[:, :, first : first + real.shape[1]]
    others = among & ~torch.eye(real.shape[1], dtype=torch.bool, device=seen.device)
    is_unseen = real & ~others.any(1)
    sees_none = ~(others.any(2) | seen[:, :, :first].any(2))
    sees_on = others.triu(1).any(2)
    reach = torch.where(seen.any(2), seen.int().argmax(2) - first, real.shape[1])
    # The first key that any of the later queries attends to.
    behind = reach.flip(1).cummin(1).values.flip(1).roll(-1, 1)
    behind[:, -1] = real.shape[1]
    is_passed = behind < torch.arange(real.shape[1], device=seen.device)
    is_one_of_several = sees_none & (real.sum(1, keepdim=True) > 1)
    # After tokens that all see each other, a last one that sees them need not be real.
    is_behind_all = others[:, :-1, :-1].sum((1, 2)) == (real.shape[1] - 1) * (real.shape[1] - 2)
    is_behind_all &= real.shape[1] > 2  # noqa: PLR2004
    is_last = torch.arange(real.shape[1], device=seen.device) == real.shape[1] - 1
    is_passed |= is_behind_all[:, None] & is_last
    return is_unseen & (is_one_of_several | sees_on | is_passed)
