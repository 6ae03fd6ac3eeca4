"""Pictures of norms, and of layers that are compared."""

import sys
from collections import OrderedDict

import pytest
import torch
from models import bridge, shared, tokens
from pictures import PATTERN, RESID, labels_of, shown_in
from torch import nn

from actctx import AxisError, JoinError, NotCapturedError, OptionError, Site, capture
from actctx.dataset import ActivationDataset
from actctx.extract import extract
from actctx.plot import (
    layer_similarity,
    plot_norms,
    plot_pattern,
    plot_similarity,
)


def test_norms_of_all_positions_are_a_heat_map(acts):
    picture = plot_norms(acts)
    expected = acts.stack("hook_resid_post").norm(dim=-1).mean(1)
    torch.testing.assert_close(shown_in(picture), expected)
    assert (picture.get_xlabel(), picture.get_ylabel()) == ("position", "layer")


def test_norms_of_one_position_are_a_line():
    model = shared()
    with capture(model, RESID, slice=-1) as acts:
        model(tokens(9))
    picture = plot_norms(acts)
    expected = acts.stack("hook_resid_post").norm(dim=-1).median(dim=1).values
    assert picture.lines[0].get_ydata().tolist() == pytest.approx(expected.tolist())


def test_it_is_drawn_on_axes_that_are_given(acts):
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots()
    assert plot_norms(acts, ax=ax) is ax
    assert plot_similarity(acts, ax=ax) is ax
    assert plt.get_fignums() == [figure.number]


def test_layers_that_were_not_captured_are_refused(acts):
    with pytest.raises(NotCapturedError):
        plot_norms(acts, "hook_mlp_out")


def test_lists_of_tensors_are_refused():
    model = shared()
    with capture(model, RESID, join=None) as acts:
        model(tokens())
    for draw in (plot_norms, plot_similarity):
        with pytest.raises(OptionError, match="captured with join=None; a picture needs one"):
            draw(acts)


@pytest.mark.parametrize("draw", [plot_norms, plot_similarity])
def test_layers_have_their_numbers(draw):
    model = shared()
    with capture(model, "blocks.1.hook_resid_post") as acts:
        model(tokens())
    picture = draw(acts)
    picture.figure.canvas.draw()
    labels = [label.get_text() for label in picture.get_yticklabels()]
    assert [label for label in labels if label] == ["1"]


def test_norms_of_heads_are_a_heat_map_of_their_mean():
    model = shared()
    with capture(model, "blocks.*.attn.hook_z") as acts:
        model(tokens())
    expected = acts.stack("attn.hook_z").norm(dim=-1).mean((1, 3))
    torch.testing.assert_close(shown_in(plot_norms(acts, "attn.hook_z")), expected)


def test_norms_of_one_sequence_are_a_heat_map():
    model = shared()
    with capture(model, RESID, slice={"batch": 0}) as acts:
        model(tokens())
    expected = acts.stack("hook_resid_post").norm(dim=-1)
    torch.testing.assert_close(shown_in(plot_norms(acts)), expected)


@pytest.mark.parametrize("sliced", [0, 1])
def test_layers_with_positions_and_without_are_refused(sliced):
    model = shared()
    sites = [Site(f"blocks.{n}.hook_resid_post", slice=-1 if n == sliced else {}) for n in (0, 1)]
    with capture(model, sites) as acts:
        model(tokens())
    with pytest.raises(JoinError):
        plot_norms(acts)


def test_norms_of_what_a_mask_kept_lie_at_their_positions():
    model = shared()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1]])
    with capture(model, RESID, mask=mask.bool()) as acts:
        model(tokens())
    with capture(model, RESID) as whole:
        model(tokens())
    shown = shown_in(plot_norms(acts))
    norms = whole.stack("hook_resid_post").norm(dim=-1)  # layer batch pos
    torch.testing.assert_close(shown[:, 2:], ((norms * mask).sum(1) / mask.sum(0))[:, 2:])
    assert shown[:, :2].isnan().all()


def test_positions_that_a_slice_selected_are_numbered():
    model = shared()
    with capture(model, RESID, slice={"pos": [2, 5]}) as acts:
        model(tokens())
    assert labels_of(plot_norms(acts, positions=[2, 5])) == ["2", "5"]
    with pytest.raises(OptionError, match="has 2 positions, but 3 were given; give one"):
        plot_norms(acts, positions=range(3))


def test_positions_that_are_not_known_have_no_numbers():
    model = shared()
    with capture(model, RESID, slice=-1) as acts:
        model(tokens())
    with pytest.raises(OptionError) as caught:
        plot_norms(acts, positions=[6])
    assert str(caught.value) == (
        "the positions of 'blocks.0.hook_resid_post' are not known, so they cannot be shown in the "
        "picture; omit positions="
    )


def test_a_module_whose_axes_are_not_known_is_a_line():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with capture(model, ["0", "1"]) as acts:
        model(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    picture = plot_norms(acts, "*")
    expected = [acts[name].norm(dim=-1).median().item() for name in "01"]
    assert picture.lines[0].get_ydata().tolist() == pytest.approx(expected)


def test_one_number_a_row_has_no_norm():
    model = shared()
    with capture(model, "blocks.*.mlp.hook_post", slice={"pos": 0, "d_mlp": 3}) as acts:
        model(tokens())
    for draw in (plot_norms, plot_similarity):
        with pytest.raises(
            AxisError, match="has one number per row, but features along a last axis"
        ):
            draw(acts, "mlp.hook_post")


def test_a_data_set_is_drawn_as_what_was_captured(acts, tmp_path, monkeypatch):
    pytest.importorskip("lance")
    extract(shared(), [tokens()], RESID, tmp_path / "data", progress=False)
    data = ActivationDataset(tmp_path / "data")
    monkeypatch.setattr("actctx._plot.sources._ROWS", 8)
    torch.testing.assert_close(shown_in(plot_norms(data)), shown_in(plot_norms(acts)))
    torch.testing.assert_close(layer_similarity(data), layer_similarity(acts))
    torch.testing.assert_close(shown_in(plot_similarity(data)), layer_similarity(acts))

    some = ActivationDataset(tmp_path / "data", where="position >= 5")
    shown = shown_in(plot_norms(some))
    assert shown[:, :5].isnan().all()
    torch.testing.assert_close(shown[:, 5:], shown_in(plot_norms(acts))[:, 5:])
    with pytest.raises(NotCapturedError, match="there are no rows in"):
        plot_norms(ActivationDataset(tmp_path / "data", where="position > 99"))


def test_a_data_set_of_sequences_is_a_line(tmp_path):
    pytest.importorskip("lance")
    extract(shared(), [tokens(9)], RESID, tmp_path / "data", slice=-1, progress=False)
    data = ActivationDataset(tmp_path / "data")
    expected = [data.read(name).norm(dim=-1).median().item() for name in data.sites]
    assert plot_norms(data).lines[0].get_ydata().tolist() == pytest.approx(expected)


def test_matplotlib_that_is_not_there_is_asked_for(acts, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (plot_norms, plot_similarity, lambda acts: plot_pattern(acts, PATTERN)):
        with pytest.raises(OptionError) as caught:
            draw(acts)
        assert str(caught.value) == (
            "pictures need matplotlib, which is not installed; install it with: pip install "
            "'actctx[plot]'"
        )


def test_one_row_a_sequence_is_a_line_with_a_mask_too():
    model, ids = shared(), tokens()
    mask = torch.ones_like(ids)
    with capture(model, RESID, slice=-1, mask=mask) as acts:
        model(ids)
    assert not plot_norms(acts).images


def test_rows_that_are_none_or_no_numbers_are_refused():
    model, ids = shared(), tokens()
    with capture(model, RESID, mask=torch.zeros_like(ids)) as acts:
        model(ids)
    for draw in (plot_norms, layer_similarity):
        with pytest.raises(NotCapturedError, match=r"has no rows to draw or to compare: its mask"):
            draw(acts)
    with capture(model, RESID) as acts:
        model(ids)
    acts["blocks.1.hook_resid_post"][0, 0, 0] = float("nan")
    with pytest.raises(
        OptionError, match=r"'blocks.1.hook_resid_post' has NaN, infinite or too la"
    ):
        layer_similarity(acts)


@pytest.mark.parametrize("given", [{}, "acts.lance"])
@pytest.mark.usefixtures("unchecked")
def test_what_is_neither_a_buffer_nor_a_data_set_is_refused(given):
    for draw in (plot_norms, plot_similarity, lambda acts: plot_pattern(acts, PATTERN)):
        with pytest.raises(OptionError, match=rf"not a {type(given).__name__}; give one of th"):
            draw(given)


@pytest.mark.usefixtures("unchecked")
def test_numbers_may_be_a_tensor_or_an_array(acts):
    seven = torch.arange(7)
    for numbers in (seven, seven.numpy()):
        assert labels_of(plot_norms(acts, positions=numbers))[0] == "0"
    first, *_ = plot_pattern(acts, PATTERN, heads=torch.tensor([5, 6, 7, 8]))
    assert first.get_title() == "head 5"


@pytest.mark.parametrize("numbers", [5, "0123", [0.5] * 4, torch.tensor(3)])
@pytest.mark.usefixtures("unchecked")
def test_numbers_that_are_none_are_refused(acts, numbers):
    for option, draw in (("heads", plot_pattern), ("positions", plot_norms)):
        with pytest.raises(OptionError) as caught:
            draw(acts, PATTERN if draw is plot_pattern else "hook_resid_post", **{option: numbers})
        assert str(caught.value) == (
            f"{option}={numbers!r} must be integers, as in {option}=[0, 3]"
        )


@pytest.mark.usefixtures("unchecked")
def test_a_name_that_is_none_is_refused(acts):
    for draw in (plot_norms, plot_pattern, plot_similarity):
        with pytest.raises(OptionError) as caught:
            draw(acts, 7)
        assert str(caught.value) == "name=7 must be a string, such as 'hook_resid_post'"


@pytest.mark.parametrize("draw", [plot_norms, plot_similarity])
def test_dollars_in_the_names_of_layers_are_shown_as_they_are(draw):
    model = nn.Sequential(OrderedDict(one=nn.Linear(4, 4), two=nn.Linear(4, 4)))
    with capture(model, {"$\\frac$1": "one", "$\\frac$2": "two"}) as acts:
        model(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    picture = draw(acts, "$\\frac$*")
    assert labels_of(picture) == [r"\$\frac\$1", r"\$\frac\$2"]
    drawn = picture.get_xticklabels()[0]._preprocess_math(r"\$\frac\$1")
    assert drawn == (r"$\frac$1", False)
    assert not picture.title.get_parse_math()


def test_a_router_whose_rows_no_mask_kept_is_a_line():
    model = bridge("MixtralForCausalLM")
    with capture(model, "blocks.*.mlp.gate.hook_out") as acts:
        model(tokens())
    picture = plot_norms(acts, "mlp.gate.hook_out")
    expected = acts.stack("mlp.gate.hook_out").norm(dim=-1).median(dim=1).values
    assert picture.lines[0].get_ydata().tolist() == pytest.approx(expected.tolist())
    with pytest.raises(OptionError, match="omit positions="):
        plot_norms(acts, "mlp.gate.hook_out", positions=range(21))


# Similarity of layers.


def test_similarity_is_that_of_the_gram_matrices(acts):
    """Against the other form of linear CKA, by kernels of the rows."""
    rows = [acts[f"blocks.{layer}.hook_resid_post"].flatten(0, 1).double() for layer in (0, 1)]
    centring = torch.eye(21).double() - 1 / 21
    kernels = [centring @ each @ each.T @ centring for each in rows]
    one, two = kernels
    expected = (one * two).sum() / (one.norm() * two.norm())
    square = layer_similarity(acts)
    torch.testing.assert_close(square[0, 1].double(), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(square, square.T)
    assert torch.equal(square.diagonal(), torch.ones(2))


def test_similarity_does_not_see_rotations_and_scales(acts):
    whole = acts["blocks.0.hook_resid_post"]
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    turned = acts.to()
    turned["blocks.1.hook_resid_post"].copy_(3 * whole @ rotation + 1)
    assert layer_similarity(turned)[0, 1].item() == pytest.approx(1, abs=1e-4)


def test_layers_with_other_rows_are_not_compared():
    model = shared()
    sites = [Site("blocks.0.hook_resid_post", slice=[0]), Site("blocks.1.hook_resid_post")]
    with capture(model, sites) as acts:
        model(tokens())
    with pytest.raises(JoinError, match=r"has 3 rows and 'blocks\.1\.hook_resid_post' has 21"):
        layer_similarity(acts)


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_that_are_all_the_same_are_not_compared(rows):
    model = shared()
    with capture(model, RESID, slice={"pos": 0}) as acts:
        model(tokens(1).expand(rows, -1))
    with pytest.raises(OptionError) as caught:
        layer_similarity(acts)
    assert str(caught.value) == (
        "the rows of 'blocks.0.hook_resid_post' are all the same, so it cannot be compared with "
        "other layers; capture other positions, or leave it out"
    )


def test_similarity_is_the_same_in_parts(acts, monkeypatch):
    whole = layer_similarity(acts)
    monkeypatch.setattr("actctx._plot.sources._ROWS", 4)
    torch.testing.assert_close(layer_similarity(acts), whole)


def test_layers_of_aliases_are_numbered_as_in_the_model():
    model = shared()
    with capture(model, {"v2": "blocks.1.hook_resid_post", "v3": "blocks.0.hook_out"}) as acts:
        model(tokens())
    picture = plot_similarity(acts, "v*")
    picture.figure.canvas.draw()
    shown = [label.get_text() for label in picture.get_yticklabels()]
    assert [each for each in shown if each] == ["1", "0"]
