"""Sample: rows drawn uniformly, the same whatever the order in which they come."""

import pytest
import torch
from observed import observed, seen, split

from actctx import OptionError
from actctx.stats import Observation, Sample


def _numbered(batch, pos, first=0):
    """Values that tell their row."""
    return torch.arange(first * pos, (first + batch) * pos).reshape(batch, pos, 1).float()


def test_rows_come_with_where_they_are_from():
    sample = seen(Sample(7), _numbered(5, 6))
    assert torch.equal(sample.rows[:, 0], (sample.sequence * 6 + sample.position).float())
    assert len(sample.rows.unique()) == 7


def test_other_seeds_draw_other_rows():
    first, other = (seen(Sample(7, seed=seed), _numbered(5, 6)) for seed in (0, 1))
    assert set(first.rows.flatten().tolist()) != set(other.rows.flatten().tolist())


def test_fewer_rows_than_asked_for_are_all_drawn():
    sample = seen(Sample(50), _numbered(2, 6))
    assert sorted(sample.rows.flatten().tolist()) == [*range(12)]


def test_each_row_is_as_likely_as_any_other():
    drawn = torch.zeros(40)
    for seed in range(2000):
        sample = Sample(4, seed=seed)
        for part, first in split(_numbered(8, 5), [3, 5]):
            sample.merge(seen(sample, part, first=first))
        drawn[sample.rows.flatten().long()] += 1
    assert drawn.sum() == 8000
    deviation = (2000 * 0.1 * 0.9) ** 0.5
    assert (drawn - 200).abs().max() < 4 * deviation
    assert ((drawn - 200) / deviation).square().mean() < 2


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_sequences_that_are_not_known_are_drawn_from_as_well(order):
    sample = Sample(6)
    for number in order:
        values = _numbered(10, 1, first=10 * number)[:, 0]
        sample.update(Observation(values=values, axes=("_", "_"), number=number))
    assert len(sample.rows.unique()) == 6
    assert (sample.sequence == -1).all()
    assert len((sample.rows // 10).unique()) > 1


def test_kept_positions_make_a_row_of_a_sequence():
    values = _numbered(9, 6)
    sample = seen(Sample(3, over="batch"), values)
    assert sample.axes == ("pos", "d_model")
    assert torch.equal(sample.rows, values[sample.sequence])
    assert (sample.position == -1).all()


def test_heads_at_one_place_are_drawn_one_by_one():
    values = torch.arange(2 * 3 * 50).reshape(2, 3, 50, 1)
    axes = ("batch", "pos", "head", "d_head")
    whole = seen(Sample(9, over="batch pos head"), values, axes=axes)
    assert len((whole.rows % 50).unique()) > 3
    parts = Sample(9, over="batch pos head")
    for part, first in split(values, [1, 1]):
        parts.merge(seen(parts, part, first=first, axes=axes))
    assert torch.equal(parts.rows, whole.rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_rows_keep_their_dtype(dtype):
    assert seen(Sample(3), _numbered(2, 3).to(dtype)).rows.dtype == dtype


def test_samples_of_other_seeds_merge():
    one, other = seen(Sample(4, seed=1), _numbered(2, 6)), seen(Sample(4, seed=2), _numbered(2, 6))
    one.merge(other)
    assert one.count == 24
    assert len(one.rows) == 4


def test_samples_of_other_sizes_do_not_merge():
    with pytest.raises(OptionError) as error:
        Sample(4).merge(Sample(5))
    assert str(error.value) == (
        "this Sample has n=4, and the other has n=5, so they do not merge; give both the same "
        "options"
    )


def test_no_rows_cannot_be_asked_for():
    with pytest.raises(OptionError, match=r"^Sample takes n= a whole number from 1 up, not 0$"):
        Sample(0)
    assert seen(Sample(1), observed(_numbered(1, 1)).values).count == 1
