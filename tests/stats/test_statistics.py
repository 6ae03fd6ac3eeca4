"""What holds for every statistic: merged in any order, state, files, and what is refused."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from observed import observed, seen
from torch._subclasses import FakeTensorMode

from actctx import DataError, JoinError, OptionError
from actctx.stats import (
    Counts,
    Covariance,
    Frequency,
    Histogram,
    Moments,
    Observation,
    Sample,
    Statistic,
    TopK,
    load,
)

KINDS = {
    "Moments": (Moments, {}),
    "Covariance": (Covariance, {}),
    "TopK": (TopK, {"k": 4, "context": 2}),
    "Histogram": (Histogram, {"bins": 8}),
    "Frequency": (Frequency, {"above": 0.25}),
    "Sample": (Sample, {"n": 4, "seed": 3}),
    "Counts": (Counts, {"n": 9}),
}
NAMES = {
    "Moments": ("mean", "var", "min", "max", "mean_norm", "mean_square_norm"),
    "Covariance": ("mean", "covariance", "correlation"),
    "TopK": ("values", "sequence", "position", "token", "contexts"),
    "Histogram": ("counts", "edges", "nan_count", "infinite_count"),
    "Frequency": ("share",),
    "Sample": ("rows", "sequence", "position"),
    "Counts": ("counts", "share"),
}
every_kind = pytest.mark.parametrize("name", [*KINDS])


def _made(name, **options):
    kind, others = KINDS[name]
    return kind(**others, **options)


def _values(name, *, seed=0, batch=6, pos=5):
    """Values with many ties, as there are in half precision."""
    generator = torch.Generator().manual_seed(seed)
    if name == "Counts":
        return torch.randint(0, 9, (batch, pos), generator=generator)
    return torch.randn(batch, pos, 3, generator=generator).mul(4).round() / 4


def _axes(name):
    return ("batch", "pos") if name == "Counts" else ("batch", "pos", "d_model")


def _tokens(values, first=0):
    batch, pos = values.shape[:2]
    return torch.arange(first * pos, (first + batch) * pos).reshape(batch, pos)


def _seen(statistic, values, first=0):
    return seen(
        statistic, values, first=first, axes=_axes_of(values), tokens=_tokens(values, first)
    )


def _axes_of(values):
    return ("batch", "pos", "d_model")[: values.dim()]


def _results(statistic):
    found = {each: getattr(statistic, each) for each in NAMES[type(statistic).__name__]}
    return {"count": torch.tensor(statistic.count), **found}


def _assert_same(found, expected, *, exactly=False):
    tolerance = 0 if exactly else 1e-6
    one, other = _results(found), _results(expected)
    for name, each in one.items():
        torch.testing.assert_close(
            each, other[name], rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
        )


@every_kind
def test_it_is_a_statistic(name):
    assert isinstance(_made(name), Statistic)
    assert type(_made(name)).__module__ == "actctx.stats"


@every_kind
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_split_and_order_gives_the_result_of_one_pass(name, data):
    values = _values(name, seed=data.draw(st.integers(0, 50)))
    cuts = sorted(data.draw(st.sets(st.integers(1, 5))))
    edges = [*zip([0, *cuts], [*cuts, 6], strict=True)]
    recipe = _made(name)
    parts = [_seen(recipe, values[one:two], one) for one, two in data.draw(st.permutations(edges))]
    while len(parts) > 1:  # merged as a tree
        other = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts[data.draw(st.integers(0, len(parts) - 1))].merge(other)
    _assert_same(parts[0], _seen(recipe, values))


@every_kind
def test_updates_one_after_the_other_are_merges(name):
    values = _values(name)
    statistic = _made(name)
    for first in range(0, 6, 2):
        part = values[first : first + 2]
        statistic.update(observed(part, first=first, axes=_axes(name), tokens=_tokens(part, first)))
    _assert_same(statistic, _seen(_made(name), values))


@every_kind
def test_an_empty_one_has_the_options_and_has_seen_nothing(name):
    statistic = _seen(_made(name, device="cpu"), _values(name))
    empty = statistic.empty()
    assert empty.count == 0
    assert empty.nbytes == 0
    assert repr(empty).endswith(": nothing seen yet")
    empty.merge(statistic)
    _assert_same(empty, statistic, exactly=True)


@every_kind
def test_merging_an_empty_one_changes_nothing(name):
    statistic = _seen(_made(name), _values(name))
    before = copy.deepcopy(statistic)
    statistic.merge(statistic.empty())
    _assert_same(statistic, before, exactly=True)


@every_kind
def test_merging_leaves_the_other_one_as_it_is(name):
    one, other = _seen(_made(name), _values(name)), _seen(_made(name), _values(name, seed=1), 6)
    before = copy.deepcopy(other)
    one.merge(other)
    first = _made(name)
    first.merge(other)
    first.merge(one)
    _assert_same(other, before, exactly=True)


@every_kind
def test_states_files_and_pickles_hold_all_of_it(name, tmp_path):
    statistic = _seen(_made(name), _values(name))
    again = statistic.empty()
    again.load_state_dict(copy.deepcopy(statistic.state_dict()))
    statistic.save(tmp_path / "one.safetensors", metadata={"of": "a test"})
    copies = [
        again,
        load(tmp_path / "one.safetensors"),
        pickle.loads(pickle.dumps(statistic)),  # noqa: S301  it is its own
        copy.deepcopy(statistic),
    ]
    more = _seen(_made(name), _values(name, seed=1, batch=2), 6)
    for each in copies:
        _assert_same(each, statistic, exactly=True)
        assert repr(each) == repr(statistic)
    statistic.merge(more)
    for each in copies:
        each.merge(more)
        _assert_same(each, statistic, exactly=True)


@every_kind
def test_a_state_is_of_tensors_and_what_json_has(name):
    state = _seen(_made(name), _values(name)).state_dict()
    rest = {key: each for key, each in state.items() if not isinstance(each, torch.Tensor)}
    assert json.loads(json.dumps(rest)) == rest
    assert rest["kind"] == name


@every_kind
def test_one_that_has_seen_nothing_is_saved_and_read(name, tmp_path):
    _made(name).save(tmp_path / "none.safetensors")
    found = load(tmp_path / "none.safetensors")
    assert type(found) is KINDS[name][0]
    assert found.count == 0


@every_kind
def test_memory_does_not_grow_with_the_forwards(name):
    statistic, held = _made(name), set()
    for first in range(0, 60, 6):
        statistic.merge(_seen(statistic, _values(name, seed=first), first))
        held.add(statistic.nbytes)
    assert len(held) == 1


@every_kind
def test_what_it_shows_says_what_it_has_seen(name):
    statistic = _seen(_made(name), _values(name))
    assert repr(statistic).startswith(f"{name}(")
    assert "30 rows" in repr(statistic)
    assert name in statistic._repr_html_()
    assert "nothing seen yet" in _made(name)._repr_html_()


@every_kind
def test_its_results_are_on_the_device_that_was_asked_for(name):
    values = _values(name)
    observation = observed(values, axes=_axes(name), tokens=_tokens(values))
    statistic = _made(name, device="cpu")
    with torch.device("meta"):  # where nothing is computed
        statistic.update(observation)
        statistic.merge(statistic)
    assert {each.device.type for each in _results(statistic).values()} == {"cpu"}


@every_kind
def test_its_size_is_known_of_tensors_without_values(name):
    if name == "Counts":  # which looks at the values
        return
    expected = _seen(_made(name), _values(name))
    with FakeTensorMode(allow_non_fake_inputs=True):
        statistic = _made(name)
        statistic.merge(_seen(statistic, torch.empty(6, 5, 3)))
    assert statistic.nbytes == expected.nbytes


@every_kind
def test_complex_values_are_refused_where_they_mean_nothing(name):
    if name == "Sample":
        return
    values = torch.ones(2, 2, 2, dtype=torch.complex64)
    with pytest.raises(OptionError, match=rf"^{name} cannot be computed: it is complex64, "):
        _made(name).update(observed(values))


@every_kind
def test_merging_others_is_refused(name):
    statistic = _seen(_made(name), _values(name))
    with pytest.raises(OptionError) as error:
        statistic.merge(_made(name, over="batch"))
    assert str(error.value).startswith(
        f"this {name} has over=None, and the other has over=['batch'], so they do not merge"
    )
    other = next(each for each in KINDS if each != name)
    with pytest.raises(OptionError) as error:
        statistic.merge(_made(other))
    assert str(error.value) == (
        f"a {name} merges with its like only, not with a {other}; give another {name}"
    )


@every_kind
def test_merging_one_of_other_sizes_is_refused(name):
    one, other = _made(name, over="batch"), _made(name, over="batch")
    one.update(observed(_values(name), axes=_axes(name)))
    other.update(observed(_values(name, pos=7), axes=_axes(name)))
    with pytest.raises(JoinError, match="which do not fit along 'pos'"):
        one.merge(other)
    assert one.count == 6


@every_kind
def test_states_of_others_are_refused(name):
    with pytest.raises(OptionError, match=rf"the state is of a {name} with the options"):
        _made(name, over="batch").load_state_dict(_made(name).state_dict())
    other = next(each for each in KINDS if each != name)
    with pytest.raises(OptionError) as error:
        _made(name).load_state_dict(_made(other).state_dict())
    assert str(error.value) == (
        f"this is the state of a {other}, not of a {name}; load it into one"
    )
    with pytest.raises(DataError) as error:
        _made(name).load_state_dict({"mean": 1})
    assert str(error.value) == (
        "what was given is not the state of a statistic; give what state_dict() returned"
    )


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"mean": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError) as error:
        load(tmp_path / "other.safetensors")
    assert str(error.value) == (
        f"cannot read '{tmp_path / 'other.safetensors'}': it does not hold a statistic; give a "
        "file that the save of a statistic wrote"
    )


def test_a_file_of_a_later_version_is_refused(tmp_path):
    from actctx._stats.saving import write_statistic

    state = Moments().state_dict() | {"kind": "Median"}
    write_statistic(state, tmp_path / "later.safetensors", {})
    with pytest.raises(DataError, match="that this version of actctx knows: Counts, "):
        load(tmp_path / "later.safetensors")


def test_metadata_that_the_file_has_itself_is_refused(tmp_path):
    with pytest.raises(OptionError) as error:
        Moments().save(tmp_path / "one.safetensors", metadata={"actctx": "mine"})
    assert str(error.value) == (
        "metadata has 'mine' under 'actctx'; give text under text, and none of the names actctx, "
        "axes, model, statistic, torch, which the file has itself"
    )


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(OptionError, match="device='nowhere' cannot hold activations"):
        Moments(device="nowhere")


def test_an_observation_names_the_axes_of_its_rows():
    values = torch.ones(2, 3, 4, 5)
    for axes, dims in (
        (("batch", "pos", "head", "d_head"), (0, 1)),
        (("batch", "head", "query", "key"), (0, 2)),
        (("token", "_", "_", "_"), (0,)),
        (("_", "_", "_", "_"), (0,)),
        (("head", "_", "_", "_"), ()),
    ):
        assert Observation(values=values, axes=axes).row_dims == dims
