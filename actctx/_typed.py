"""Tensors held to jaxtyping annotations, in one scope with the sizes of a model.

# NOTE [What jaxtyping decides, and what is decided before]
Whether a tensor fits an annotation is decided by jaxtyping, in one of its scopes, into which the
model's own sizes are bound first: `d_model` is then one size, as if a first argument had it. Before
any forward there is no tensor yet, but the names of the axes are known, and the sizes that the
config and the slice fix. What contradicts those can never hold.
"""

import os
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import jaxtyping
import torch
from beartype.door import is_bearable
from jaxtyping import AbstractArray, AbstractDtype, AnnotationError, Shaped, jaxtyped
from torch import Tensor

from actctx._axes import AXIS_NAMES, Axes
from actctx._errors import TypedError

Sizes = tuple[int | None, ...]
"""The size of each axis in elements, None where it is not known beforehand."""

# Names that mean the same axis where they both stand for it.
_ALIKE = ({"pos", "query"}, {"head", "kv_head"})


def is_checking(check: bool) -> bool:  # noqa: FBT001  the option of that name
    """Tell whether types are checked: by default, unless the environment has ACTCTX_CHECK=0."""
    return check and os.environ.get("ACTCTX_CHECK", "1") != "0"


def is_array_type(hint: object) -> bool:
    """Recognise an annotation of one tensor, such as `Float[Tensor, "batch pos d_model"]`."""
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def mentions_array_type(hint: object) -> bool:
    """Tell whether jaxtyping has a part in an annotation."""
    return is_array_type(hint) or any(map(mentions_array_type, get_args(hint)))


def shown(hint: Any) -> str:
    """Write an annotation as its author did."""
    if not is_array_type(hint):
        is_class = isinstance(hint, type) and not get_args(hint)
        return hint.__name__ if is_class else repr(hint).replace("jaxtyping.", "")
    return f'{hint.dtype.__name__}[{hint.array_type.__name__}, "{hint.dim_str}"]'


def spec_of(dtype: torch.dtype, axes: Axes, sizes: Sizes) -> type:
    """Build the annotation of a tensor, such as `Float32[Tensor, "batch d_model=768"]`."""
    parts = (
        axis if size is None or axis == "1" else str(size) if axis == "_" else f"{axis}={size}"
        for axis, size in zip(axes, sizes, strict=True)
    )
    built: type = _word(dtype)[Tensor, " ".join(parts)]
    return built


def _word(dtype: torch.dtype) -> Any:
    """Find the jaxtyping word for one dtype, such as `Float32`."""
    name = str(dtype).removeprefix("torch.")
    for word in vars(jaxtyping).values():
        if isinstance(word, type) and issubclass(word, AbstractDtype) and word is not AbstractDtype:
            names = word.dtypes if isinstance(word.dtypes, list | tuple) else ()
            if name in names and len({str(each).rstrip("_") for each in names}) == 1:
                return word
    return Shaped


@dataclass(frozen=True, eq=False)
class Claim:
    """A value, and the annotation that it is held to.

    Attributes:
        what: What it is, for messages, such as `Acts.resid, from 'blocks.0.hook_resid_post',`.
        value: The value; of a tensor, only shape and dtype are looked at.
        hint: The annotation.
        axes: The names of a tensor's axes, where they are known.

    """

    what: str
    value: Any
    hint: Any
    axes: Axes | None = None


def hold(claims: Iterable[Claim], sizes: Mapping[str, int]) -> None:
    """Hold values to their annotations, in one scope with the sizes of a model.

    Args:
        claims: The values and their annotations. An annotation may calculate with axes that
            others of them name, whatever their order.
        sizes: The sizes of axes that the model's config fixes, in elements.

    Raises:
        TypedError: A value does not fit its annotation.

    """
    with jaxtyped("context"):
        # Here and not in a function of its own, which could be given a scope of its own.
        config: Any = Shaped[Tensor, " ".join(sizes)]
        isinstance(torch.empty([*sizes.values()], device="meta"), config)
        found = {axis: (size, "in the model's config") for axis, size in sizes.items()}
        waiting = deque((claim, True) for claim in claims)
        while waiting:
            claim, may_wait = waiting.popleft()
            value, hint = claim.value, claim.hint
            try:
                if is_array_type(hint):  # what beartype asks for as well
                    reason = type(hint).__instancecheck_str__(hint, value)
                else:
                    reason = "" if is_bearable(value, hint) else "its type is another"
            except AnnotationError as error:
                if not may_wait:
                    raise TypedError(_incalculable(claim, error)) from None
                waiting.append((claim, False))
                continue
            if reason:
                raise TypedError(
                    f"{claim.what} is {_described(value)}, which is no {shown(hint)}: "
                    f"{_explained(claim, found) or reason}"
                )
            _note_sizes(claim, found)


def _note_sizes(claim: Claim, found: dict[str, tuple[int, str]]) -> None:
    """Note where an axis got its size from."""
    if is_array_type(claim.hint):
        for name, _, size in _aligned(claim.hint, claim.value.shape):
            if name.isidentifier() and size is not None:
                found.setdefault(name, (size, f"in {claim.what.partition(',')[0]}"))


def _incalculable(claim: Claim, error: AnnotationError) -> str:
    return (
        f"{claim.what} is annotated {shown(claim.hint)}, which calculates with an axis that no "
        f"other annotation names: {str(error).partition('. ')[0]}"
    )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _explained(claim: Claim, found: Mapping[str, tuple[int, str]]) -> str | None:
    """Say why a tensor does not fit, and what to write; None where jaxtyping says it best."""
    hint, value = claim.hint, claim.value
    if not (is_array_type(hint) and isinstance(value, Tensor)):
        return None
    dtype = str(value.dtype).removeprefix("torch.")
    if not isinstance(value, _any_shape(hint)):
        written = f"write {_word(value.dtype).__name__}"
        only = getattr(torch, hint.dtypes[0]) if len(hint.dtypes) == 1 else None
        if value.is_floating_point() and only is not None and only.is_floating_point:
            written += f", or capture with dtype={only}"
        return f"{hint.dtype.__name__} does not hold {dtype}; {written}"
    dims = hint.dim_str.split()
    if not _ranks_agree(dims, len(value.shape)):
        written = (
            "" if not claim.axes or "_" in claim.axes else f"; write {_suggested(hint, claim.axes)}"
        )
        return f"it has {_count_axes(len(value.shape))}, not {len(dims)}{written}"
    for name, _, size in _aligned(hint, value.shape):
        known, where = found.get(name, (size, ""))
        if size != known:
            return f"{name} is {size} here, but {known} {where}"
    return None


def _any_shape(hint: Any) -> Any:
    return hint.dtype[hint.array_type, "..."]


def _suggested(hint: Any, axes: Axes) -> str:
    return f'{hint.dtype.__name__}[{hint.array_type.__name__}, "{" ".join(axes)}"]'


def _count_axes(count: int) -> str:
    return f"{count} ax{'i' if count == 1 else 'e'}s"


def _is_variadic(dim: str) -> bool:
    return dim == "..." or "*" in dim[: len(dim) - len(dim.lstrip("*#?_"))]


def _ranks_agree(dims: list[str], rank: int) -> bool:
    variadic = sum(map(_is_variadic, dims))
    return len(dims) - variadic <= rank if variadic else len(dims) == rank


def _aligned(
    hint: Any, sizes: Iterable[int | None], axes: Axes | None = None
) -> list[tuple[str, str, int | None]]:
    """Put the dimensions of an annotation beside the axes they stand for; `*batch` has none."""
    sizes = tuple(sizes)
    dims = hint.dim_str.split()
    names = axes or ("_",) * len(sizes)
    known = list(zip(names, sizes, strict=True))
    variadic = next((place for place, dim in enumerate(dims) if _is_variadic(dim)), None)
    if variadic is not None:
        behind = len(dims) - variadic - 1
        known = [*known[:variadic], *known[len(known) - behind :]]
        del dims[variadic]
    return [(dim, axis, size) for dim, (axis, size) in zip(dims, known, strict=True)]


@dataclass(frozen=True)
class Expected:
    """What a captured tensor will be, as far as that is known before any forward.

    Attributes:
        axes: The axes that it will have.
        sizes: Their sizes, as far as the config and the slice fix them.
        model_sizes: The sizes of axes that the model's config fixes.
        because: Why the axes are not those of the site, to be put behind them in a message.

    """

    axes: Axes
    sizes: Sizes
    model_sizes: Mapping[str, int]
    because: str = ""

    def written(self, hint: Any) -> str:
        """Say how to annotate it; an axis of which a part is selected has a size for a name."""
        dims = (
            axis if size in {None, self.model_sizes.get(axis, size)} else str(size)
            for axis, size in zip(self.axes, self.sizes, strict=True)
        )
        return f"write {_suggested(hint, tuple(dims))}"


def refuse_impossible(what: str, hint: Any, expected: Expected) -> None:
    """Refuse an annotation that no activation can fit, before there is one.

    Args:
        what: What is annotated, for messages.
        hint: Its annotation.
        expected: What it will be.

    Raises:
        TypedError: It has another number of axes, names them otherwise, or gives a size that
            they cannot have.

    """
    axes, listed = expected.axes, f"{' '.join(expected.axes)!r}{expected.because}"
    dims = hint.dim_str.split()
    if dims[:1] == ["token"] and axes[:2] == ("batch", "pos") and len(dims) == len(axes) - 1:
        return  # as some MLPs run on flattened sequences, which shows once they fire
    if not _ranks_agree(dims, len(axes)):
        raise TypedError(
            f"{what} is annotated {shown(hint)}, with {_count_axes(len(dims))}, but will have "
            f"{len(axes)}, {listed}; {expected.written(hint)}"
        )
    for dim, axis, size in _aligned(hint, expected.sizes, axes):
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
    """Refuse an annotation that the dtype that was asked for does not fit.

    Raises:
        TypedError: The annotation is of floating-point tensors, but not of these.

    """
    if dtype is None:
        return
    any_shape = _any_shape(hint)
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64, dtype)
    fits = {kind for kind in kinds if isinstance(torch.empty(0, dtype=kind), any_shape)}
    if fits and dtype not in fits:
        raise TypedError(
            f"{what} is annotated {shown(hint)}, but dtype={dtype} was asked for; write "
            f"{_word(dtype).__name__}, or leave the dtype out"
        )
