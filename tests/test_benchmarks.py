"""What the benchmarks refuse to report, and what they fail for."""

import pytest

pytest.importorskip("typer")
from benchmarks._report import Result, find_disagreement, find_regressions


def _result(way, *, peak=100, payload=10, sha256="a", difference=None):
    return Result(way, peak, payload, sha256, difference)


LIMIT = Result("plain-bare-stopped", 100)


def test_other_values_within_one_attention_are_a_disagreement():
    results = [_result("plain-hidden"), _result("plain-capture"), LIMIT]
    assert find_disagreement(results) is None
    results.append(_result("plain-capture-stop", sha256="b"))
    assert find_disagreement(results) == (
        "plain-capture-stop did not yield the activation that the other ways did"
    )


def test_eager_attention_may_differ_from_sdpa_by_rounding_only():
    near = _result("plain-bridge", sha256="b", difference=1e-6)
    assert find_disagreement([_result("plain-hidden"), near, LIMIT]) is None
    far = _result("plain-bridge", sha256="b", difference=1e-3)
    assert find_disagreement([_result("plain-hidden"), far, LIMIT]) == (
        "plain-bridge did not yield sdpa's activation to 0.0001"
    )


def test_a_capture_that_takes_a_tenth_more_than_the_limit_is_a_regression():
    assert find_regressions([_result("plain-capture-stop", peak=110), LIMIT]) == []
    assert find_regressions([_result("plain-capture-stop", peak=122), LIMIT]) == [
        "plain-capture-stop takes 1.11 x (limit + captured) of memory, at most 1.1"
    ]
