"""Check tensors against jaxtyping annotations, together with the sizes of a model.

# NOTE [What jaxtyping decides]
jaxtyping decides whether a tensor fits an annotation, in one of its scopes. The model's own sizes
are bound in this scope first, so `d_model` is one size, as if a first argument had it.
"""

import os
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Union, get_args, get_origin

import jaxtyping
import torch
from jaxtyping import AbstractArray, AbstractDtype, AnnotationError, Shaped, jaxtyped
from torch import Tensor

from actctx._errors import TypedError
from actctx._model.axes import Axes
from actctx._text import dtype_name

Sizes = tuple[int | None, ...]
"""The size of each axis in elements, None if unknown beforehand."""


def is_checking(check: bool) -> bool:  # noqa: FBT001  the option of that name
    """Return whether types are checked: by default, unless the environment has ACTCTX_CHECK=0."""
    return check and os.environ.get("ACTCTX_CHECK", "1") != "0"


def is_array_type(hint: object) -> bool:
    """Recognize an annotation of one tensor, such as `Float[Tensor, "batch pos d_model"]`."""
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def mentions_array_type(hint: object) -> bool:
    """Return whether an annotation contains a jaxtyping annotation."""
    return is_array_type(hint) or any(map(mentions_array_type, get_args(hint)))


def shown(hint: Any) -> str:
    """Write an annotation as its author did."""
    if not is_array_type(hint):
        is_class = isinstance(hint, type) and not get_args(hint)
        return hint.__name__ if is_class else repr(hint).replace("jaxtyping.", "")
    return suggested(hint, hint.dim_str.split())


def suggested(hint: Any, dims: Iterable[str]) -> str:
    """Write an annotation of a tensor with other dimensions."""
    return f'{hint.dtype.__name__}[{hint.array_type.__name__}, "{" ".join(dims)}"]'


def spec_of(dtype: torch.dtype, axes: Axes, sizes: Sizes) -> type:
    """Build the annotation of a tensor, such as `Float32[Tensor, "batch d_model=768"]`."""
    parts = (
        axis if size is None or axis == "1" else str(size) if axis == "_" else f"{axis}={size}"
        for axis, size in zip(axes, sizes, strict=True)
    )
    built: type = word_of(dtype)[Tensor, " ".join(parts)]
    return built


def word_of(dtype: torch.dtype) -> Any:
    """Find the jaxtyping word for one dtype, such as `Float32`."""
    name = dtype_name(dtype)
    for word in vars(jaxtyping).values():
        if isinstance(word, type) and issubclass(word, AbstractDtype) and word is not AbstractDtype:
            names = word.dtypes if isinstance(word.dtypes, list | tuple) else ()
            if name in names and len({str(each).rstrip("_") for each in names}) == 1:
                return word
    return Shaped


@dataclass(frozen=True, eq=False)
class Claim:
    """A value, and the annotation that it is checked against.

    Attributes:
        what: What it is, for messages, such as `Acts.resid, from 'blocks.0.hook_resid_post',`.
        value: The value; for a tensor, only shape and dtype are read.
        hint: The annotation.
        axes: The names of a tensor's axes, if known.

    """

    what: str
    value: Any
    hint: Any
    axes: Axes | None = None

    def parts(self) -> "list[Claim]":
        """Split it into claims about single tensors, as far as the annotation consists of them."""
        parts = [(where, *part) for where, part in _parts(self.value, self.hint)]
        if not all(is_array_type(hint) for _, _, hint in parts):
            return [self]
        return [replace(self, what=self.what + w, value=v, hint=h) for w, v, h in parts]


def _parts(value: Any, hint: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Go through lists, tuples, dicts and optional tensors; beartype only samples their items."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind in {Union, types.UnionType} and isinstance(value, Tensor):
        arrays = [each for each in inner if is_array_type(each)]
        yield "", (value, arrays[0] if len(arrays) == 1 else hint)
    elif kind in {list, tuple} and isinstance(value, kind):
        alike = kind is list or inner[1:] == (...,)
        hints = [inner[0]] * len(value) if alike else inner
        if len(hints) != len(value):
            yield "", (value, hint)
            return
        for place, pair in enumerate(zip(value, hints, strict=True)):
            yield f" at [{place}]", pair
    elif kind is dict and isinstance(value, dict):
        for key, each in value.items():
            yield f" at [{key!r}]", (each, inner[1])
    else:
        yield "", (value, hint)


def hold(claims: Iterable[Claim], sizes: Mapping[str, int]) -> None:
    """Check values against their annotations, together with the sizes of a model.

    Args:
        claims: The values and their annotations. An annotation may compute with axes that others
            name, in any order.
        sizes: The sizes of axes that the model's config fixes, in elements.

    Raises:
        TypedError: A value does not fit its annotation.

    """
    with jaxtyped("context"):
        # Not in a separate function, which could get its own scope.
        for axis, size in sizes.items():
            config: Any = Shaped[Tensor, axis]
            isinstance(torch.empty(size, device="meta"), config)
        found = {axis: (size, "in the model's config") for axis, size in sizes.items()}
        waiting = deque(each for claim in claims for each in claim.parts())
        put_off = 0
        while waiting:
            claim = waiting.popleft()
            value, hint = claim.value, claim.hint
            try:
                if is_array_type(hint):  # as beartype requires too
                    reason = type(hint).__instancecheck_str__(hint, value)
                else:
                    reason = "" if _fits(value, hint) else "it has a different type"
            except AnnotationError as error:
                waiting.append(claim)
                put_off += 1
                if put_off == len(waiting):
                    raise TypedError(_incalculable(claim, error)) from None
                continue
            if reason:
                raise TypedError(
                    f"{claim.what} is {_described(value)}, which does not match {shown(hint)}: "
                    f"{_explained(claim, found) or reason}"
                )
            put_off = 0
            _note_sizes(claim, found)


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value fits an annotation that is not of one tensor."""
    with _hashable_object():
        from beartype.door import is_bearable  # slow to import, and few annotations need it
    return is_bearable(value, hint)


@contextmanager
def _hashable_object() -> Iterator[None]:
    """Remove nnsight's `save` from `object` while beartype is first imported.

    Beartype makes a set of the attributes of `object`, and nnsight's cannot be hashed.
    """
    save = vars(object).get("save") if "nnsight" in sys.modules else None
    if save is None or "beartype" in sys.modules:
        yield
        return
    from nnsight._c.py_mount import mount, unmount

    unmount("save")
    try:
        yield
    finally:
        mount(save.__func__, "save")


def _note_sizes(claim: Claim, found: dict[str, tuple[int, str]]) -> None:
    """Record where the size of an axis comes from."""
    if is_array_type(claim.hint):
        for name, _, size in aligned(claim.hint, claim.value.shape):
            if name.isidentifier() and size is not None:
                found.setdefault(name, (size, f"in {claim.what.partition(',')[0]}"))


def _incalculable(claim: Claim, error: AnnotationError) -> str:
    return (
        f"{claim.what} is annotated {shown(claim.hint)}, which computes with an axis that no other "
        f"annotation names: {str(error).partition('. ')[0]}"
    )


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{dtype_name(value.dtype)} {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _explained(claim: Claim, found: Mapping[str, tuple[int, str]]) -> str | None:
    """Explain why a tensor does not fit, and what to write; None if jaxtyping's message is best."""
    hint, value = claim.hint, claim.value
    if not (is_array_type(hint) and isinstance(value, Tensor)):
        return None
    if isinstance(value, hint.array_type) and not isinstance(value, any_shape(hint)):
        written = f"write {word_of(value.dtype).__name__}"
        only = getattr(torch, hint.dtypes[0], None) if len(hint.dtypes) == 1 else None
        if value.is_floating_point() and only is not None and only.is_floating_point:
            how = "pass it in" if claim.axes is None else "capture with"
            written += f", or {how} dtype={only}"
        return f"{hint.dtype.__name__} does not hold {dtype_name(value.dtype)}; {written}"
    dims = hint.dim_str.split()
    if not ranks_agree(dims, len(value.shape)):
        written = (
            "" if not claim.axes or "_" in claim.axes else f"; write {suggested(hint, claim.axes)}"
        )
        return f"it has {count_axes(len(value.shape))}, not {len(dims)}{written}"
    for name, _, size in aligned(hint, value.shape):
        known, where = found.get(name, (size, ""))
        if size != known:
            return (
                f"{name} is {size} here, but {known} {where}; if these are different things, "
                "rename one of them"
            )
    return None


def any_shape(hint: Any) -> Any:
    """Return the annotation of a tensor with its shape left open."""
    return hint.dtype[hint.array_type, "..."]


def count_axes(count: int) -> str:
    """Write a number of axes, as in `2 axes`."""
    return f"{count} ax{'i' if count == 1 else 'e'}s"


def _is_variadic(dim: str) -> bool:
    return dim == "..." or "*" in dim[: len(dim) - len(dim.lstrip("*#?_"))]


def ranks_agree(dims: list[str], rank: int) -> bool:
    """Return whether an annotation's dimensions can be those of a tensor of this rank."""
    variadic = sum(map(_is_variadic, dims))
    return len(dims) - variadic <= rank if variadic else len(dims) == rank


def aligned(
    hint: Any, sizes: Iterable[int | None], axes: Axes | None = None
) -> list[tuple[str, str, int | None]]:
    """Pair the dimensions of an annotation with their axes; `*batch` has none."""
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
