"""What the benchmarks say of what is to be reached."""

from dataclasses import replace

import pytest

from benchmarks.measuring.sites import FORWARDS
from benchmarks.reporting.report import Result
from benchmarks.reporting.targets import site_targets, targets

HOOK, SITE = "bare hook that clones, plain model", "**`capture`, plain model**"


def _timed(way, *, peak, seconds):
    return Result(way, peak, 10, "a", seconds=[(seconds, 1.0)] * 2)


def test_targets_say_by_how_much_they_are_missed():
    limit = Result("bare-stopped", 90, seconds=[(1.0, 1.0)])
    missed = _timed("capture-stop", peak=106, seconds=1.01)
    assert targets([missed, limit]) == [
        "memory, bridge: capture(stop=True) / (limit + captured): 1.060, at most 1.03: "
        "MISSED by 2.9%",
        "time, bridge: capture(stop=True) / limit: 1.010, at most 1.02: reached",
    ]


def test_one_pass_tells_nothing_of_two_percent():
    limit = Result("bare-stopped", 90, seconds=[(1.0, 1.0)])
    once = Result("capture-stop", 90, 10, "a", seconds=[(1.01, 1.0)])
    assert [verdict.split(",")[0] for verdict in targets([once, limit])] == ["memory"]


def test_what_is_gathered_is_held_against_both_bounds():
    bare, gathered = Result("gather-64-bare", 10), Result("gather-64-capture", 130, 128, "a")
    assert targets([gathered, bare], batches=64) == [
        "memory, 64 batches: capture / (bare forward + all that is captured): 0.942, "
        "at most 1.03: reached",
        "memory, 64 batches: capture / (all that is captured + what is captured of one batch): "
        "1.000, at most 1.03: reached",
    ]


def test_the_last_position_is_held_against_its_own_bytes_beside_a_bare_forward():
    results = [Result("plain-last", 103, 1, "a"), Result("plain-last-bare", 100)]
    by_hand = Result("plain-last-by-hand", 100, 1, "a")
    assert targets([*results, by_hand])[1:] == [
        "memory, last position of a plain model: capture / (bare forward + captured): 1.020, "
        "at most 1.03: reached"
    ]


OURS = _timed("plain-capture-stop", peak=100, seconds=1.0)
CACHE = _timed("plain-cache", peak=3000, seconds=4.0)
NO_GRAD = _timed("plain-cache-nograd", peak=2500, seconds=3.0)
STOPPED = _timed("plain-filter-stop-nograd", peak=500, seconds=2.0)


def _of_the_lens(*lens):
    limit = Result("plain-bare-stopped", 90, seconds=[(1.0, 1.0)])
    return [verdict.split(": ", 1)[1] for verdict in targets([*lens, OURS, limit])[2:]]


def test_the_best_of_transformer_lens_is_of_all_its_ways():
    assert _of_the_lens(CACHE, NO_GRAD, STOPPED) == [
        "the best of TransformerLens / capture, plain model: 5.000, at least 4: reached",
        "the best of TransformerLens / capture, plain model: 2.000, at least 1.8: reached",
        "run_with_cache / capture, plain model: 30.000, at least 20: reached",
    ]
    failed = replace(STOPPED, peak_bytes=None, seconds=[], failed="torn")
    for lens in ([CACHE, NO_GRAD, failed], [CACHE, NO_GRAD]):
        found = _of_the_lens(*lens)
        assert all("not measured, since plain-filter-stop-nograd" in each for each in found[:2])
        assert found[2].endswith("30.000, at least 20: reached")
    untimed = replace(STOPPED, seconds=[])
    assert _of_the_lens(CACHE, NO_GRAD, untimed)[1].endswith("plain model: not measured")


def test_where_gradients_do_not_fit_the_cache_without_them_stands_for_it():
    assert _of_the_lens(Result("plain-cache", does_not_fit=True), NO_GRAD, STOPPED)[2] == (
        "run_with_cache under no_grad, as it does not fit without / capture, plain model: 25.000, "
        "at least 20: reached"
    )


@pytest.mark.parametrize("costs", [(-1.0, 2.0), (1.0, 0.0), (1.0, -2.0)])
def test_costs_that_are_none_are_not_measured(costs):
    site, hook = ({str(FORWARDS): cost} for cost in costs)
    assert site_targets({SITE: site, HOOK: hook}, FORWARDS) == ["a site / hook: not measured"]
