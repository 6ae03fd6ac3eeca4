"""Histogram, Frequency and Counts: how often values come."""

import math

import pytest
import torch
from observed import observed, seen, split

from actctx import OptionError
from actctx.stats import Counts, Frequency, Histogram, Observation


def _values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _assert_counts(histogram, rows):
    """Compare each feature with torch's own count of its values between the same edges."""
    for feature in range(rows.shape[1]):
        edges = histogram.edges[feature]
        values = rows[:, feature].double()
        expected = torch.histogram(values[values.isfinite()], edges).hist
        assert torch.equal(histogram.counts[feature], expected.long())
        assert histogram.counts[feature].sum() == values.isfinite().sum()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_bins_count_what_lies_between_their_edges(scale, mean):
    values = (_values(6, 50, 3) + mean) * scale
    histogram = Histogram(32)
    for part, first in split(values, [1, 2, 3]):
        histogram.merge(seen(histogram, part, first=first))
    _assert_counts(histogram, values.reshape(-1, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_counted_as_they_are(dtype):
    values = _values(2, 50, 3).to(dtype)
    _assert_counts(seen(Histogram(32), values), values.reshape(-1, 3))


def test_at_least_half_of_the_bins_lie_between_the_least_and_the_largest_value():
    for seed in range(20):
        values = _values(1, 100, 1, seed=seed)
        edges = seen(Histogram(16), values).edges[0]
        assert (values.max() - values.min()) / (edges[1] - edges[0]) > 7


def test_features_that_do_not_vary_have_one_bin():
    values = torch.tensor([0.0, 7.5, -3e-20, 1e30]).expand(1, 5, 4)
    histogram = seen(Histogram(4), values)
    assert (histogram.counts.amax(-1) == 5).all()
    _assert_counts(histogram, values[0])
    histogram.merge(seen(histogram, values + 1, first=1))
    _assert_counts(histogram, torch.cat([values[0], values[0] + 1]))


def test_infinite_values_and_nan_are_counted_apart():
    values = _values(2, 4, 3)
    values[0, 0, 0], values[1, 1, 1], values[0, 2, 1] = torch.nan, torch.inf, -torch.inf
    histogram = seen(Histogram(8), values[:1])
    histogram.merge(seen(histogram, values[1:], first=1))
    assert histogram.nan_count.tolist() == [1, 0, 0]
    assert histogram.infinite_count.tolist() == [0, 2, 0]
    _assert_counts(histogram, values.reshape(-1, 3))


def test_a_feature_that_was_never_finite_takes_values_later():
    values = torch.full((1, 3, 1), -torch.inf)
    histogram = seen(Histogram(8), values)
    assert histogram.counts.sum() == 0
    assert histogram.quantile(0.5).tolist() == [-math.inf]
    more = _values(1, 5, 1)
    histogram.merge(seen(histogram, more, first=1))
    _assert_counts(histogram, more[0])


def test_quantiles_are_those_of_torch_up_to_the_width_of_a_bin():
    values = _values(4, 50, 3)
    histogram = seen(Histogram(64), values)
    shares = [0.0, 0.1, 0.5, 0.75, 0.99, 1.0]
    found = histogram.quantile(shares)
    expected = values.reshape(-1, 3).quantile(torch.tensor(shares), dim=0)
    width = histogram.edges[:, 1] - histogram.edges[:, 0]
    assert ((found - expected).abs() <= width * 1.5).all()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[-1], expected[-1])
    assert torch.equal(histogram.quantile(0.5), found[2])


def test_quantiles_know_infinite_values_and_nan():
    values = torch.tensor([-torch.inf, 0, 1, 2, torch.inf])[None, :, None].repeat(1, 1, 2)
    values[0, 0, 1] = torch.nan
    found = seen(Histogram(1024), values).quantile([0.0, 0.25, 0.5, 0.75, 1.0])
    torch.testing.assert_close(
        found[:, 0], torch.tensor([-torch.inf, 0, 1, 2, torch.inf]), rtol=0, atol=0.01
    )
    assert found[:, 1].isnan().all()


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_quantiles_of_other_shares_are_refused(share):
    with pytest.raises(OptionError) as error:
        seen(Histogram(), _values(1, 2, 3)).quantile(share)
    assert str(error.value) == f"quantile takes shares from 0 to 1, not {share}"


def test_a_histogram_needs_two_bins():
    with pytest.raises(OptionError) as error:
        Histogram(1)
    assert str(error.value) == "Histogram takes bins= a whole number from 2 up, not 1"


def test_a_histogram_draws_the_first_element():
    assert seen(Histogram(8), _values(1, 20, 3))._repr_html_().count("<rect") > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("above", [0.0, 0.1, -0.1, 1e39, math.inf, -math.inf])
def test_a_frequency_is_the_share_of_rows_above_the_value_itself(dtype, above):
    values = _values(2, 50, 3).to(dtype)
    values[0, :4, 0] = torch.tensor([above, -above, 0.0, -0.0]).to(dtype)
    frequency = seen(Frequency(above=above), values)
    expected = (values.double() > above).double().mean((0, 1)).float()
    assert torch.equal(frequency.share, expected)


def test_a_frequency_takes_integers_and_truths():
    assert seen(Frequency(), torch.tensor([[[True], [False]]])).share.item() == 0.5
    large = torch.tensor([[[2**53 + 1], [2**53]]])
    assert seen(Frequency(above=2.0**53), large).share.item() == 0.5
    assert seen(Frequency(above=-torch.inf), large).share.item() == 1
    assert seen(Frequency(above=0.5), torch.tensor([[[1], [0]]])).share.item() == 0.5


def test_nan_is_above_nothing():
    values = torch.tensor([[[torch.nan], [1.0]]])
    assert seen(Frequency(), values).share.item() == 0.5


def test_a_frequency_above_no_number_is_refused():
    with pytest.raises(OptionError) as error:
        Frequency(above=math.nan)
    assert str(error.value) == "Frequency takes above= a number, not nan"


def test_frequencies_are_drawn():
    assert "above 0 how often" in seen(Frequency(), _values(1, 20, 3))._repr_html_()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_counts_are_those_of_bincount(dtype):
    values = torch.randint(0, 9, (4, 5, 2), generator=torch.Generator().manual_seed(0)).to(dtype)
    counts = Counts(9)
    for part, first in split(values, [1, 3]):
        counts.merge(seen(counts, part, first=first))
    for slot in range(2):
        expected = torch.bincount(values[..., slot].flatten().long(), minlength=9)
        assert torch.equal(counts.counts[slot], expected)
        assert torch.equal(counts.share[slot], expected / 20)


def test_token_ids_have_one_list_of_counts():
    counts = seen(Counts(5), torch.tensor([[1, 1, 4]]), axes=("batch", "pos"))
    assert counts.counts.tolist() == [0, 2, 0, 0, 1]


def test_integers_out_of_range_are_refused_and_nothing_is_lost():
    counts = seen(Counts(5), torch.tensor([[1, 1, 4]]), axes=("batch", "pos"))
    tokens = Observation(values=torch.tensor([[5, -1]]), axes=("batch", "pos"), site="hook_tokens")
    with pytest.raises(OptionError) as error:
        counts.update(tokens)
    assert str(error.value) == (
        "Counts(n=5) counts integers from 0 to 4, but 'hook_tokens' has values from -1 to 5; give "
        "a larger n, or map= a function that brings them into this range"
    )
    assert counts.count == 3


def test_numbers_that_are_no_integers_are_not_counted():
    with pytest.raises(OptionError) as error:
        Counts(5).update(observed(_values(1, 2, 3)))
    assert str(error.value) == (
        "Counts cannot be computed: it is float32, not of integers; give map= a function that "
        "makes such values of it, or leave the site out"
    )
