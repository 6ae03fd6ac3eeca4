"""Count or estimate the memory of `run_with_cache`."""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from actctx._capture.hooks import Hook
from actctx._model.axes import axis_sizes
from actctx._model.flags import is_switched_off
from actctx._model.places import Places
from actctx._model.structure import tensors_in

# Hook points that share a storage with an earlier one: the input of a component, which is the
# output of an earlier one, and the output of a component, which is that of its last part.
_SHARES = re.compile(
    r"""
    .* (?<! \b o) (?<! \b out) (?<! \b ln2) (?<! \b embed) (?<! _embed) \.hook_in
    | .* attn\.hook_(?: out | hidden_states | cos | sin )
    | .* hook_[qk]_normed
    | \w*blocks\.[1-9]\d* \.hook_resid_pre
    """,
    re.VERBOSE,
)
_IN_FLOAT32 = re.compile(r".*\.(?:hook_scale|hook_normalized)")


def estimate_cache_bytes(model: nn.Module, batch: int, pos: int) -> int | None:
    """Estimate the memory of `run_with_cache` for a forward of this size.

    The estimate uses the axes of the hook points and the sizes in the model's config, so no forward
    runs. It is within a tenth of what `count_cache_bytes` counts for most models, and within a
    third for those whose attention scores and pattern are one storage (OPT, BERT).

    Args:
        model: A TransformerLens model.
        batch: The sequences of the forward.
        pos: The positions of each.

    Returns:
        Bytes; None for a model without hook points, or with an encoder and a decoder, whose
        sequences differ in length.

    """
    places = Places(model)
    names = [point[0] for point in places.listed() if point[0] in places.hook_points]
    if not names or any(name.startswith("decoder_blocks.") for name in names):
        return None
    sizes = {**axis_sizes(model), "batch": batch, "pos": pos, "query": pos, "key": pos, "1": 1}
    parameter = next(model.parameters(), torch.empty(0))
    held = 0
    for name in names:
        place = places[name]
        if place.axes is None or _shares(name, places) or is_switched_off(model, place):
            continue
        ids = name.endswith("embed.hook_in")
        itemsize = 8 if ids else 4 if _IN_FLOAT32.fullmatch(name) else parameter.itemsize
        held += itemsize * math.prod(sizes.get(axis, 0) for axis in place.axes)
    return held


def _shares(name: str, places: Places) -> bool:
    mlp_shares = name.endswith("mlp.hook_out") and f"{name[:-8]}out.hook_out" in places
    return mlp_shares or _SHARES.fullmatch(name) is not None


def count_cache_bytes(model: nn.Module, forward: Callable[[], object]) -> int:
    """Count the memory of `run_with_cache` for a forward, without using it.

    `run_with_cache` keeps the last value of every hook point, under each of its names. Tensors that
    share a storage are counted once, with the size of the storage.

    Args:
        model: A TransformerLens model.
        forward: Runs the model.

    Returns:
        The bytes of the storages.

    """
    with counting_cache(model) as held, torch.no_grad():
        forward()
    return held.nbytes


class Held:
    """The storages that a cache would hold, counted and not held."""

    def __init__(self) -> None:
        self._storages: dict[object, list[tuple[StorageWeakRef, int]]] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of the storages, each counted once."""
        held = itertools.chain.from_iterable(self._storages.values())
        return sum({reference.cdata: nbytes for reference, nbytes in held}.values())

    def see_point(self, name: str, value: object) -> None:
        """Count what a hook point fired with, in the place of what it fired with before."""
        tensor = value[0] if isinstance(value, tuple) and value else value
        if isinstance(tensor, Tensor):
            self._storages[name] = [_storage_of(tensor)]

    def see_output(self, module: nn.Module, value: object) -> None:
        """Count all tensors that a module returned, beside what it returned before."""
        self._storages.setdefault(module, []).extend(map(_storage_of, tensors_in(value)))


def _storage_of(tensor: Tensor) -> tuple[StorageWeakRef, int]:
    storage = tensor.untyped_storage()
    # A weak reference keeps the storage's address from being used again, not its memory.
    reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
    return reference, storage.nbytes()


@contextmanager
def counting_cache(model: nn.Module) -> Iterator[Held]:
    """Count what caching everything would hold of the forward that runs in the block.

    Of a TransformerLens model that is what `run_with_cache` holds; see `count_cache_bytes`. Of
    any other it is what its modules return, at each call of each of them.

    Args:
        model: The model.

    """
    held = Held()
    points = Places(model).hook_points.items()
    hooks = [
        Hook(point, name, functools.partial(held.see_point, name), io="point")
        for name, point in points
    ] or [
        Hook(module, name, functools.partial(held.see_output, module), io="out")
        for name, module in model.named_modules()
    ]
    with ExitStack() as undo:
        for hook in hooks:
            undo.callback(hook.remove)
            hook.put_on()
        yield held
