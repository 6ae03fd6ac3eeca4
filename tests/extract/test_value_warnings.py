"""Warnings of sites that are constant, and of values that a cast changes."""

import pytest
import torch
from models import tokens

from actctx import Site
from actctx.extract import extract

pytest.importorskip("lance")
pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("small_commits")]


class Scaled(torch.nn.Module):
    """Yields rows of some size."""

    def __init__(self, scale):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 8)
        with torch.no_grad():
            self.embed.weight.fill_(3.0) if scale is None else self.embed.weight.mul_(scale)

    def forward(self, ids):
        return self.embed(ids)


EMBED = Site("embed", axes="batch pos d")


@pytest.mark.parametrize(
    ("scale", "ids", "what"),
    [(0.0, tokens(), "all 21 {}are 0"), (None, tokens(), "all 21 {}have the same")],
)
def test_a_site_that_is_constant_is_a_warning(out, scale, ids, what):
    with pytest.warns(UserWarning, match=what.format("rows of 'embed' that were written ")) as seen:
        extract(Scaled(scale), ids, EMBED, out)
    assert len(seen) == 1
    assert seen[0].filename == __file__


def test_a_site_that_is_constant_is_a_warning_before_the_end(out):
    def breaks():
        for _ in range(400):
            yield tokens(1, 4)
        raise ConnectionError

    warned = pytest.warns(UserWarning, match="rows of 'embed' that were written have the same")
    with warned, pytest.raises(ConnectionError):
        extract(Scaled(None), breaks(), EMBED, out)


def test_rows_of_one_token_may_be_alike(out):
    extract(Scaled(1.0), torch.ones(2, 3).long(), EMBED, out)


@pytest.mark.parametrize("options", [{}, {"pool": "mean"}])
def test_values_that_a_cast_makes_zero_are_a_warning(out, options):
    with pytest.warns(UserWarning, match="'embed'") as seen:
        extract(Scaled(3e-9), tokens(), EMBED, out, dtype=torch.float16, **options)
    assert str(seen[0].message) == (
        "'embed' loses values in its cast: 100% of the values other than 0 are 0 in float16, whose "
        "smallest is 6e-08; give dtype=torch.bfloat16 or torch.float32"
    )


def test_values_that_a_cast_makes_infinite_are_a_warning(out):
    with pytest.warns(
        UserWarning, match=r"\d+ values are outside the range of float16, which ends at 65504; "
    ):
        extract(Scaled(1e6), tokens(), EMBED, out, dtype=torch.float16, finite=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_that_a_cast_keeps_are_no_warning(out, dtype):
    extract(Scaled(1.0), tokens(), EMBED, out, dtype=dtype)
