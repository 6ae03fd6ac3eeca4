"""Compare results with each other, and write tables of them."""

import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, field

from benchmarks.ways.models import BRIDGE, HOOKED
from benchmarks.ways.tables import WAYS

MIB = 2**20
MOST_QUICK = 1.1
TIMES = "s | x limit | quartiles"
UNDER_TIMES = "---: | ---: | :---:"
OURS = ("capture-stop", "plain-capture-stop", "gather-64-capture")
TOLERANCE = 1e-4
"""Between eager attention and sdpa, in float32, relative to the largest absolute value."""


@dataclass
class Result:
    """The result of one way.

    Attributes:
        way: The name of the way.
        peak_bytes: Its extra peak memory; None where it could not be measured.
        payload_bytes: The bytes of the activations that it yields, 0 for a bare forward.
        sha256: The hash of those activations.
        difference: How far they are from those of another implementation of attention, relative
            to the largest absolute value of those.
        does_not_fit: Whether the machine had too little memory for it.
        failed: What went wrong, if anything did.
        seconds: The time of each run, and of the run of the limit beside it.

    """

    way: str
    peak_bytes: int | None = None
    payload_bytes: int = 0
    sha256: str | None = None
    difference: float | None = None
    does_not_fit: bool = False
    failed: str = ""
    seconds: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Ratio:
    """The time of a way relative to the limit: median and quartiles."""

    median: float
    low: float
    high: float


def find_disagreement(results: list[Result]) -> str | None:
    """Report ways whose results differ from those of the other ways with the same limit.

    Within one implementation of attention, results must be bit-identical. A way that ran and
    yielded nothing, although it is not a bare forward, is a disagreement too.
    """
    ran = [result for result in results if not result.failed and not result.does_not_fit]
    silent = [each.way for each in ran if not each.sha256 and WAYS[each.way].captures]
    if silent:
        return f"{', '.join(silent)} yielded nothing"
    groups: dict[tuple[str, bool], list[Result]] = defaultdict(list)
    for result in results:
        way = WAYS[result.way]
        if result.sha256:
            groups[way.limit, way.model in {BRIDGE, HOOKED}].append(result)
    for group in groups.values():
        usual = statistics.mode(result.sha256 for result in group)
        odd = [result.way for result in group if result.sha256 != usual]
        if odd:
            return f"{', '.join(odd)} did not yield the activation that the other ways did"
    far = [each.way for each in ran if not (each.difference or 0) <= TOLERANCE]  # or NaN
    near = f"sdpa's activation to {TOLERANCE} of its largest value"
    return f"{', '.join(far)} did not yield {near}" if far else None


def memory_ratio(result: Result, results: list[Result]) -> float | None:
    """Relate an extra peak to that of the limit, plus the activation if the limit yields none."""
    name = WAYS[result.way].limit
    limit = next(other for other in results if other.way == name)
    if limit.peak_bytes is None or result.peak_bytes is None:
        return None
    beside = [other.payload_bytes for other in results if WAYS[other.way].limit == name]
    return result.peak_bytes / (limit.peak_bytes + (0 if limit.payload_bytes else max(beside)))


def find_regressions(results: list[Result]) -> list[str]:
    """Report ways that did not fit although the model is tiny, and captures with too much memory.

    On Linux, missing measurements of their memory are failures too.
    """
    faults = [f"{each.way} does not fit into memory" for each in results if each.does_not_fit]
    for result in results:
        if result.way not in OURS or result.does_not_fit or result.failed:
            continue
        ratio = memory_ratio(result, results)
        if ratio is None and sys.platform == "linux":
            faults.append(f"the memory of {result.way} was not measured")
        elif ratio is not None and not ratio <= MOST_QUICK:
            taken = f"{ratio:.2f} x (limit + captured) of memory"
            faults.append(f"{result.way} takes {taken}, at most {MOST_QUICK}")
    return faults


def time_ratio(result: Result) -> Ratio | None:
    """Relate the time of each run to that of its paired limit."""
    ratios = [mine / limit for mine, limit in result.seconds]
    if len(ratios) <= 1:
        return Ratio(ratios[0], ratios[0], ratios[0]) if ratios else None
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


def rows(results: list[Result]) -> str:
    """Write the results as a Markdown table."""
    lines = [
        f"| way | captured, MiB | extra peak, MiB | x (limit + it) | {TIMES} |",
        f"| --- | ---: | ---: | ---: | {UNDER_TIMES} |",
    ]
    for result in results:
        cells = [
            WAYS[result.way].title,
            f"{result.payload_bytes / MIB:.1f}" if result.payload_bytes else "",
            _peak(result),
            _ratio(memory_ratio(result, results)),
            *_times(result),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def disk_rows(results: list[Result]) -> str:
    """Write the results of tables about the disk as a Markdown table."""
    lines = [f"| way | extra peak, MiB | {TIMES} |", f"| --- | ---: | {UNDER_TIMES} |"]
    for result in results:
        cells = [WAYS[result.way].title, _peak(result), *_times(result)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gather_rows(results: list[Result], batches: int) -> str:
    """Write the results of gathering many batches as a Markdown table."""
    lines = [
        f"| way | extra peak, MiB | x (payload + one batch) | x (bare + payload) | {TIMES} |",
        f"| --- | ---: | ---: | ---: | {UNDER_TIMES} |",
    ]
    for result in results:
        cells = [
            WAYS[result.way].title,
            _peak(result),
            _ratio(batch_ratio(result, results, batches)),
            _ratio(memory_ratio(result, results)),
            *_times(result),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def batch_ratio(result: Result, results: list[Result], batches: int) -> float | None:
    """Relate an extra peak to everything that is gathered plus one batch of it."""
    payload = max(each.payload_bytes for each in results)
    if result.peak_bytes is None or not payload:
        return None
    return result.peak_bytes / (payload * (1 + 1 / batches))


def _times(result: Result) -> tuple[str, str, str]:
    """Write the median of the seconds, and median and quartiles of the ratios to the limit."""
    time, seconds = time_ratio(result), median_seconds(result)
    if time is None or seconds is None:
        return "", "", ""
    spread = f"{time.low:.3f} to {time.high:.3f}" if len(result.seconds) > 1 else "one pass"
    return f"{seconds:.2f}", f"{time.median:.3f}", spread


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def median_seconds(result: Result) -> float | None:
    """Return the median of the times of a way; None if it was not timed."""
    return statistics.median(mine for mine, _ in result.seconds) if result.seconds else None


def _peak(result: Result) -> str:
    if result.does_not_fit or result.failed:
        return "does not fit" if result.does_not_fit else "failed"
    return "" if result.peak_bytes is None else f"{result.peak_bytes / MIB:.0f}"
