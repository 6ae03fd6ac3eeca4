"""A histogram of values in one line."""

import pytest
import torch

from actctx._results.sketch import sketch

NORMAL = torch.randn(100_000, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_bell_is_drawn_as_one(dtype):
    low, bars, high = sketch([NORMAL.to(dtype)]).split()
    assert float(low) == pytest.approx(-2.6, abs=0.15)
    assert float(high) == pytest.approx(2.6, abs=0.15)
    assert len(bars) == 12
    assert max(bars) in bars[5:7]
    assert list(bars[:6]) == sorted(bars[:6])
    assert list(bars[6:]) == sorted(bars[6:], reverse=True)


def test_one_feature_of_many_is_not_met_more_often_than_others():
    values = torch.randn(16, 512, 1024, generator=torch.Generator().manual_seed(0))
    values[..., 0] = 100
    low, _, high = sketch([values]).split()
    assert float(low) == pytest.approx(-2.6, abs=0.2)
    assert float(high) == pytest.approx(2.6, abs=0.3)


def test_all_features_of_many_small_tensors_are_met():
    values = torch.zeros(10_000, 1, 384)
    values[..., 5] = 1
    assert sketch([*values]) == "0 █▁▁▁▁▁▁▁▁▁▁▂ 1"


def test_a_view_is_drawn_as_what_it_shows():
    room = torch.arange(64.0).view(4, 16)
    assert sketch([room[:, 4:8]]) == sketch([room[:, 4:8].contiguous()])


def test_outliers_of_many_values_do_not_hide_the_rest():
    values = NORMAL.clone()
    values[:50] = 1e6
    assert sketch([values]).split()[1].count("▁") == 0


@pytest.mark.parametrize(
    ("values", "drawn"),
    [
        ([0.0, 1.0], "0 █▁▁▁▁▁▁▁▁▁▁█ 1"),
        ([True, False], "0 █▁▁▁▁▁▁▁▁▁▁█ 1"),
        ([3, 3], "3"),
        ([1.0, float("nan")], "1 (50.0% not finite)"),
        ([float("inf")], "(100.0% not finite)"),
        ([0.0] * 3000 + [1.0], "0 █▁▁▁▁▁▁▁▁▁▁▂ 1"),
        ([3 + 4j, 3 + 4j], "5"),
        ([], ""),
    ],
)
def test_few_and_odd_values_are_drawn_too(values, drawn):
    assert sketch([torch.tensor(values)]) == drawn


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_ends_of_a_dtype_are_drawn_too(dtype):
    ends = torch.finfo(dtype)
    low, bars, high = sketch([torch.tensor([ends.min, 0.0, ends.max], dtype=dtype)]).split()
    assert (low, high) == (f"{ends.min:.2g}", f"{ends.max:.2g}")
    assert [place for place, bar in enumerate(bars) if bar == "█"] == [0, 6, 11]


def test_values_beyond_single_precision_are_finite():
    assert sketch([torch.tensor([1e300, 1e300], dtype=torch.float64)]) == "1e+300"
    assert sketch([torch.tensor([1e-310, 0.0], dtype=torch.float64)]).endswith("▁█ 1e-310")


def test_what_several_forwards_left_is_drawn_as_one():
    assert sketch([torch.zeros(2, 2), torch.ones(4)]) == "0 █▁▁▁▁▁▁▁▁▁▁█ 1"
    assert sketch([]) == ""
