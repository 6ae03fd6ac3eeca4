"""Covariance: what two passes in double precision find, head by head, in one pass."""

import pytest
import torch
from observed import observed, seen, split, two_pass

from actctx import AxisError, OptionError
from actctx.stats import Covariance, Moments


def _values(*shape, seed=0, mean=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean


def _mixed(*shape, mean=0.0):
    return _values(*shape) @ _values(shape[-1], shape[-1], seed=1) + mean


def _assert_covers(found, expected, tolerance=1e-6):
    """Compare covariances, relative to the deviations of the two features."""
    scale = expected.diagonal().sqrt()
    assert ((found - expected).abs() / scale / scale[:, None]).max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 5000.0])
def test_it_is_that_of_two_passes_in_double_precision(dtype, mean):
    mean = min(mean, 50.0) if dtype == torch.bfloat16 else mean  # beyond, all would be the same
    values = (_mixed(6, 300, 8, mean=mean)).to(dtype)
    covariance = Covariance()
    for part, first in split(values, [1, 4, 1]):
        covariance.merge(seen(covariance, part, first=first))
    expected_mean, expected = two_pass(values)
    assert covariance.count == 1800
    torch.testing.assert_close(covariance.mean.double(), expected_mean, rtol=1e-6, atol=1e-8)
    _assert_covers(covariance.covariance.double(), expected)
    assert covariance.covariance.dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_a_mean_of_a_hundred_thousand_deviations_costs_no_digits():
    values = _values(2, 300, 4) + torch.tensor([1e5, 2e5, 3e5, 0.0])
    found = seen(Covariance(), values).covariance
    _assert_covers(found.double(), two_pass(values)[1])


def test_its_diagonal_is_the_variance():
    values = _mixed(3, 4, 5, mean=3.0)
    covariance, moments = seen(Covariance(), values), seen(Moments(), values)
    torch.testing.assert_close(covariance.covariance.diagonal(), moments.var)


def test_each_head_has_one_of_its_own():
    values = _values(3, 4, 2, 5)
    covariance = seen(Covariance(), values, axes=("batch", "pos", "head", "d_head"))
    assert covariance.axes == ("head", "d_head")
    for head in range(2):
        _assert_covers(covariance.covariance[head].double(), two_pass(values[:, :, head])[1])


def test_each_position_has_one_of_its_own():
    values = _values(30, 4, 5)
    covariance = seen(Covariance(over="batch"), values)
    for pos in range(4):
        _assert_covers(covariance.covariance[pos].double(), two_pass(values[:, pos])[1])


def test_correlations_are_those_of_torch():
    values = _mixed(3, 40, 5)
    values[..., 4] = 1
    correlation = seen(Covariance(), values).correlation
    expected = torch.corrcoef(values.reshape(-1, 5).T)
    torch.testing.assert_close(correlation, expected, equal_nan=True)
    assert (correlation[:4, :4].diagonal() == 1).all()


def test_principal_directions_are_those_of_the_centred_rows():
    values = _mixed(3, 40, 5, mean=2.0)
    found = seen(Covariance(), values).eigh()
    rows = values.reshape(-1, 5)
    _, sizes, directions = torch.linalg.svd(rows - rows.mean(0))
    torch.testing.assert_close(found.eigenvalues.flip(0), sizes.square() / 119)
    along = (found.eigenvectors.flip(1) * directions.T).sum(0).abs()
    torch.testing.assert_close(along, torch.ones(5))


def test_lower_precision_of_products_costs_no_digits():
    values = _mixed(3, 40, 5)
    torch.set_float32_matmul_precision("medium")
    try:
        found = seen(Covariance(), values)
    finally:
        torch.set_float32_matmul_precision("highest")
    _assert_covers(found.covariance.double(), two_pass(values)[1])


def test_a_nan_stays_in_its_feature():
    values = _mixed(3, 4, 5)
    values[0, 0, 2], values[1, 1, 3] = torch.nan, torch.inf
    covariance = seen(Covariance(), values)
    expected = torch.zeros(5, 5, dtype=torch.bool)
    expected[2:4] = expected[:, 2:4] = True
    assert torch.equal(covariance.covariance.isnan(), expected)
    with pytest.raises(OptionError) as error:
        covariance.eigh()
    assert str(error.value) == (
        "the covariance has values that are not finite, so it has no eigenvectors; leave out the "
        "features with NaN or infinite values, and capture two rows or more"
    )


def test_the_last_axis_is_to_be_kept():
    with pytest.raises(AxisError) as error:
        seen(Covariance(over="batch pos d_model"), _values(2, 3, 4))
    assert str(error.value) == (
        "Covariance keeps the last axis, which has the features, but all are reduced; leave the "
        "last one out of over="
    )


def test_merging_leaves_the_other_as_it_is():
    one, other = Covariance(), Covariance()
    one.update(observed(_mixed(2, 3, 4)))
    other.update(observed(_mixed(3, 3, 4, mean=1.0)))
    before = other.covariance
    one.merge(other)
    one.merge(other)
    assert torch.equal(other.covariance, before)


@pytest.mark.thorough
def test_ten_million_rows_lose_no_digits():
    generator = torch.Generator().manual_seed(0)
    covariance, parts = Covariance(), []
    for first in range(0, 10_000_000, 500_000):
        values = torch.randn(1, 500_000, 3, generator=generator)
        values[..., 2] = values[..., 0] + values[..., 1] + 3000
        parts.append(values)
        covariance.merge(seen(covariance, values, first=first))
    _assert_covers(covariance.covariance.double(), two_pass(torch.cat(parts))[1])
