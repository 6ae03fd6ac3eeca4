"""Measures ways, in a process of its own: `python -m benchmarks._probe ORDER`.

The order is JSON, and so is the last line that it prints.
"""

import gc
import hashlib
import json
import random
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actctx._column import give_back_to_system
from benchmarks._models import Setup, build, make_tokens
from benchmarks._tables import WAYS
from benchmarks._ways import Captured, Way

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Order:
    """What a probe shall do: measure the memory of one way, or time several ways."""

    setup: Setup
    ways: tuple[str, ...]
    timed: bool = False
    repeats: int = 1
    shuffle_seed: int = 0

    def dumps(self) -> str:
        """Write the order as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Order":
        """Read an order that `dumps` wrote."""
        fields = json.loads(text)
        return cls(**fields | {"setup": Setup(**fields["setup"]), "ways": tuple(fields["ways"])})


def measure_memory(setup: Setup, way: Way) -> dict[str, Any]:
    """Measure the peak of one run, in bytes above what the process held before it.

    `peak_bytes` is None where the system does not tell it. `sha256` is that of the activation,
    so that processes can compare what they got, and `difference` how far it is from that of
    another implementation of attention.
    """
    model, tokens = build(setup, way.model), make_tokens(setup)
    way.run(model, tokens[:1, :8])  # what is imported and built once
    gc.collect()
    before = _reset_peak(setup)
    activations = _listed(way.run(model, tokens))
    peak = _peak(setup)
    return {
        "peak_bytes": None if before is None or peak is None else peak - before,
        "payload_bytes": sum(each.nbytes for each in activations),
        "sha256": _sha256(activations) if activations else None,
        "difference": _difference(setup, activations, WAYS[way.near]) if way.near else None,
    }


def _listed(captured: Captured) -> list[Tensor]:
    if captured is None:
        return []
    return [captured] if isinstance(captured, Tensor) else list(captured)


def _difference(setup: Setup, activations: list[Tensor], near: Way) -> float:
    theirs = _listed(near.run(build(setup, near.model), make_tokens(setup)))
    return max(
        float((mine.detach() - other).abs().max())
        for mine, other in zip(activations, theirs, strict=True)
    )


def measure_time(setup: Setup, ways: list[Way], *, repeats: int, seed: int) -> dict[str, Any]:
    """Time ways in passes, each in another order.

    What else the machine does changes from second to second, so each run of a way has a run of
    its limit beside it, by chance before or behind it. `seconds` has both for each pass.
    """
    limits = {way.limit: WAYS[way.limit] for way in ways}
    kinds = {way.model for way in [*ways, *limits.values()]}
    models, tokens = {kind: build(setup, kind) for kind in kinds}, make_tokens(setup)
    for limit in limits.values():
        limit.run(models[limit.model], tokens)
    chance = random.Random(seed)  # noqa: S311  nothing secret
    seconds: dict[str, list[tuple[float, float]]] = {way.name: [] for way in ways}
    for _ in range(repeats):
        for way in chance.sample(ways, len(ways)):
            pair, took = (way, limits[way.limit]), [0.0, 0.0]
            for i in chance.sample((0, 1), 2):
                took[i] = _time(setup, pair[i], models[pair[i].model], tokens)
            seconds[way.name].append((took[0], took[1]))
    return {"seconds": seconds}


def _time(setup: Setup, way: Way, model: Any, tokens: Tensor) -> float:
    _settle(setup)
    start = time.perf_counter()
    way.run(model, tokens)
    _synchronize(setup)
    return time.perf_counter() - start


def _settle(setup: Setup) -> None:
    """Leave nothing of the run before: no garbage, and no memory that the allocator keeps."""
    gc.collect()
    give_back_to_system()
    _synchronize(setup)


def _synchronize(setup: Setup) -> None:
    if setup.device != "cpu":
        torch.cuda.synchronize(setup.device)


def _reset_peak(setup: Setup) -> int | None:
    if setup.device != "cpu":
        torch.cuda.reset_peak_memory_stats(setup.device)
        return torch.cuda.memory_allocated(setup.device)
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def _peak(setup: Setup) -> int | None:
    if setup.device != "cpu":
        return torch.cuda.max_memory_allocated(setup.device)
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int | None:
    if not _STATUS.exists():
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _sha256(activations: list[Tensor]) -> str:
    found = hashlib.sha256()
    for activation in activations:
        found.update(activation.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _limit_memory() -> None:
    """Have torch refuse what the machine has no memory for, instead of being killed for it."""
    meminfo = Path("/proc/meminfo")
    held = _status_bytes("VmData")
    if not meminfo.exists() or held is None:
        return
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    if found:
        import resource

        most = held + int(int(found[1]) * 1024 * 0.95)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def main(text: str) -> None:
    """Do what is ordered, and print the result."""
    order = Order.loads(text)
    torch.set_num_threads(order.setup.threads)
    _limit_memory()
    ways = [WAYS[name] for name in order.ways]
    try:
        if order.timed:
            result = measure_time(order.setup, ways, repeats=order.repeats, seed=order.shuffle_seed)
        else:
            result = measure_memory(order.setup, ways[0])
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        result = {"does_not_fit": True}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
