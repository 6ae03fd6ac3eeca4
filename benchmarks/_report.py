"""What was measured, as a table and against the targets."""

import os
import platform
import re
import statistics
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from benchmarks._ways import BATCHES, GATHER_LIMIT, GATHER_WAYS, LIMIT, WAYS

MIB = 2**20
MOST_MEMORY = 1.05
MOST_TIME = 1.03
TARGET = "capture-stop"


@dataclass
class Result:
    """What one way took.

    Attributes:
        way: The name of the way.
        peak_bytes: Its extra peak memory; None where it could not be measured.
        payload_bytes: The bytes of the activation that it yields; None for a bare forward.
        sha256: The hash of that activation.
        does_not_fit: Whether the machine had too little memory for it.
        seconds: The time of each run, and of the run of the limit beside it.

    """

    way: str
    peak_bytes: int | None = None
    payload_bytes: int | None = None
    sha256: str | None = None
    does_not_fit: bool = False
    seconds: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Ratio:
    """The time of a way relative to the limit: median and quartiles."""

    median: float
    low: float
    high: float


def find_disagreement(results: list[Result]) -> str | None:
    """Say which ways yield an activation that is not bit-identical to that of most ways."""
    hashes = [result.sha256 for result in results if result.sha256]
    if len(set(hashes)) <= 1:
        return None
    usual = statistics.mode(hashes)
    odd = [result.way for result in results if result.sha256 not in {None, usual}]
    return f"{', '.join(odd)} did not yield the activation that the other ways did"


def memory_ratio(result: Result, results: list[Result]) -> float | None:
    """Relate an extra peak to that of the limit plus the activation itself."""
    limit = _limit(results).peak_bytes
    if limit is None or result.peak_bytes is None:
        return None
    payload = max((other.payload_bytes or 0) for other in results)
    return result.peak_bytes / (limit + payload)


def time_ratio(result: Result) -> Ratio | None:
    """Relate the time of each run to that of the limit beside it."""
    ratios = [mine / limit for mine, limit in result.seconds]
    if len(ratios) <= 1:
        return Ratio(ratios[0], ratios[0], ratios[0]) if ratios else None
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


def table(results: list[Result]) -> str:
    """Write the results as a Markdown table."""
    lines = [
        "| way | extra peak, MiB | x (limit + activation) | median time, s | x limit | quartiles |",
        "| --- | ---: | ---: | ---: | ---: | :---: |",
    ]
    for result in results:
        memory = memory_ratio(result, results)
        time = time_ratio(result)
        cells = [
            WAYS[result.way].title,
            _peak(result),
            "" if memory is None else f"{memory:.2f}",
            f"{statistics.median(s for s, _ in result.seconds):.2f}" if time else "",
            "" if time is None else f"{time.median:.3f}",
            "" if time is None else f"{time.low:.3f} to {time.high:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gather_table(results: list[Result]) -> str:
    """Write the results of gathering many batches as a Markdown table."""
    payload = max((result.payload_bytes or 0) for result in results)
    lines = [
        "| way | extra peak, MiB | x (payload + one batch) | x (bare + payload) |",
        "| --- | ---: | ---: | ---: |",
    ]
    for result in results:
        limit, peak = memory_ratio(result, results), result.peak_bytes
        one_more = None if peak is None or not payload else peak / (payload * (1 + 1 / BATCHES))
        cells = [
            GATHER_WAYS[result.way].title,
            _peak(result),
            "" if one_more is None else f"{one_more:.2f}",
            "" if limit is None else f"{limit:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def targets(results: list[Result]) -> list[str]:
    """Say whether the targets of `capture(stop=True)` are reached."""
    found = [result for result in results if result.way == TARGET]
    if not found:
        return []
    time = time_ratio(found[0])
    return [
        _verdict("memory", memory_ratio(found[0], results), MOST_MEMORY, "limit + activation"),
        _verdict("time", time.median if time else None, MOST_TIME, "limit"),
    ]


def machine() -> dict[str, str]:
    """Describe the machine and what runs on it."""
    memory = _line("/proc/meminfo", r"MemTotal:\s+(\d+) kB")
    libraries = ("torch", "transformer_lens", "transformers")
    return {
        "processor": _line("/proc/cpuinfo", r"model name\s+: (.+)") or platform.processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{int(memory) / 2**20:.1f} GiB" if memory else "unknown",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{library: version(library) for library in libraries},
    }


def _limit(results: list[Result]) -> Result:
    return next(result for result in results if result.way in {LIMIT, GATHER_LIMIT})


def _peak(result: Result) -> str:
    if result.does_not_fit:
        return "does not fit"
    return "" if result.peak_bytes is None else f"{result.peak_bytes / MIB:.0f}"


def _verdict(what: str, ratio: float | None, most: float, reference: str) -> str:
    if ratio is None:
        return f"{what} of {TARGET}: not measured"
    reached = "reached" if ratio <= most else "NOT reached"
    return f"{what} of {TARGET}: {ratio:.3f} x {reference}, target at most {most}: {reached}"


def _line(path: str, pattern: str) -> str | None:
    file = Path(path)
    found = re.search(pattern, file.read_text()) if file.exists() else None
    return found[1] if found else None
