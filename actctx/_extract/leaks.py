"""Detect padding that reaches the tokens beside it, by running one sequence alone.

# NOTE [Leaks]
Some models let padding into the tokens beside it whatever the mask says: a convolution runs over
both, a pooling counts both, or the wrapper around a model drops the mask. No signature tells. So
the shortest sequence of the first batch with padding runs alone as well, and a data set whose rows
are others than those is warned of. It costs one forward of one sequence.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from actctx._errors import DataError
from actctx._extract.batching import Batch, given_at, spans
from actctx._model.known_faults import warn
from actctx._store.site_columns import FLOAT8

_OFF = {torch.float16: 0.1, torch.bfloat16: 0.1, **dict.fromkeys(FLOAT8, 0.3)}
_OFF_BY_DEFAULT = 1e-2
"""From which distance, relative to their norm, rows differ by more than rounding."""


@dataclass(frozen=True, eq=False)
class LoneSequence:
    """A sequence of a batch that is run by itself.

    Attributes:
        batch: The batch that has only it.
        rows: Its rows among those of the batch.
        where: Its tokens that are rows, as `Chosen` has them.

    """

    batch: Batch
    rows: Int64[Tensor, " row"]
    where: Int64[Tensor, "row 2"]

    def compare(
        self, together: Mapping[str, Tensor], alone: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        """Warn of rows that differ beside padding.

        Args:
            together: What each site left of the whole batch.
            alone: What it left of the sequence alone.
            dtype: What the model computes in.

        """
        for name, rows in together.items():
            mine, other = rows[self.rows], alone.get(name)
            if other is None or mine.shape != other.shape or not mine.is_floating_point():
                continue
            off = _distance(mine.flatten(1).double(), other.flatten(1).double())
            most = max(_OFF.get(each, _OFF_BY_DEFAULT) for each in (dtype, rows.dtype))
            if off > most:
                warn(
                    f"padding changes the tokens next to it: {name!r} of sequence "
                    f"{int(self.batch.sequences[0])} differs by {off:.0%} from the same sequence "
                    "run alone; give equal_lengths=True, so that no forward has padding"
                )
                return


def _distance(here: Tensor, there: Tensor) -> float:
    """Measure how far rows are apart, of their norms, or of the mean one where that is more."""
    norms = there.norm(dim=1)
    scale = torch.maximum(norms, norms.mean()).clamp_min(1e-12)
    return float(((here - there).norm(dim=1) / scale).max())


def one_alone(batch: Batch, where: Int64[Tensor, "token 2"]) -> LoneSequence | None:
    """Choose a sequence that has rows and padding; None where none can be taken by itself.

    Args:
        batch: The batch as it is run, with padding after the tokens.
        where: The tokens that are rows.

    """
    unpadded = batch.unpadded
    if unpadded is None or bool(unpadded.all()):
        return None
    first, lengths = spans(unpadded)
    sequences: Iterable[int] = torch.unique(where[:, 0]).tolist()
    fit = [
        (int(lengths[each]), each)
        for each in sequences
        if not first[each] and 0 < lengths[each] < unpadded.shape[1]
    ]
    if not fit:
        return None
    length, at = min(fit)
    (rows,) = ((where[:, 0] == at) & (where[:, 1] < length)).nonzero(as_tuple=True)
    if not len(rows):
        return None
    row = torch.tensor([at], device="cpu")
    places = torch.arange(length, device="cpu")[None]
    try:
        given: dict[str, Any] = given_at(batch, row, places)
    except DataError:  # it is not known what belongs to it
        return None
    own = Batch(batch.tokens[row, places], None, batch.sequences[row], given)
    own_where = where[rows].clone()
    own_where[:, 0] = 0
    return LoneSequence(own, rows, own_where)
