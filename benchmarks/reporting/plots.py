"""Plots of the results: one for each sweep, and bars for the plain model."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.reporting.report import MIB, Result, median_seconds, time_ratio
from benchmarks.ways.sweeps import SWEEPS
from benchmarks.ways.tables import TABLES, WAYS

# Okabe and Ito's colours, which colour-blind readers can distinguish, dark enough for white paper
# and light enough for black paper.
LOOKS = {
    "run_with_cache, no_grad": ("#d55e00", "s"),
    "run_with_cache, filtered, stopped": ("#cc79a7", "v"),
    "hook and torch.cat": ("#d55e00", "s"),
    "hidden states, no logits": ("#b8860b", "D"),
    "nnsight, stopped": ("#7b6be0", "P"),
    "capture, bridge": ("#3b8fd0", "^"),
    "capture, plain model": ("#009e73", "o"),
}
INK = "#808890"
"""A grey that is readable on white and on black."""

Points = dict[int, float]


def draw(tables: dict[str, Any], folder: Path) -> list[str]:
    """Write plots of the tables as PNG and SVG; results that did not fit are left out.

    Args:
        tables: The content that `--json` writes.
        folder: The folder for the plots.

    Returns:
        The names of the plots: each sweep with two tables, and `plain`.

    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"font.size": 13, "svg.hashsalt": "actctx"}
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for sweep in SWEEPS:
        names = [name for name in tables if name in TABLES and TABLES[name].sweep == sweep]
        names.sort(key=lambda name: TABLES[name].x)
        found = {TABLES[name].x: tables[name] for name in names}
        if len(found) > 1:
            _draw_sweep(sweep, found, folder)
            drawn.append(sweep)
    if "plain" in tables:
        _draw_bars(tables["plain"], folder)
        drawn.append("plain")
    return drawn


def _results(table: dict[str, Any]) -> list[Result]:
    """Read the results of ways; those of removed ways are skipped."""
    return [Result(**each) for each in table["results"] if each["way"] in WAYS]


def _draw_sweep(sweep: str, found: dict[int, Any], folder: Path) -> None:
    from matplotlib import pyplot as plt

    peaks: dict[str, Points] = defaultdict(dict)
    seconds: dict[str, Points] = defaultdict(dict)
    for x, table in found.items():
        for result in _results(table):
            way = WAYS[result.way]
            if not way.label or way.name == way.limit:
                continue
            if result.peak_bytes:
                peaks[way.label][x] = result.peak_bytes / MIB
            if taken := median_seconds(result):
                seconds[way.label][x] = taken
    figure, (left, right) = plt.subplots(1, 2, figsize=(16, 4.8))
    for axes, lines, title in (
        (left, peaks, "extra peak memory, MiB"),
        (right, seconds, "time, s"),
    ):
        _dress(axes, title, SWEEPS[sweep], list(found))
        _draw_lines(axes, lines, list(found))
    figure.tight_layout(w_pad=3)
    _save(figure, folder / sweep)


def _draw_lines(axes: Any, lines: dict[str, Points], xs: list[int]) -> None:
    for label, points in lines.items():
        colour, marker = LOOKS[label]
        axes.plot(list(points), list(points.values()), color=colour, marker=marker, lw=2.5, ms=7)
    ends = {label: list(points.values())[-1] for label, points in lines.items()}
    for label, y in _spread(ends, axes).items():
        axes.annotate(
            label,
            (xs[-1], y),
            xytext=(10, 0),
            textcoords="offset points",
            color=LOOKS[label][0],
            fontweight="bold",
            va="center",
            annotation_clip=False,
        )


def _spread(ends: dict[str, float], axes: Any) -> dict[str, float]:
    """Move labels apart if lines end close to each other, and keep them next to the plot."""
    low, high = (math.log(y) for y in axes.get_ylim())
    gap, least, places = (high - low) * 0.085, -math.inf, {}
    for label, y in sorted(ends.items(), key=lambda end: end[1]):
        places[label] = max(math.log(y), least + gap)
        least = places[label]
    most = high
    for label in reversed(list(places)):
        places[label] = min(places[label], most)
        most = places[label] - gap
    return {label: math.exp(place) for label, place in places.items()}


def _dress(axes: Any, title: str, label: str, xs: list[int]) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(xs, [str(x) for x in xs])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,.6g}")
    axes.tick_params(labelsize=11)
    axes.set_title(title, color=INK, loc="left", fontweight="bold", pad=20)
    axes.set_xlabel(label, color=INK, loc="left")
    _dim(axes)
    axes.grid(visible=True, color=INK, alpha=0.3)


def _dim(axes: Any) -> None:
    axes.tick_params(which="both", colors=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(INK)


def _draw_bars(table: dict[str, Any], folder: Path) -> None:
    """Draw the peak of each way with a name, and its time against that of the limit beside it."""
    from matplotlib import pyplot as plt

    results = [each for each in _results(table) if WAYS[each.way].label]
    labels = [WAYS[each.way].label for each in results]
    peaks = [(each.peak_bytes or 0) / MIB for each in results]
    ratios = [time_ratio(each) for each in results]
    medians = [ratio.median if ratio else 0 for ratio in ratios]
    lack = ["does not fit" if each.does_not_fit else "not measured" for each in results]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.44 * len(labels) + 1), sharey=True)
    for axes, sizes, title, unit in (
        (left, peaks, "extra peak memory", "{:,.0f} MiB"),
        (right, medians, "time, against the limit", "{:.2f} x"),
    ):
        colours = [LOOKS[each][0] if each.startswith("capture") else INK for each in labels]
        bars = axes.barh(range(len(labels)), sizes, color=colours, height=0.7)
        values = [unit.format(size) if size else why for size, why in zip(sizes, lack, strict=True)]
        for text, colour in zip(axes.bar_label(bars, values, padding=5), colours, strict=True):
            text.set(color=colour, fontweight="bold")
        axes.set_title(title, color=INK, loc="left", fontweight="bold")
        axes.set_yticks(range(len(labels)), labels)
        axes.margins(x=0.18)
        axes.set_xticks([])
        _dim(axes)
        axes.spines["bottom"].set_visible(False)
    left.invert_yaxis()
    for text, colour in zip(left.get_yticklabels(), colours, strict=True):
        text.set(color=colour, fontweight="bold")
    figure.tight_layout(w_pad=3)
    _save(figure, folder / "plain")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path.with_suffix(".png"), transparent=True, dpi=120)
    figure.savefig(path.with_suffix(".svg"), transparent=True, metadata={"Date": None})
    plt.close(figure)
