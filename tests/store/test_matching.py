"""The rows that a condition holds of, kept in a bit each."""

import pickle

import numpy as np
import pytest

from actctx._store.matching import Matching


def kept(rows, found):
    """Add rows in several parts, and in no order."""
    matching = Matching(rows)
    for part in np.array_split(np.random.default_rng(1).permutation(found), 5):
        matching.add(part)
    matching.settle()
    return matching


@pytest.mark.parametrize("rows", [0, 1, 511, 512, 513, 5000, 3_000_000])
@pytest.mark.parametrize("share", [0, 1e-5, 0.3, 1])
def test_rows_are_found_by_their_number(rows, share):
    draw = np.random.default_rng(0)
    found = np.flatnonzero(draw.random(rows) < share)
    matching = pickle.loads(pickle.dumps(kept(rows, found)))  # noqa: S301  of our own
    assert len(matching) == len(found)
    numbers = draw.integers(len(found), size=1000) if len(found) else np.empty(0, np.int64)
    assert np.array_equal(matching[numbers], found[numbers])


def test_rows_before_others_are_counted():
    found = np.array([0, 3, 511, 512, 4000])
    before = kept(5000, found).count(np.array([0, 1, 511, 512, 513, 4000, 4999]))
    assert before.tolist() == [0, 1, 2, 3, 4, 4, 5]
    assert kept(512, np.arange(512)).count(np.array([512])).tolist() == [512]


def test_they_take_little_more_than_a_bit_a_row():
    assert kept(2**20, np.arange(2**20)).nbytes < 0.141 * 2**20
