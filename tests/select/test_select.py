"""Slices by named axes, against plain indexing."""

import numpy as np
import pytest
import torch
from models import plainly_hooked, tokens

from actctx import AxisError, OptionError, SelectionError, Site, capture
from actctx._select.own import own
from actctx._select.slices import parse_slice

AXES = ("batch", "pos", "head", "d_head")
RESID = "blocks.1.hook_resid_post"
PATTERN = "blocks.0.attn.hook_pattern"


@pytest.fixture
def z():
    return torch.randn(3, 7, 4, 8, generator=torch.Generator().manual_seed(0))


def _selected(activation, asked, axes=AXES, **options):
    selector = parse_slice("site", asked, axes)
    return own(selector.select(activation), copied=selector.copies, **options).value


MASK = torch.tensor([True, False, True, False, False, True, False])


@pytest.mark.parametrize(
    ("asked", "index"),
    [
        (None, np.s_[:]),
        ({}, np.s_[:]),
        (-1, np.s_[:, -1]),
        (0, np.s_[:, 0]),
        (np.int64(2), np.s_[:, 2]),
        (torch.tensor(2), np.s_[:, 2]),
        (slice(1, 5), np.s_[:, 1:5]),
        (slice(-2, None), np.s_[:, -2:]),
        (slice(None, None, 2), np.s_[:, ::2]),
        (range(1, 6, 2), np.s_[:, 1:6:2]),
        (slice(2, 100), np.s_[:, 2:]),
        ([0, -1], np.s_[:, [0, -1]]),
        ([3, 3, 0], np.s_[:, [3, 3, 0]]),
        ([], np.s_[:, []]),
        (torch.tensor([5, 1]), np.s_[:, [5, 1]]),
        (np.array([5, 1]), np.s_[:, [5, 1]]),
        (MASK, np.s_[:, MASK]),
        (MASK.numpy(), np.s_[:, MASK]),
        (MASK.tolist(), np.s_[:, MASK]),
        ({"head": 2}, np.s_[:, :, 2]),
        ({"head": [0, 3]}, np.s_[:, :, [0, 3]]),
        ({"pos": -1, "head": [0, 3]}, np.s_[:, -1, [0, 3]]),
        ({"pos": -1, "head": 2, "d_head": 5}, np.s_[:, -1, 2, 5]),
        ({"batch": slice(0, 2), "d_head": range(2)}, np.s_[0:2, :, :, 0:2]),
        ({"batch": 0, "pos": 0}, np.s_[0, 0]),
        (np.s_[:, -1], np.s_[:, -1]),
        (np.s_[..., 0], np.s_[..., 0]),
        (np.s_[0, ..., [1, 2]], np.s_[0, ..., [1, 2]]),
        (np.s_[:, 1:3, :, -1], np.s_[:, 1:3, :, -1]),
    ],
)
def test_a_slice_selects_what_indexing_selects(z, asked, index):
    expected = z[index]
    found = _selected(z, asked)
    assert torch.equal(found, expected)
    assert found.is_contiguous()
    assert found.untyped_storage().nbytes() == found.nbytes
    assert not found.numel() or found.data_ptr() != z.data_ptr()


def test_a_slice_goes_backwards(z):
    assert torch.equal(_selected(z, slice(None, None, -1)), z.flip(1))
    assert torch.equal(_selected(z, slice(5, 0, -2)), z[:, [5, 3, 1]])


def test_several_lists_select_along_their_own_axes(z):
    found = _selected(z, {"pos": [0, 2, 4], "head": [1, 3]})
    assert torch.equal(found, z[:, [0, 2, 4]][:, :, [1, 3]])


def test_an_int_drops_its_axis_and_a_slice_of_length_one_keeps_it():
    assert parse_slice("site", {"pos": 3}, AXES).axes_after(AXES) == ("batch", "head", "d_head")
    assert parse_slice("site", {"pos": slice(3, 4)}, AXES).axes_after(AXES) == AXES
    assert parse_slice("site", np.s_[..., 0], None).axes_after(AXES) == AXES[:3]


@pytest.mark.parametrize("asked", [None, -1, [0, 1], {"head": 0}])
def test_an_expanded_activation_becomes_dense(asked):
    expanded = torch.randn(1, 7, 4, 8).expand(3, 7, 4, 8)
    found = _selected(expanded, asked)
    assert found.untyped_storage().nbytes() == found.nbytes


def test_an_index_tensor_is_not_changed_by_later_edits(z):
    index = torch.tensor([0, 1])
    selector = parse_slice("site", index, AXES)
    index += 5
    assert torch.equal(selector.select(z), z[:, :2])


def test_casting_and_moving_come_after_selecting(z):
    found = _selected(z, -1, dtype=torch.float16, device=torch.device("meta"))
    assert (found.shape, found.dtype, found.is_meta) == ((3, 4, 8), torch.float16, True)


# On models.


def test_pos_is_the_query_axis_of_a_pattern(gpt2, ids):
    sites = {"pos": Site(PATTERN, slice=-1), "query": Site(PATTERN, slice={"query": -1})}
    with capture(gpt2, sites) as acts:
        gpt2(ids)
    expected = plainly_hooked(gpt2, ids, PATTERN)[PATTERN][0][:, :, -1]
    assert torch.equal(acts.pos, expected)
    assert torch.equal(acts.query, expected)
    assert acts.axes("pos") == ("batch", "head", "key")


def test_the_key_axis_of_a_pattern_is_selected(gpt2, ids):
    with capture(gpt2, PATTERN, slice={"key": [0, 1]}) as acts:
        gpt2(ids)
    assert acts.tensor.shape == (3, 4, 7, 2)


def test_the_axes_of_a_module_can_be_named(llama, ids):
    site = Site("model.layers.0", slice={"pos": -1}, axes="batch pos d_model")
    with capture(llama, site) as acts:
        llama(ids)
    assert acts.axes("model.layers.0") == ("batch", "d_model")
    assert acts.tensor.shape == (3, 32)


def test_a_module_whose_axes_are_not_known_is_selected_by_position(llama, ids):
    with capture(llama, "model.layers.0", slice=np.s_[:, -1]) as acts:
        llama(ids)
    assert acts.tensor.shape == (3, 32)


def test_a_slice_by_position_does_not_forget_the_axes_to_join_along(gpt2, ids):
    with capture(gpt2, RESID, slice=np.s_[:, :3], join="pos") as acts:
        gpt2(ids)
        gpt2(ids)
    assert acts.tensor.shape == (3, 6, 32)


def test_head_means_kv_head_where_there_are_as_many(gpt2, ids):
    with capture(gpt2, "*hook_[qkv]", slice={"head": 1}) as acts:
        gpt2(ids)
    assert {acts[name].shape for name in acts} == {(3, 7, 8)}


def test_a_position_within_some_forwards_only_fails_where_it_is_not(gpt2):
    with capture(gpt2, RESID, slice=5, join=None) as acts:
        gpt2(tokens(2, 7))
        with pytest.raises(SelectionError):
            gpt2(tokens(2, 4))
        gpt2(tokens(2, 6))
    assert len(acts[RESID]) == 2


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "asked",
    ["1", True, 1.5, [1.5], {"pos": "1"}, {"pos": None}, torch.zeros(2, 2).long(), slice(0, 3, 0)],
)
def test_what_does_not_select_is_refused_before_any_forward(gpt2, asked):
    with pytest.raises(OptionError):
        capture(gpt2, RESID, slice=asked)


@pytest.mark.parametrize("asked", [{"head": 0}, {"batch": 0, "key": 1}, np.s_[0, 0, 0, 0]])
def test_an_axis_that_a_site_does_not_have_is_refused_before_any_forward(gpt2, asked):
    with pytest.raises(AxisError):
        capture(gpt2, RESID, slice=asked)


@pytest.mark.parametrize("asked", [{"head": 4}, {"head": [0, -5]}, {"head": [True] * 3}])
def test_a_head_that_the_model_does_not_have_is_refused_before_any_forward(gpt2, asked):
    with pytest.raises(SelectionError):
        capture(gpt2, "blocks.0.attn.hook_z", slice=asked)
