"""Statistics of a data set on disk: those of its rows in memory, read some at a time."""

import pytest
import torch
from stored import LENGTH, RESID, Z, heads, resid, tokens, write

from actctx import AxisError, NotCapturedError, OptionError
from actctx._store import reducing, rows
from actctx.dataset import ActivationDataset
from actctx.stats import Covariance, LinearCKA, Moments, Observation, Sample, TopK

ROWS = 1000


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "a.lance", ROWS, commits=3)


@pytest.fixture
def data(path, monkeypatch):
    monkeypatch.setattr(rows, "_READ_BYTES", 1)  # so that there are several reads, of 64 rows
    return ActivationDataset(path)


def _seen(statistic, values, axes):
    statistic.update(Observation(values=values, axes=axes))
    return statistic


def test_a_statistic_is_that_of_all_rows(data):
    recipe = Moments()
    found = data.reduce(recipe, RESID, progress=False)
    expected = _seen(Moments(), resid(torch.arange(ROWS)), ("token", "d_model"))
    assert found.count == ROWS
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.var, expected.var)
    assert recipe.count == 0


def test_each_site_has_one_where_none_is_named(data):
    found = data.reduce(Covariance(), progress=False)
    axes = ("token", *data.sites[Z].axes)
    expected = _seen(Covariance(), heads(torch.arange(ROWS)), axes)
    assert [*found] == [*data.sites]
    torch.testing.assert_close(found[Z].covariance, expected.covariance)


def test_conditions_choose_rows_together(path):
    data = ActivationDataset(path, where="position > 0")
    found = data.reduce(Moments(), RESID, where="sequence < 7", progress=False)
    numbers = torch.arange(7 * LENGTH)
    numbers = numbers[numbers % LENGTH > 0]
    assert found.count == len(numbers)
    torch.testing.assert_close(found.max, resid(numbers).amax(0).float())
    assert len(data) == (torch.arange(ROWS) % LENGTH > 0).sum()


@pytest.mark.parametrize("where", [None, "position = 2"])
@pytest.mark.parametrize("cells", [2**20, 50])
def test_the_tokens_around_are_found_on_disk(data, where, cells, monkeypatch):
    monkeypatch.setattr(reducing, "_CELLS", cells)
    found = data.reduce(TopK(30, context=2), RESID, where=where, progress=False)
    numbers = torch.arange(ROWS)
    chosen = numbers if where is None else numbers[numbers % LENGTH == 2]
    expected = resid(chosen).float().sort(dim=0, descending=True, stable=True)
    assert torch.equal(found.values, expected.values[:30].T)
    winners = chosen[expected.indices[:30].T]
    assert torch.equal(found.sequence, winners // LENGTH)
    assert torch.equal(found.position, winners % LENGTH)
    near = winners[..., None] + torch.arange(-2, 3)
    same = (near >= 0) & (near < ROWS) & (near // LENGTH == winners[..., None] // LENGTH)
    known = tokens(near.clamp(0, ROWS - 1)).long()
    assert torch.equal(found.contexts.long(), torch.where(same, known, -1))
    assert torch.equal(found.token, tokens(winners).long())


def test_a_sample_is_that_of_the_forwards(data):
    found = data.reduce(Sample(9), RESID, progress=False)
    at = found.sequence * LENGTH + found.position
    assert torch.equal(found.rows, resid(at))


def test_sites_are_compared_in_one_pass(data):
    cka = data.reduce(LinearCKA(), progress=False)
    assert cka.names == tuple(data.sites)
    assert cka.count == ROWS


def test_rows_of_sequences_are_reduced_along_the_batch(tmp_path):
    from models import bridge
    from models import tokens as ids

    from actctx.extract import extract

    extract(bridge(), ids(5), "blocks.1.hook_resid_post", tmp_path / "a.lance", slice=-1)
    data = ActivationDataset(tmp_path / "a.lance")
    found = data.reduce(TopK(2), "blocks.1.hook_resid_post", progress=False)
    values = data.read("blocks.1.hook_resid_post")
    assert torch.equal(found.values, values.topk(2, dim=0).values.T)
    assert torch.equal(found.sequence, values.topk(2, dim=0).indices.T)


def test_no_rows_leave_a_statistic_that_has_seen_nothing(data):
    assert data.reduce(Moments(), RESID, where="position > 1000", progress=False).count == 0


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        (
            Moments,
            {},
            OptionError,
            "<class 'actctx.stats.Moments'> is not a statistic; give one, such as "
            "actctx.stats.Moments()",
        ),
        (
            LinearCKA(),
            {"site": RESID},
            OptionError,
            f"LinearCKA compares several sites, but site={RESID!r} names one; leave site= out, and "
            "open the data set with sites= those to compare",
        ),
        (Moments(over="pos"), {"site": RESID}, AxisError, "there is no axis 'pos' to reduce"),
        (Moments(), {"site": "nowhere"}, NotCapturedError, "nowhere"),
        (Moments(), {"where": "nothing > 0"}, OptionError, "is not a condition on rows"),
        (Moments(), {"device": "nowhere"}, OptionError, "device='nowhere' cannot hold"),
    ],
)
def test_what_makes_no_sense_is_refused(data, given, options, error, message):
    with pytest.raises(error) as refused:
        data.reduce(given, progress=False, **options)
    assert message in str(refused.value)
