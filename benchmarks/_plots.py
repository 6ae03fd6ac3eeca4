"""Memory and time against the length of the sequences, measured and drawn."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks._report import MIB, Result

LENGTHS = (64, 128, 256, 512, 1024, 2048)
SERIES = {
    "plain-cache-nograd": ("run_with_cache", "#d1495b"),
    "plain-bridge": ("capture, bridge", "#2e86ab"),
    "plain-capture-stop": ("capture, plain model", "#2a9d5c"),
}
INK = "#7d8590"
"""Grey enough to be read on white and on black."""


def draw(found: dict[int, list[Result]], folder: Path) -> None:
    """Write a plot as `lengths.png` and `lengths.svg`; what did not fit has no point."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, (memory, time) = plt.subplots(1, 2, figsize=(11, 4.2))
    for way, (label, colour) in SERIES.items():
        of_way = {
            length: next(each for each in results if each.way == way)
            for length, results in found.items()
        }
        peaks = {length: each.peak_bytes for length, each in of_way.items()}
        _line(memory, {n: peak / MIB for n, peak in peaks.items() if peak}, label, colour)
        seconds = {length: each.seconds for length, each in of_way.items()}
        medians = {n: statistics.median(s for s, _ in each) for n, each in seconds.items() if each}
        _line(time, medians, label, colour)
    _dress(memory, "extra peak memory, MiB")
    _dress(time, "time, s")
    figure.tight_layout()
    for ending in ("png", "svg"):
        figure.savefig(folder / f"lengths.{ending}", transparent=True, dpi=160)
    plt.close(figure)


def _line(axes: Any, points: dict[int, float], label: str, colour: str) -> None:
    if not points:
        return
    axes.plot(list(points), list(points.values()), color=colour, linewidth=2.2, marker="o")
    last = max(points)
    axes.annotate(
        label,
        (last, points[last]),
        xytext=(9, 0),
        textcoords="offset points",
        color=colour,
        fontweight="bold",
        va="center",
        annotation_clip=False,
    )


def _dress(axes: Any, title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
    axes.set_xlim(LENGTHS[0] * 0.85, LENGTHS[-1] * 6.5)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(title, color=INK, loc="left")
    axes.set_xlabel("tokens a sequence", color=INK, loc="left")
    axes.tick_params(which="both", colors=INK)
    axes.grid(visible=True, color=INK, alpha=0.25)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color(INK)
