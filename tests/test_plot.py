"""Pictures of activations."""

import matplotlib as mpl
import pytest
import torch
from models import bridge, tokens

from actctx import AxisError, NotCapturedError, OptionError, capture
from actctx.plot import (
    colour_tokens,
    layer_similarity,
    plot_norms,
    plot_pattern,
    plot_similarity,
)

mpl.use("agg")
RESID, PATTERN = "blocks.*.hook_resid_post", "blocks.1.attn.hook_pattern"


@pytest.fixture(scope="module")
def acts():
    model = bridge()
    with capture(model, [RESID, PATTERN]) as acts:
        model(tokens())
    return acts


@pytest.fixture(autouse=True)
def _close():
    yield
    from matplotlib import pyplot as plt

    plt.close("all")


def test_norms_of_all_positions_are_a_heat_map(acts):
    picture = plot_norms(acts)
    shown = torch.as_tensor(picture.images[0].get_array().filled())
    expected = acts.stack("hook_resid_post").norm(dim=-1).mean(1)
    torch.testing.assert_close(shown, expected)
    assert (picture.get_xlabel(), picture.get_ylabel()) == ("position", "layer")


def test_norms_of_one_position_are_a_line():
    model = bridge()
    with capture(model, RESID, slice=-1) as acts:
        model(tokens(9))
    picture = plot_norms(acts)
    expected = acts.stack("hook_resid_post").norm(dim=-1).median(dim=1).values
    torch.testing.assert_close(torch.as_tensor(picture.lines[0].get_ydata()), expected)


def test_it_is_drawn_on_axes_that_are_given(acts):
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots()
    assert plot_norms(acts, ax=ax) is ax
    assert plot_similarity(acts, ax=ax) is ax
    assert plt.get_fignums() == [figure.number]


def test_a_pattern_has_a_picture_for_each_head(acts):
    figure = plot_pattern(acts, PATTERN, sequence=2, tokens=list("abcdefg"))
    drawn = [torch.as_tensor(ax.images[0].get_array().filled()) for ax in figure.axes if ax.images]
    torch.testing.assert_close(torch.stack(drawn), acts[PATTERN][2])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == list("abcdefg")


@pytest.mark.parametrize("draw", [plot_norms, plot_similarity])
def test_layers_and_positions_are_counted_in_whole_numbers(acts, draw):
    picture = draw(acts)
    assert all(float(tick).is_integer() for tick in (*picture.get_xticks(), *picture.get_yticks()))


def test_a_pattern_of_one_head_is_one_picture():
    model = bridge()
    with capture(model, PATTERN, slice={"head": 1}) as acts:
        model(tokens())
    assert len(plot_pattern(acts, PATTERN).axes) == 1


def test_what_is_no_pattern_is_refused(acts):
    with pytest.raises(AxisError) as caught:
        plot_pattern(acts, "blocks.0.hook_resid_post")
    assert str(caught.value) == (
        "'blocks.0.hook_resid_post' has the axes 'batch pos d_model', but a picture of attention "
        "needs 'batch head query key'; capture attn.hook_pattern without a slice along these"
    )


def test_tokens_that_are_not_as_many_as_keys_are_refused(acts):
    with pytest.raises(OptionError) as caught:
        plot_pattern(acts, PATTERN, tokens=["a"])
    assert str(caught.value) == (
        "'blocks.1.attn.hook_pattern' has 7 keys, but names for 1 were given; give one for each"
    )


def test_heads_that_a_slice_selected_are_numbered():
    model = bridge()
    with capture(model, PATTERN, slice={"head": [3, 1]}) as acts:
        model(tokens())
    figure = plot_pattern(acts, PATTERN, heads=[3, 1])
    assert [ax.get_title() for ax in figure.axes] == ["head 3", "head 1"]
    with pytest.raises(OptionError, match="has 2 heads, but names for 4 were given"):
        plot_pattern(acts, PATTERN, heads=range(4))


def test_a_sequence_that_is_not_there_is_refused(acts):
    with pytest.raises(OptionError) as caught:
        plot_pattern(acts, PATTERN, sequence=3)
    assert str(caught.value) == f"sequence=3 is none of the 3 of '{PATTERN}'; give one of them"


def test_layers_that_were_not_captured_are_refused(acts):
    with pytest.raises(NotCapturedError):
        plot_norms(acts, "hook_mlp_out")


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


def test_tokens_are_coloured_by_sign_and_size():
    coloured = colour_tokens(["<s>", " cat", " sat"], torch.tensor([-1.0, 2.0, 0.0]))
    html = coloured._repr_html_()
    assert "&lt;s&gt;" in html
    assert "rgba(0,114,200,0.50)" in html
    assert "rgba(230,120,0,1.00)" in html
    assert repr(coloured) == "'<s>'(-1) ' cat'(2) ' sat'(0)"


def test_values_that_are_not_one_a_token_are_refused():
    with pytest.raises(OptionError) as caught:
        colour_tokens(["a", "b"], torch.zeros(3))
    assert str(caught.value) == (
        "there are 2 tokens, but values of the shape (3,); give one number for each token"
    )


@pytest.mark.usefixtures("unchecked")
def test_tokens_that_are_no_strings_are_refused(acts):
    said = (
        "tokens are to be read, but some are no strings; give those of model.to_str_tokens(text), "
        "or of tokenizer.convert_ids_to_tokens(ids)"
    )
    for draw in (
        lambda: plot_pattern(acts, PATTERN, tokens=[*range(7)]),
        lambda: colour_tokens(torch.arange(2), torch.zeros(2)),
    ):
        with pytest.raises(OptionError) as caught:
            draw()
        assert str(caught.value) == said


def test_lists_of_tensors_are_refused():
    model = bridge()
    with capture(model, RESID, join=None) as acts:
        model(tokens())
    for draw in (plot_norms, plot_similarity):
        with pytest.raises(OptionError, match="captured with join=None; a picture needs one"):
            draw(acts)


@pytest.mark.parametrize("draw", [plot_norms, plot_similarity])
def test_layers_have_their_numbers(draw):
    model = bridge()
    with capture(model, "blocks.1.hook_resid_post") as acts:
        model(tokens())
    picture = draw(acts)
    picture.figure.canvas.draw()
    labels = [label.get_text() for label in picture.get_yticklabels()]
    assert [label for label in labels if label] == ["1"]


def test_queries_that_were_selected_are_not_named_after_keys():
    model = bridge()
    with capture(model, PATTERN, slice={"query": [5, 6]}) as acts:
        model(tokens())
    figure = plot_pattern(acts, PATTERN, tokens=list("abcdefg"))
    assert len(figure.axes[0].get_xticks()) == 7
    assert "a" not in [label.get_text() for label in figure.axes[0].get_yticklabels()]


def test_numbers_that_are_not_finite_colour_no_others():
    shown = colour_tokens(["a", "b", "c"], torch.tensor([float("nan"), float("inf"), 2.0]))
    html = shown._repr_html_()
    assert "nan)" not in html
    assert html.count(",1.00)") == 2
