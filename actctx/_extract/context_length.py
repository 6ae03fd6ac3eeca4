"""Refuse batches that are longer than a model's table of positions, as its look-ups show.

# NOTE [Positions]
A forward that looks up a position beyond the end of a table fails deep in the model, on a GPU in a
way that nothing recovers from. No name tells such a table from others, and models with rotary
positions read on beyond what their config says. So a batch that is longer than what is known to be
read runs with its look-ups watched, and the first that would fail is refused.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from actctx._errors import DataError
from actctx._extract.batching import Batch

_LOOK_UPS = {torch.index_select, Tensor.index_select, torch.gather, Tensor.gather}


class Positions(TorchFunctionMode):
    """Refuses look-ups beyond the end of a table while a forward runs.

    Args:
        model: The model.
        batch: What it is given.

    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__()
        self._batch = batch
        self._width = batch.tokens.shape[1]
        self._names = {
            each.untyped_storage()._cdata: name
            for name, each in (*model.named_parameters(), *model.named_buffers())
            if not each.is_meta and each.layout is torch.strided
        }

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Pass a call on, unless it looks up what a table does not have.

        Raises:
            DataError: It does.

        """
        kwargs = kwargs or {}
        if function is nn.functional.embedding:
            indices, table = (*args, *map(kwargs.get, ("input", "weight")[len(args) :]))[:2]
            self._check(table, 0, indices)
        elif function in _LOOK_UPS:
            names = ("input", "dim", "index")
            table, dim, indices = (*args, *map(kwargs.get, names[len(args) :]))[:3]
            self._check(table, dim, indices)
        elif function is Tensor.__getitem__:
            self._check_item(*args)
        return function(*args, **kwargs)

    def _check_item(self, table: Tensor, index: Any) -> None:
        parts = index if isinstance(index, tuple) else (index,)
        if any(part is Ellipsis for part in parts):
            return
        dim = 0
        for part in parts:
            if dim >= table.dim():
                return  # torch will say so
            if isinstance(part, Tensor):
                self._check(table, dim, part)
            elif isinstance(part, slice) and isinstance(part.stop, int):
                start = part.start if isinstance(part.start, int) else 0
                # As many as there are tokens, of fewer: what is made of them does not fit, unless
                # a single one is spread over all.
                is_short = part.stop - start == self._width and 1 < table.shape[dim] < part.stop
                if is_short and table.untyped_storage()._cdata in self._names:
                    self._refuse(table, table.shape[dim])
            # A mask of bools stands for as many axes as it has.
            is_mask = isinstance(part, Tensor) and part.dtype in {torch.bool, torch.uint8}
            dim += part.dim() if is_mask else not (part is None or isinstance(part, bool))

    def _check(self, table: Any, dim: Any, indices: Any) -> None:
        if not isinstance(table, Tensor) or not isinstance(indices, Tensor) or indices.is_meta:
            return
        if indices.dtype not in {torch.int32, torch.int64} or not indices.numel():
            return
        size, most = table.shape[dim], int(indices.max())
        if most < size:
            return
        if self._is(indices, self._batch.tokens):
            raise DataError(
                f"from sequence {int(self._batch.sequences[0])} on, the input holds the token id "
                f"{most}, but the model knows those from 0 to {size - 1}; give the ids of its own "
                "tokenizer"
            )
        given = [name for name, each in self._batch.given.items() if self._is(indices, each)]
        if given and given[0] != "position_ids":
            raise DataError(
                f"from sequence {int(self._batch.sequences[0])} on, the input holds {most} under "
                f"{given[0]!r}, but the model knows numbers from 0 to {size - 1}; give those"
            )
        self._refuse(table, size)

    @staticmethod
    def _is(indices: Tensor, given: Any) -> bool:
        is_like = isinstance(given, Tensor) and given.shape == indices.shape
        return is_like and torch.equal(indices.to("cpu", torch.long), given.long())

    def _refuse(self, table: Tensor, size: int) -> None:
        name = self._names.get(table.untyped_storage()._cdata)
        raise DataError(
            f"from sequence {int(self._batch.sequences[0])} on, the input holds sequences of "
            f"{self._width} tokens, but {'the model' if name is None else repr(name)} has {size} "
            "positions; give shorter ones, or single sequences and context="
        )
