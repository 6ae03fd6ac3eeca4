"""Moments: what two passes in double precision find, in one pass and any order."""

import pytest
import torch
from observed import assert_close, observed, seen, split, two_pass

from actctx import AxisError, JoinError, NotCapturedError, OptionError
from actctx.stats import Moments, Observation


def _values(*shape, seed=0, mean=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_mean_and_variance_are_those_of_two_passes_in_double_precision(dtype, mean):
    values = _values(6, 50, 5, mean=mean).to(dtype)
    if dtype == torch.bfloat16 and mean:
        values = (_values(6, 50, 5) * 8 + mean).to(dtype)  # so that they still differ
    moments = Moments()
    for part, first in split(values, [1, 3, 2]):
        moments.merge(seen(moments, part, first=first))
    expected_mean, covariance = two_pass(values)
    assert moments.count == 300
    assert_close(moments.mean, expected_mean)
    assert_close(moments.var, covariance.diagonal())
    assert_close(moments.std, covariance.diagonal().sqrt())


def test_extremes_and_norms_are_those_of_all_rows():
    values = _values(4, 5, 3)
    moments = seen(Moments(), values)
    rows = values.reshape(-1, 3)
    assert torch.equal(moments.min, rows.amin(0))
    assert torch.equal(moments.max, rows.amax(0))
    assert_close(moments.mean_norm, rows.double().norm(dim=-1).mean())
    assert_close(moments.mean_square_norm, rows.double().square().sum(-1).mean())


def test_many_rows_are_taken_in_chunks():
    values = _values(3, 300, 700)
    mean, covariance = two_pass(values)
    moments = seen(Moments(), values)
    torch.testing.assert_close(moments.mean.double(), mean, rtol=1e-6, atol=1e-9)
    assert_close(moments.var, covariance.diagonal())


@pytest.mark.parametrize(
    ("over", "dims", "axes"),
    [
        (None, (0, 1), ("head", "d_head")),
        ("batch", (0,), ("pos", "head", "d_head")),
        ("pos", (1,), ("batch", "head", "d_head")),
        (("batch", "pos", "head"), (0, 1, 2), ("d_head",)),
        ("batch pos d_head", (0, 1, 3), ("head",)),
        ((0, -1), (0, 3), ("pos", "head")),
        (("batch", "pos", "head", "d_head"), (0, 1, 2, 3), ()),
    ],
)
def test_over_names_what_is_reduced(over, dims, axes):
    values = _values(3, 4, 2, 5)
    moments = seen(Moments(over=over), values, axes=("batch", "pos", "head", "d_head"))
    assert moments.axes == axes
    assert_close(moments.mean, values.double().mean(dims), 1e-5)
    assert_close(moments.var, values.double().var(dims), 1e-5)


def test_batch_and_positions_are_reduced_where_a_mask_made_rows_of_tokens():
    values = _values(7, 3)
    moments = Moments(over=("batch", "pos"))
    moments.update(Observation(values=values, axes=("token", "d_model")))
    assert_close(moments.mean, values.double().mean(0), 1e-5)


def test_queries_are_positions():
    pattern = _values(2, 3, 4, 4).softmax(-1)
    axes = ("batch", "head", "query", "key")
    assert seen(Moments(over=("batch", "pos")), pattern, axes=axes).axes == ("head", "key")
    assert seen(Moments(), pattern, axes=axes).axes == ("head", "query", "key")


def test_the_first_axis_is_reduced_where_none_is_known():
    values = _values(5, 3)
    moments = Moments()
    moments.update(Observation(values=values, axes=("_", "_")))
    assert_close(moments.mean, values.double().mean(0), 1e-5)


def test_results_are_single_precision_unless_activations_were_double():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert seen(Moments(), _values(2, 3, 4).to(dtype)).mean.dtype == torch.float32
    moments = seen(Moments(), _values(2, 3, 4).double())
    assert {moments.mean.dtype, moments.var.dtype, moments.max.dtype} == {torch.float64}


def test_one_row_has_no_variance():
    moments = seen(Moments(), _values(1, 1, 2))
    assert moments.var.isnan().all()
    assert moments.mean.isfinite().all()


def test_forwards_that_leave_no_row_count_for_nothing():
    moments = seen(Moments(), _values(2, 3, 4))
    before = moments.mean
    moments.update(Observation(values=torch.empty(0, 4), axes=("token", "d_model")))
    assert moments.count == 6
    assert torch.equal(moments.mean, before)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_nan_and_infinite_values_stay_in_their_element(order):
    parts = [_values(1, 4, 4, seed=seed) for seed in range(3)]
    parts[0][0, 0, 0] = torch.nan
    parts[1][0, 0, 1] = torch.inf
    parts[1][0, 1, 2] = torch.inf
    parts[2][0, 1, 2] = -torch.inf
    moments = Moments()
    for number in order:
        moments.merge(seen(moments, parts[number], first=number))
    rows = torch.cat(parts).reshape(-1, 4)
    for found, expected in (
        (moments.mean, rows.mean(0)),
        (moments.var, rows.var(0)),
        (moments.min, rows.amin(0)),
        (moments.max, rows.amax(0)),
    ):
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_what_is_read_is_the_callers():
    moments = seen(Moments(), _values(2, 3, 4))
    expected = moments.max, moments.mean
    moments.max.zero_()
    moments.mean.zero_()
    assert torch.equal(moments.max, expected[0])
    assert torch.equal(moments.mean, expected[1])


def test_values_may_change_after_an_update():
    values = _values(1, 1, 4)
    moments = seen(Moments(), values)
    kept = values.clone()
    values.zero_()
    assert torch.equal(moments.max, kept[0, 0])


def test_values_with_gradients_and_of_inference_mode_leave_plain_tensors():
    moments = seen(Moments(), _values(2, 3, 4).requires_grad_())
    with torch.inference_mode():
        moments.merge(seen(moments, _values(2, 3, 4)))
        mean = moments.mean
    assert not moments.mean.requires_grad
    assert not moments.state_dict()["mean"].is_inference()
    assert moments.count == 12
    assert mean.shape == (4,)


def test_unlike_sizes_of_kept_axes_are_refused_and_nothing_is_lost():
    moments = Moments(over="batch")
    moments.update(Observation(values=torch.ones(2, 5, 4), axes=("batch", "pos", "d_model")))
    longer = Observation(
        values=torch.ones(2, 7, 4),
        axes=("batch", "pos", "d_model"),
        site="blocks.0.hook_resid_post",
    )
    with pytest.raises(JoinError) as error:
        moments.update(longer)
    assert str(error.value) == (
        "Moments of 'blocks.0.hook_resid_post' keeps the axes 'pos d_model', of the sizes (7, 4) "
        "after (5, 4), which do not fit along 'pos'; give the forwards one length (by padding, or "
        "with a slice), or reduce the axis as well with over="
    )
    assert moments.count == 2


@pytest.mark.parametrize(
    ("over", "axes", "message"),
    [
        (
            "head",
            ("batch", "pos", "d_model"),
            "'resid' has the axes 'batch pos d_model', so there is no axis 'head' to reduce as "
            "over= asks; name one of these, or give its number",
        ),
        (
            None,
            ("head", "query", "key"),
            "'resid' has the axes 'head query key', none of which is 'batch', 'pos' or 'token'; "
            "name those to reduce with over=",
        ),
    ],
)
def test_axes_that_are_not_there_are_refused(over, axes, message):
    with pytest.raises(AxisError) as error:
        Moments(over=over).update(Observation(values=torch.ones(2, 2, 2), axes=axes, site="resid"))
    assert str(error.value) == message


@pytest.mark.parametrize("over", ["", (), True])
def test_over_that_names_no_axes_is_refused(over):
    with pytest.raises(OptionError) as error:
        Moments(over=over)
    assert str(error.value) == (
        f"over={over!r} does not name axes; give names or numbers, such as over='batch' or "
        "over=('batch', 'pos')"
    )


def test_over_that_names_an_axis_twice_is_refused():
    with pytest.raises(OptionError, match="names an axis twice; name each once"):
        Moments(over=("batch", "batch"))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        (torch.ones(2, 2, dtype=torch.int64), "it is int64, not of real numbers"),
        (torch.ones(2, 2, dtype=torch.complex64), "it is complex64, not of real numbers"),
        (torch.ones(2, 2, dtype=torch.bool), "it is bool, not of real numbers"),
        (torch.ones(2, 2, device="meta"), "it has no values, on the meta device"),
    ],
)
def test_values_that_have_no_moments_are_refused(values, why):
    observation = Observation(values=values, axes=("token", "d_model"), site="embed")
    with pytest.raises(OptionError) as error:
        Moments().update(observation)
    assert str(error.value) == (
        f"Moments cannot be computed of 'embed': {why}; give map= a function that makes such "
        "values of it, or leave the site out"
    )


def test_without_rows_there_is_no_value():
    with pytest.raises(NotCapturedError) as error:
        Moments().mean  # noqa: B018  it is read
    assert str(error.value) == (
        "this Moments has seen no rows, so it has no value; run a forward that leaves some"
    )


def test_without_a_kept_axis_there_are_no_norms():
    moments = seen(Moments(over="batch pos d_model"), torch.ones(2, 2, 2))
    with pytest.raises(AxisError, match="no axis is kept, so there is none to take norms along"):
        moments.mean_norm  # noqa: B018  it is read


def test_it_shows_what_it_holds():
    moments = Moments(over="batch")
    assert repr(moments) == "Moments(over=['batch']): nothing seen yet"
    moments.update(observed(torch.ones(2, 3, 4)))
    assert repr(moments) == "Moments(over=['batch']): 2 rows of pos=3 d_model=4, 336 B"
    assert "<svg" in moments._repr_html_()
    assert "nothing seen yet" in Moments()._repr_html_()


@pytest.mark.thorough
def test_ten_million_rows_lose_no_digits():
    generator = torch.Generator().manual_seed(0)
    moments, parts = Moments(), []
    for first in range(0, 10_000_000, 500_000):
        values = torch.randn(1, 500_000, 2, generator=generator) + torch.tensor([0.0, 1000.0])
        parts.append(values)
        for number, part in enumerate(values.split(50_000, dim=1)):
            moments.merge(seen(moments, part, first=first + number))
    mean, covariance = two_pass(torch.cat(parts))
    assert moments.count == 10_000_000
    assert_close(moments.mean, mean)
    assert_close(moments.var, covariance.diagonal())
