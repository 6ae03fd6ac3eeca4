"""What is to be reached, and by how much it is."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

from benchmarks._report import Result, memory_ratio, time_ratio

MOST_MEMORY = 1.03
MOST_TIME = 1.02


@dataclass(frozen=True)
class Bound:
    """What a ratio is to keep: at most or at least a figure."""

    what: str
    bound: float
    least: bool = False

    def verdict(self, ratio: float | None) -> str:
        """Say whether it is reached, and by how much it is missed otherwise."""
        if ratio is None:
            return f"{self.what}: not measured"
        target = f"{self.what}: {ratio:.3f}, {'at least' if self.least else 'at most'} {self.bound}"
        missed = self.bound / ratio - 1 if self.least else ratio / self.bound - 1
        return f"{target}: {f'MISSED by {missed:.1%}' if missed > 0 else 'reached'}"


MEMORY = {
    "capture-stop": Bound("memory, bridge: capture(stop=True) / (limit + captured)", MOST_MEMORY),
    "plain-capture-stop": Bound("memory, plain model: the same", MOST_MEMORY),
    "bridge-last": Bound("memory, last position of a bridge: capture / by hand", MOST_MEMORY),
    "plain-last": Bound("memory, last position of a plain model: the same", MOST_MEMORY),
    "gather-64-capture": Bound("memory, 64 batches: capture / (bare + captured)", MOST_MEMORY),
}
TIME = {
    "capture-stop": Bound("time, bridge: capture(stop=True) / limit", MOST_TIME),
    "plain-capture-stop": Bound("time, plain model: the same", MOST_TIME),
}
LOAD = Bound("rate: data.loader / datasets", 3, least=True)
PLAIN = "plain-capture-stop"
LENS = ("plain-cache", "plain-cache-nograd", "plain-filter-stop-nograd")
SITES: tuple[tuple[str, str, Bound], ...] = (
    (
        "**`capture`, plain model**",
        "bare hook that clones, plain model",
        Bound("a site / hook", 2),
    ),
    ("**`capture`, bridge**", "bare hook that clones, bridge", Bound("the same, bridge", 2)),
    ("**`capture`, plain model**", "nnsight: `trace`, `save`", Bound("a site / nnsight's", 0.1)),
)


def targets(results: list[Result]) -> list[str]:
    """Say whether what is to be reached is."""
    found = {result.way: result for result in results}
    verdicts = [
        bound.verdict(memory_ratio(found[way], results))
        for way, bound in MEMORY.items()
        if way in found
    ]
    for way, bound in TIME.items():
        ratio = time_ratio(found[way]) if way in found else None
        verdicts += [bound.verdict(ratio.median)] if ratio else []
    if {"load-loader", "load-datasets"} <= found.keys():
        rate = _times_less([found["load-datasets"]], found["load-loader"], _time)
        verdicts.append(LOAD.verdict(rate))
    return verdicts + (_against_the_lens(found) if PLAIN in found and LENS[-1] in found else [])


def _against_the_lens(found: dict[str, Result]) -> list[str]:
    """Relate TransformerLens on a bridge, the best of it and all of it, to a plain model."""
    peak: Callable[[Result], float | None] = attrgetter("peak_bytes")
    lens = [found[way] for way in LENS if way in found]
    everything = [found[way] for way in LENS[:1] if way in found]
    return [
        Bound("memory: the best of TransformerLens / capture, plain model", 4, least=True).verdict(
            _times_less(lens, found[PLAIN], peak)
        ),
        Bound("time: the same", 1.8, least=True).verdict(_times_less(lens, found[PLAIN], _time)),
        Bound("memory: run_with_cache / capture, plain model", 20, least=True).verdict(
            _times_less(everything, found[PLAIN], peak)
        ),
    ]


def _time(result: Result) -> float | None:
    ratio = time_ratio(result)
    return ratio.median if ratio else None


def _times_less(
    theirs: list[Result], ours: Result, measure: Callable[[Result], float | None]
) -> float | None:
    more = [taken for each in theirs if (taken := measure(each))]
    less = measure(ours)
    return min(more) / less if more and less else None


def site_targets(found: dict[str, dict[str, float]], forwards: int) -> list[str]:
    """Say whether a site costs as little as it is to cost."""
    return [
        bound.verdict(found[ours][str(forwards)] / found[theirs][str(forwards)])
        for ours, theirs, bound in SITES
        if theirs in found
    ]
