"""Where each feature is largest.

# NOTE [Ties]
Of equal values the one of the earlier sequence and position is taken, so the result is the same in
whatever order forwards come. Within a forward, values and the numbers of their rows are packed into
one integer each, of which no two are equal: what `torch.topk` does with equal ones is not defined.
"""

from typing import Any

import torch
from jaxtyping import Float, Int, Int64, Shaped
from torch import Tensor

from actctx._errors import OptionError
from actctx._stats.accumulator import RowAccumulator
from actctx._stats.arguments import read_count
from actctx._stats.contexts import Contexts, Decode, contexts_of, read_decode
from actctx._stats.rows import Over, Rows

_SHOWN = 5
"""The features that a notebook shows by itself."""


class TopK(RowAccumulator):
    """The largest values of each element, and where they are.

    NaN is taken for the smallest value. Of equal values the earlier ones are taken.

    Args:
        k: How many to keep of each element.
        context: How many tokens to keep on each side of theirs.
        decode: What makes text of a token id, for `show` and notebooks: a tokenizer, or a function.
            It is not saved.
        over: The axes that are reduced, by name or number: by default those of `batch`, `pos` and
            `token` that there are.
        device: Where the result is kept; by default where the activations are.

    Example:
        >>> top = TopK(2)
        >>> values = torch.tensor([[1.0], [3.0], [2.0]])
        >>> top.update(Observation(values=values, axes=("token", "d_mlp")))
        >>> top.values
        tensor([[3., 2.]])

    """

    def __init__(
        self,
        k: int,
        *,
        context: int = 0,
        decode: Decode | None = None,
        over: Over | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self._k = read_count("TopK", "k", k)
        self._context = read_count("TopK", "context", context, least=0)
        read_decode(decode)
        self.decode = decode
        super().__init__(over=over, device=device)

    def _options(self) -> dict[str, Any]:
        return {"k": self._k, "context": self._context}

    def _unsaved(self) -> dict[str, Any]:
        return {"decode": self.decode}

    def _of_rows(self, rows: Rows) -> dict[str, Tensor]:
        values = rows.values.flatten(1) if rows.axes else rows.values.unsqueeze(1)
        turns = _turns(rows)
        most = 2**21 if values.device.type == "cpu" else 2**26
        found = [
            _largest(part, turns, min(self._k, len(values)))
            for part in torch.split(values, max(1, most // len(values)), dim=1)
        ]
        shape = rows.values.shape[1:]
        largest, index = (torch.cat(each).reshape(*shape, -1) for each in zip(*found, strict=True))
        origins = rows.origins(index)
        held = {"values": largest, "sequence": origins.sequence, "position": origins.position}
        around = contexts_of(rows.observation, origins, self._context)
        held["token"] = around[..., self._context].long()
        if self._context:
            held["contexts"] = around
        return held

    def _merged(
        self, one: dict[str, Tensor], two: dict[str, Tensor], _counts: tuple[int, int]
    ) -> dict[str, Tensor]:
        shape = one["values"].shape[:-1]
        first, second = (
            {
                name: each.flatten(0, len(shape) - 1) if shape else each[None]
                for name, each in held.items()
            }
            for held in (one, two)
        )
        if first["values"].shape[1] < self._k:
            merged = _best(first, second, self._k)
        else:  # most features stay as they are
            changed = _precedes(second, 0, first, -1).nonzero().flatten()
            one, two = (
                {name: each[changed] for name, each in held.items()} for held in (first, second)
            )
            best = _best(one, two, self._k)
            merged = {name: each.index_copy(0, changed, best[name]) for name, each in first.items()}
        return {name: each.reshape(*shape, *each.shape[1:]) for name, each in merged.items()}

    def _largest(self, name: str) -> Tensor:
        held = self._read(name)
        if self.count < self._k:
            raise OptionError(
                f"TopK(k={self._k}) has seen {self.count} rows, so there are not as many largest "
                f"ones; run more forwards, or take TopK(k={self.count})"
            )
        return held.clone()

    @property
    def values(self) -> Float[Tensor, "... k"]:
        """The largest values of each element in single precision, the largest first."""
        return self._largest("values")

    @property
    def sequence(self) -> Int64[Tensor, "... k"]:
        """The sequence of each, counted over all forwards; -1 where it is not known."""
        return self._largest("sequence")

    @property
    def position(self) -> Int64[Tensor, "... k"]:
        """The position of each in its forward, padding included; -1 where it is not known."""
        return self._largest("position")

    @property
    def token(self) -> Int64[Tensor, "... k"]:
        """The token id at each; -1 where it is not known."""
        return self._largest("token")

    @property
    def contexts(self) -> Int[Tensor, "... k around"]:
        """The token ids around each, with its own in the middle; -1 where there is none.

        Raises:
            OptionError: It was made without `context=`, or has seen too few rows.

        """
        if not self._context:
            raise OptionError(
                "this TopK keeps no contexts; make it with context= the number of tokens to keep "
                "on each side"
            )
        return self._largest("contexts")

    def show(self, *features: int, decode: Decode | None = None, most: int = 10) -> Contexts:
        """Show the contexts of some features, with the tokens of the largest values coloured.

        Args:
            *features: The numbers of the features, along all kept axes as one; the first few by
                default.
            decode: What makes text of a token id: a tokenizer, or a function; by default what the
                statistic was made with. Without one, ids are shown.
            most: How many contexts to show of each.

        Returns:
            What shows itself in a notebook, or as text.

        Raises:
            OptionError: There is no such feature, or too few rows were seen.

        """
        values = self._largest("values").reshape(-1, self._k)
        count = len(values)
        chosen = features or tuple(range(min(count, _SHOWN)))
        for each in chosen:
            if not 0 <= each < count:
                raise OptionError(
                    f"there is no feature {each}: there are {count}, counted from 0 along all kept "
                    "axes"
                )
        around = self._largest("contexts") if self._context else self._largest("token")[..., None]
        rows = around.reshape(count, self._k, -1)[list(chosen), :most].tolist()
        shown = values[list(chosen), :most].tolist()
        to_text = read_decode(self.decode if decode is None else decode)
        return Contexts(chosen, shown, rows, to_text, middle=self._context)

    def _picture(self) -> str:
        if self.count < self._k:
            return ""
        return self.show()._repr_html_()


def _turns(rows: Rows) -> Int64[Tensor, " row"]:
    """Number rows by their sequence, and their position in it."""
    origins = rows.origins_of_rows()
    by_position = origins.position.argsort(stable=True)
    order = by_position[origins.sequence[by_position].argsort(stable=True)]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _largest(
    values: Shaped[Tensor, "row feature"], turns: Int64[Tensor, " row"], k: int
) -> tuple[Float[Tensor, "feature k"], Int64[Tensor, "feature k"]]:
    """Find the largest values of each feature, and their rows; the earlier ones of equal values."""
    single = values.float().T.contiguous() + 0.0  # which makes -0.0 equal to 0.0
    bits = torch.where(single.isnan(), -torch.inf, single).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the numbers
    packed = (ordered.long() << 32) + (len(turns) - 1 - turns)
    found = packed.topk(k, dim=1).values
    index = turns.argsort()[len(turns) - 1 - (found & 0xFFFFFFFF)]
    return single.gather(1, index), index


def _ranked(held: dict[str, Tensor], place: int) -> tuple[Tensor, Tensor, Tensor]:
    values = held["values"][:, place]
    numbers = torch.where(values.isnan(), -torch.inf, values)
    return numbers, held["sequence"][:, place], held["position"][:, place]


def _precedes(
    one: dict[str, Tensor], first: int, two: dict[str, Tensor], second: int
) -> Shaped[Tensor, " feature"]:
    """Return for which features an entry of one comes before an entry of the other."""
    value, sequence, position = _ranked(one, first)
    others, its_sequence, its_position = _ranked(two, second)
    is_earlier = (sequence < its_sequence) | (
        (sequence == its_sequence) & (position < its_position)
    )
    return (value > others) | ((value == others) & is_earlier)


def _best(one: dict[str, Tensor], two: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Take the largest entries of both, feature by feature."""
    both = {name: torch.cat([one[name], two[name]], dim=1) for name in one}
    order = both["position"].argsort(dim=1, stable=True)
    order = order.gather(1, both["sequence"].gather(1, order).argsort(dim=1, stable=True))
    numbers = torch.where(both["values"].isnan(), -torch.inf, both["values"])
    by_value = numbers.gather(1, order).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, by_value)[:, :k]
    return {
        name: each.gather(1, order)
        if each.dim() == order.dim()
        else each.gather(1, order.unsqueeze(-1).expand(-1, -1, each.shape[-1]))
        for name, each in both.items()
    }
