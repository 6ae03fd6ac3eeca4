"""Find which output of an attention module is the attention pattern."""

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from actctx._errors import OutputError

_RANK = 4
_TOLERANCE = {torch.float16: 0.02, torch.bfloat16: 0.05}


@dataclass(frozen=True, eq=False)
class Pattern:
    """Finds the attention pattern among the outputs of an attention module.

    A pattern is `batch head query key`, and its rows sum to 1. TransformerLens says at which
    position it is returned, but only for the way in which a bridge calls the module; some modules
    return a position bias or a cache there.

    Attributes:
        name: The hook point.
        module: The name of the attention module.
        attention: The attention module, which drops at random while it is trained.
        place: Where TransformerLens expects it among the outputs.
        is_part: Whether its rows may sum to less, because attention has sinks or the pattern is a
            part of a joint one.
        is_optional: Whether the module returns it only if it is asked to.

    """

    name: str
    module: str
    attention: weakref.ref[nn.Module]
    place: int
    is_part: bool
    is_optional: bool

    def __call__(self, value: Any) -> Tensor:
        """Return the pattern.

        Raises:
            OutputError: No output is a pattern, or several could be.

        """
        returned = [*_tensors(value)]
        expected = value[self.place] if _has(value, self.place) else None
        output = returned[0] if returned else None
        if isinstance(expected, Tensor) and self._fits(expected, output):
            return expected
        fitting = [each for each in returned[1:] if self._fits(each, output)]
        if len(fitting) == 1 and not self.is_part:
            return fitting[0]
        remedy = (
            "call the model with output_attentions=True"
            if self.is_optional
            else "capture it from a TransformerBridge of the model"
        )
        shapes = ", ".join(str(tuple(each.shape)) for each in returned)
        raise OutputError(
            f"{self.name!r} is looked for among what {self.module!r} returns, but of its tensors "
            f"({shapes}) {'none is' if not fitting else 'several can be'} an attention pattern, "
            f"whose rows sum to 1; {remedy}"
        )

    def _fits(self, tensor: Tensor, output: Tensor | None) -> bool:
        if tensor.dim() != _RANK or not tensor.is_floating_point():
            return False
        if output is not None and output.dim() == _RANK - 1:  # batch query d_model
            batch, _, query, _ = tensor.shape
            # Patterns of windowed attention have the query first.
            if output.shape[:2] != (batch, query):
                return False
        if tensor.is_meta or isinstance(tensor, FakeTensor):
            return True  # it has no values
        rows = tensor.detach().sum(-1, dtype=torch.float32)
        # Rows of padding alone may be zero, or NaN.
        sums = rows[rows.isfinite() & (rows != 0)]
        attention = self.attention()
        drops = attention is not None and attention.training
        tolerance = _TOLERANCE.get(tensor.dtype, 1e-3)
        least = 0.0 if drops or self.is_part else 1 - tolerance
        most = torch.inf if drops else 1 + tolerance
        is_positive = (tensor.detach().nan_to_num() >= 0).all()
        return bool(((sums >= least) & (sums <= most)).all() & is_positive)


def _has(value: Any, place: int) -> bool:
    return isinstance(value, tuple | list) and len(value) > place


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)
