"""Measure ways in a separate process: `python -m benchmarks.measuring.probe ORDER`.

The order is JSON, and so is the last line of the output.
"""

import hashlib
import json
import random
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring.checks import measure_checks
from benchmarks.measuring.devices import Meter, limit_memory, meter_of
from benchmarks.measuring.sites import measure_sites
from benchmarks.ways.models import Setup, build, make_tokens
from benchmarks.ways.tables import WAYS
from benchmarks.ways.way import Captured, Way

TINY = {"sites": measure_sites, "checks": measure_checks}
"""The tables that are measured in microseconds."""

LACKS_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""Messages of torch's generic errors if it runs out of memory."""


@dataclass(frozen=True)
class Order:
    """The task of a probe: measure the memory of one way, or time several, or a small table.

    It may use one part in `share` of the machine's memory.
    """

    setup: Setup
    ways: tuple[str, ...] = ()
    timed: bool = False
    tiny: str = ""
    repeats: int = 1
    shuffle_seed: int = 0
    share: int = 1

    def dumps(self) -> str:
        """Write the order as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Order":
        """Read an order that `dumps` wrote."""
        fields = json.loads(text)
        return cls(**fields | {"setup": Setup(**fields["setup"]), "ways": tuple(fields["ways"])})


def measure_memory(setup: Setup, way: Way, meter: Meter) -> dict[str, Any]:
    """Measure the peak of one run, in bytes above the process's memory before it.

    `peak_bytes` is None if the system does not report it. `sha256` is the hash of the activation,
    so that processes can compare results. `difference` is the distance from the activation of
    another implementation of attention, relative to its largest absolute value.
    """
    _prepare(setup, [way])
    model, tokens = build(setup, way.model), make_tokens(setup)
    way.run(model, tokens[:1, :8])  # imports and one-time setup
    captured, peak = meter.peak_of(partial(way.run, model, tokens))
    activations = _listed(captured)
    return {
        "peak_bytes": peak,
        "payload_bytes": sum(each.nbytes for each in activations),
        "sha256": _sha256(activations) if activations else None,
        "difference": _difference_from(WAYS[way.near], setup, activations) if way.near else None,
    }


def _prepare(setup: Setup, ways: Iterable[Way]) -> None:
    for way in ways:
        if way.prepare:
            way.prepare(setup)


def _listed(captured: Captured) -> list[Tensor]:
    if captured is None:
        return []
    return [captured] if isinstance(captured, Tensor) else list(captured)


def _difference_from(near: Way, setup: Setup, activations: list[Tensor]) -> float:
    theirs = _listed(near.run(build(setup, near.model), make_tokens(setup)))
    return relative_difference(activations, theirs)


def relative_difference(activations: list[Tensor], others: list[Tensor]) -> float:
    """Relate the largest difference to the largest absolute value; NaN if there is any NaN."""
    pairs = zip(activations, others, strict=True)
    differences = [(mine.detach() - other).abs().max() / other.abs().max() for mine, other in pairs]
    return float(torch.stack(differences).max())  # torch's, since Python's max ignores NaN


def measure_time(
    setup: Setup, ways: list[Way], meter: Meter, *, repeats: int, seed: int
) -> dict[str, Any]:
    """Time ways in passes, each in another order.

    The load of the machine changes from second to second, so each run of a way is paired with a run
    of its limit, randomly before or after it. `seconds` has both for each pass.

    Before timing, each way runs on a few tokens, and each limit on all of them. On an accelerator
    each way also runs on all of them, since its allocator grows in the first run; on the CPU that
    would double the time of tables with one pass.
    """
    limits = {way.limit: WAYS[way.limit] for way in ways}
    both = {way.name: way for way in [*ways, *limits.values()]}
    _prepare(setup, both.values())
    kinds = dict.fromkeys(way.model for way in both.values())
    models, tokens = {kind: build(setup, kind) for kind in kinds}, make_tokens(setup)
    for way in both.values():
        way.run(models[way.model], tokens[:1, :8])
    for way in (both if setup.device != "cpu" else limits).values():
        way.run(models[way.model], tokens)
    chance = random.Random(seed)  # noqa: S311  nothing secret
    seconds: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
    for _ in range(repeats):
        for way in chance.sample(ways, len(ways)):
            pair, took = (way, limits[way.limit]), [0.0, 0.0]
            for i in chance.sample((0, 1), 2):
                run = partial(pair[i].run, models[pair[i].model], tokens)
                took[i] = meter.seconds_of(run)
            seconds[way.name].append((took[0], took[1]))
    return {"seconds": seconds}


def _sha256(activations: list[Tensor]) -> str:
    found = hashlib.sha256()
    for activation in activations:
        found.update(activation.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def lacks_memory(error: Exception) -> bool:
    """Return whether the machine or the accelerator ran out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(text in str(error) for text in LACKS_MEMORY)


def main(text: str) -> None:
    """Run the order, and print the result."""
    order = Order.loads(text)
    setup, meter = order.setup, meter_of(order.setup.device)
    torch.set_num_threads(setup.threads)
    if setup.device == "cpu":
        limit_memory(order.share)
    ways = [WAYS[name] for name in order.ways]
    try:
        if order.tiny:
            result = TINY[order.tiny](setup, rounds=order.repeats)
        elif order.timed:
            seed = order.shuffle_seed
            result = measure_time(setup, ways, meter, repeats=order.repeats, seed=seed)
        else:
            result = measure_memory(setup, ways[0], meter)
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        result = {"does_not_fit": True}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
