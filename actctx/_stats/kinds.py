"""The statistics of actctx by name, to make one of what a file says."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch

from actctx._errors import DataError, OptionError
from actctx._select.own import device_of
from actctx._stats.accumulator import Accumulator
from actctx._stats.counts import Counts
from actctx._stats.covariance import Covariance
from actctx._stats.frequency import Frequency
from actctx._stats.histogram import Histogram
from actctx._stats.linear_cka import LinearCKA
from actctx._stats.moments import Moments
from actctx._stats.sample import Sample
from actctx._stats.saving import damaged, read_state
from actctx._stats.topk import TopK

_KINDS: dict[str, type[Accumulator]] = {
    kind.__name__: kind
    for kind in (Counts, Covariance, Frequency, Histogram, LinearCKA, Moments, Sample, TopK)
}


def is_of_actctx(statistic: object) -> bool:
    """Return whether `of_state` makes such a statistic again."""
    return type(statistic) is _KINDS.get(type(statistic).__name__)


def of_state(state: Mapping[str, Any], *, device: torch.device | str | None = None) -> Accumulator:
    """Make a statistic of the state of one.

    Args:
        state: What `state_dict` returned.
        device: Where it is kept; by default where the tensors of the state are.

    Raises:
        DataError: It is not the state of a statistic that this version knows.

    """
    try:
        statistic = _KINDS[state["kind"]](device=device, **state["options"])
    except (LookupError, TypeError, OptionError):
        known = ", ".join(sorted(_KINDS))
        raise DataError(
            "what was given is not the state of a statistic that this version of actctx knows: "
            f"{known}; upgrade actctx, or load it into one of your own by load_state_dict"
        ) from None
    statistic.load_state_dict(state)
    return statistic


def load(path: str | PathLike[str], *, device: torch.device | str | None = None) -> Accumulator:
    """Read a statistic that its `save` wrote.

    Args:
        path: The file.
        device: Where it is kept; by default on the CPU.

    Returns:
        The statistic, with the options that it had. It shares no memory with the file, and can be
        updated and merged.

    Raises:
        DataError: There is no such file, it cannot be read, it does not hold a statistic, or a
            later version wrote it.
        OptionError: There is no such device, or `path` is not a path.

    Example:
        >>> moments.save("moments.safetensors")
        >>> load("moments.safetensors")
        Moments(): 4 rows of d_model=4, 112 B

    """
    to = device_of(device)
    place, state = read_state(path)
    try:
        return of_state(state, device=to)
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, DataError) and "upgrade" in str(error):
            raise DataError(f"cannot read '{place}': {error}") from None
        raise damaged(place) from None


load.__module__ = "actctx.stats"  # where users find it
