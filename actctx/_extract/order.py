"""Refuse inputs whose order differs each time, which cannot be resumed."""

import sys
from collections.abc import Iterator
from typing import Any

from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from actctx._errors import DataError

_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_DRAWN = 2**96
"""A bound that almost every seed drawn by NumPy itself exceeds."""


def check_order(data: Any) -> None:
    """Refuse an input that is shuffled without a seed."""
    if isinstance(data, DataLoader):
        sampler: Any = getattr(data.batch_sampler, "sampler", data.sampler)
        # Others, such as accelerate's, are subclasses with seeds of their own.
        if type(sampler) in _SAMPLERS and sampler.generator is None:
            raise DataError(_refusal("DataLoader", "generator=torch.Generator().manual_seed(0)"))
        data = data.dataset
    if _is_shuffled_stream(data):
        raise DataError(_refusal("stream of datasets", "a seed, as in shuffle(seed=0)"))


def _refusal(what: str, seed: str) -> str:
    return (
        f"data is a {what} that shuffles without a seed, so its order differs each time, and the "
        f"run could never be resumed; give it {seed}, or give resume=False"
    )


def _is_shuffled_stream(data: Any) -> bool:
    datasets = sys.modules.get("datasets")
    if datasets is None or not isinstance(data, datasets.IterableDataset):
        return False
    generators = (getattr(part, "generator", None) for part in _parts(data))
    seeds = [getattr(getattr(each, "bit_generator", None), "seed_seq", None) for each in generators]
    return any(
        isinstance(entropy := getattr(seed, "entropy", None), int) and entropy > _DRAWN
        for seed in seeds
    )


def _parts(stream: Any) -> Iterator[Any]:
    """Yield the parts of a stream."""
    waiting = [getattr(stream, "_ex_iterable", None)]
    while waiting:
        part = waiting.pop()
        if part is not None:
            yield part
            waiting += [getattr(part, "ex_iterable", None), *getattr(part, "ex_iterables", ())]
