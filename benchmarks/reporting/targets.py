"""The targets of the results, and whether they are reached."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.reporting.report import Result, batch_ratio, memory_ratio, time_ratio

MOST_MEMORY = 1.03
MOST_TIME = 1.02


@dataclass(frozen=True)
class Bound:
    """The bound of a ratio: at most or at least a number."""

    what: str
    bound: float
    least: bool = False

    def verdict(self, ratio: float | None, *, lack: str = "") -> str:
        """Say whether it is reached, or by how much it is missed."""
        if ratio is None:
            return f"{self.what}: not measured{f', {lack}' if lack else ''}"
        target = f"{self.what}: {ratio:.3f}, {'at least' if self.least else 'at most'} {self.bound}"
        missed = self.bound / ratio - 1 if self.least else ratio / self.bound - 1
        return f"{target}: {f'MISSED by {missed:.1%}' if missed > 0 else 'reached'}"


MEMORY = {
    "capture-stop": Bound("memory, bridge: capture(stop=True) / (limit + captured)", MOST_MEMORY),
    "plain-capture-stop": Bound("memory, plain model: the same", MOST_MEMORY),
    "bridge-last": Bound("memory, last position of a bridge: capture / by hand", MOST_MEMORY),
    "plain-last": Bound("memory, last position of a plain model: the same", MOST_MEMORY),
    "gather-64-capture": Bound(
        "memory, 64 batches: capture / (bare forward + all that is captured)", MOST_MEMORY
    ),
}
GATHERED = Bound(
    "memory, 64 batches: capture / (all that is captured + what is captured of one batch)",
    MOST_MEMORY,
)
TIME = {
    "capture-stop": Bound("time, bridge: capture(stop=True) / limit", MOST_TIME),
    "plain-capture-stop": Bound("time, plain model: the same", MOST_TIME),
}
LAST_POSITION = {
    "bridge-last": "memory, last position of a bridge: capture / (bare forward + captured)",
    "plain-last": "memory, last position of a plain model: capture / (bare forward + captured)",
}
LOAD = Bound("rate: data.loader / datasets", 3, least=True)
CAPTURE = "plain-capture-stop"
CACHE, CACHE_NOGRAD = "plain-cache", "plain-cache-nograd"
LENS = (CACHE, CACHE_NOGRAD, "plain-filter-stop-nograd")
SITES: tuple[tuple[str, str, Bound], ...] = (
    (
        "**`capture`, plain model**",
        "bare hook that clones, plain model",
        Bound("a site / hook", 2),
    ),
    ("**`capture`, bridge**", "bare hook that clones, bridge", Bound("the same, bridge", 2)),
    ("**`capture`, plain model**", "nnsight: `trace`, `save`", Bound("a site / nnsight's", 0.1)),
)


def targets(results: list[Result], *, batches: int = 1) -> list[str]:
    """Say which targets are reached."""
    found = {result.way: result for result in results}
    verdicts = [
        bound.verdict(memory_ratio(found[way], results))
        for way, bound in MEMORY.items()
        if way in found
    ]
    if "gather-64-capture" in found:
        ratio = batch_ratio(found["gather-64-capture"], results, batches)
        verdicts.append(GATHERED.verdict(ratio))
    verdicts += [
        _of_its_own(found, way) for way in LAST_POSITION if {way, f"{way}-bare"} <= found.keys()
    ]
    for way, bound in TIME.items():
        passes = len(found[way].seconds) if way in found else 0
        time = time_ratio(found[way]) if passes > 1 else None  # one pass cannot show 2 %
        verdicts += [bound.verdict(time.median)] if time else []
    if {"load-loader", "load-datasets"} <= found.keys():
        rate = _times_less([found["load-datasets"]], found["load-loader"], _time)
        verdicts.append(LOAD.verdict(rate))
    asked = CAPTURE in found and any(way in found for way in LENS)
    return verdicts + (_against_the_lens(found) if asked else [])


def _of_its_own(found: dict[str, Result], way: str) -> str:
    """Say whether it costs no more than its own bytes and a forward that keeps nothing."""
    mine, bare = found[way], found[f"{way}-bare"].peak_bytes
    ratio = mine.peak_bytes / (bare + mine.payload_bytes) if mine.peak_bytes and bare else None
    return Bound(LAST_POSITION[way], MOST_MEMORY).verdict(ratio)


def _against_the_lens(found: dict[str, Result]) -> list[str]:
    """Relate TransformerLens on a bridge, its best way and caching everything, to a plain model.

    A way that does not fit is not the best; one that failed or was not requested might be.
    """
    unknown = [way for way in LENS if way not in found or found[way].failed]
    lack = f"since {', '.join(unknown)} did not run" if unknown else ""
    lens = [] if unknown else [found[way] for way in LENS]
    best = "{}: the best of TransformerLens / capture, plain model"
    verdicts = [
        Bound(best.format(what), bound, least=True).verdict(
            _times_less(lens, found[CAPTURE], measure), lack=lack
        )
        for what, bound, measure in (("memory", 4, _peak), ("time", 1.8, _time))
    ]
    everything, title = CACHE, "run_with_cache"
    if CACHE in found and found[CACHE].does_not_fit:
        everything, title = CACHE_NOGRAD, "run_with_cache under no_grad, as it does not fit without"
    ran = [found[everything]] if everything in found else []
    everything_less = _times_less(ran, found[CAPTURE], _peak)
    bound = Bound(f"memory: {title} / capture, plain model", 20, least=True)
    return [*verdicts, bound.verdict(everything_less)]


def _peak(result: Result) -> float | None:
    return result.peak_bytes


def _time(result: Result) -> float | None:
    ratio = time_ratio(result)
    return ratio.median if ratio else None


def _times_less(
    theirs: list[Result], ours: Result, measure: Callable[[Result], float | None]
) -> float | None:
    """Relate the smallest of those that fit, all of which must be measured, to ours."""
    more = [measure(each) for each in theirs if not each.does_not_fit]
    measured = [taken for taken in more if taken]
    less = measure(ours)
    return min(measured) / less if less and measured and measured == more else None


def site_targets(found: dict[str, dict[str, float]], forwards: int) -> list[str]:
    """Say whether a site costs no more than its target.

    The cost of a site is a difference of times, and may be zero or negative.
    """

    def verdict(ours: str, theirs: str, bound: Bound) -> str:
        mine, other = (found[way][str(forwards)] for way in (ours, theirs))
        return bound.verdict(mine / other if min(mine, other) > 0 else None)

    return [verdict(ours, theirs, bound) for ours, theirs, bound in SITES if theirs in found]
