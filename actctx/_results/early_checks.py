"""Predict a captured tensor, and refuse annotations that contradict it before any forward.

There is no tensor yet, but the names of the axes are known, and the sizes that the config and the
slice fix.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from actctx._errors import TypedError
from actctx._model.axes import AXIS_NAMES, Axes
from actctx._results.annotations import (
    Sizes,
    aligned,
    any_shape,
    count_axes,
    ranks_agree,
    shown,
    suggested,
    word_of,
)

# Names of axes that are interchangeable: their sizes decide.
_ALIKE = ({"pos", "query", "key"}, {"head", "kv_head"})


@dataclass(frozen=True)
class Expected:
    """The prediction for a captured tensor, as far as it is known before any forward.

    Attributes:
        axes: The axes that it will have.
        sizes: Their sizes, as far as the config and the slice fix them.
        model_sizes: The sizes of axes that the model's config fixes.
        because: Why the axes are not those of the site, for a message.

    """

    axes: Axes
    sizes: Sizes
    model_sizes: Mapping[str, int]
    because: str = ""

    def written(self, hint: Any) -> str:
        """Say how to annotate it; a partly selected axis has a size instead of a name."""
        dims = (
            axis if size in {None, self.model_sizes.get(axis, size)} else str(size)
            for axis, size in zip(self.axes, self.sizes, strict=True)
        )
        return f"write {suggested(hint, dims)}"


def refuse_impossible(what: str, hint: Any, expected: Expected) -> None:
    """Refuse an annotation that no activation can fit, before there is one.

    Args:
        what: The annotated object, for messages.
        hint: Its annotation.
        expected: The prediction.

    Raises:
        TypedError: It has another number of axes, other names, or an impossible size.

    """
    axes, listed = expected.axes, f"{' '.join(expected.axes)!r}{expected.because}"
    dims = hint.dim_str.split()
    if dims[:1] == ["token"] and axes[:2] == ("batch", "pos") and len(dims) == len(axes) - 1:
        return  # some MLPs run on flattened sequences, which shows when they fire
    if not ranks_agree(dims, len(axes)):
        raise TypedError(
            f"{what} is annotated {shown(hint)}, with {count_axes(len(dims))}, but will have "
            f"{len(axes)}, {listed}; {expected.written(hint)}"
        )
    for dim, axis, size in aligned(hint, expected.sizes, axes):
        disagrees = dim != axis and {dim, axis} <= AXIS_NAMES
        if disagrees and not any({dim, axis} <= names for names in _ALIKE):
            raise TypedError(
                f"{what} is annotated {shown(hint)}, but what it calls {dim!r} is the axis "
                f"{axis!r}: its axes are {listed}; {expected.written(hint)}"
            )
        wanted = _size_in(dim, expected.model_sizes)
        if None in {size, wanted} or size == wanted:
            continue
        if dim == axis:
            raise TypedError(
                f"{what} is annotated {shown(hint)}, but {size} of the {wanted} along {dim!r} are "
                f"selected; write {size} in its place, or another name, such as 'chosen_{dim}'"
            )
        raise TypedError(
            f"{what} is annotated {shown(hint)}, but it says {wanted} where the axis {axis!r} "
            f"has the size {size}; {expected.written(hint)}"
        )


def _size_in(dim: str, model_sizes: Mapping[str, int]) -> int | None:
    """Read the size that one dimension of an annotation has: a number, or a name of the config."""
    number = dim.rpartition("=")[2]
    return int(number) if number.isdecimal() else model_sizes.get(dim)


def refuse_dtype(what: str, hint: Any, dtype: torch.dtype | None) -> None:
    """Refuse an annotation that does not fit the requested dtype.

    Raises:
        TypedError: The annotation is for other floating-point tensors.

    """
    if dtype is None:
        return
    unshaped = any_shape(hint)
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64, dtype)
    fits = {kind for kind in kinds if isinstance(torch.empty(0, dtype=kind), unshaped)}
    if fits and dtype not in fits:
        raise TypedError(
            f"{what} is annotated {shown(hint)}, but dtype={dtype} was requested; write "
            f"{word_of(dtype).__name__}, or leave the dtype out"
        )
