"""Pictures of activations."""

import sys
from collections import OrderedDict

import matplotlib as mpl
import numpy as np
import pytest
import torch
from models import bridge, tokens
from torch import nn

from actctx import AxisError, JoinError, NotCapturedError, OptionError, Site, capture
from actctx.dataset import ActivationDataset
from actctx.extract import extract
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


def shown_in(picture):
    return torch.as_tensor(picture.images[0].get_array().filled(float("nan")))


def labels_of(picture):
    picture.figure.canvas.draw()
    return [label.get_text() for label in picture.get_xticklabels() if label.get_text()]


def test_norms_of_all_positions_are_a_heat_map(acts):
    picture = plot_norms(acts)
    expected = acts.stack("hook_resid_post").norm(dim=-1).mean(1)
    torch.testing.assert_close(shown_in(picture), expected)
    assert (picture.get_xlabel(), picture.get_ylabel()) == ("position", "layer")


def test_norms_of_one_position_are_a_line():
    model = bridge()
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


def test_a_pattern_has_a_picture_for_each_head(acts):
    pictures = plot_pattern(acts, PATTERN, sequence=2, tokens=list("abcdefg"))
    torch.testing.assert_close(torch.stack([*map(shown_in, pictures)]), acts[PATTERN][2])
    assert [label.get_text() for label in pictures[0].get_xticklabels()] == list("abcdefg")


def test_heads_share_a_scale_from_0_to_1(acts):
    *pictures, scale = plot_pattern(acts, PATTERN)[0].figure.axes
    assert {picture.images[0].get_clim() for picture in pictures} == {(0, 1)}
    assert scale.get_ylabel() == "attention"


def test_pictures_grow_with_the_tokens_to_be_read():
    model = bridge()
    with capture(model, PATTERN) as acts:
        model(tokens(1, 16))
    first, *_ = plot_pattern(acts, PATTERN, tokens=["token"] * 16)
    first.figure.canvas.draw()
    assert first.get_window_extent().height > 16 * 0.15 * first.figure.dpi  # a line of type each


def test_pictures_do_not_grow_without_end():
    even = nn.Sequential(nn.Softmax(-1))
    with capture(even, Site("0", axes="batch head query key")) as acts:
        even(torch.zeros(1, 1, 300, 300))
    figure = plot_pattern(acts, "0", tokens=["token"] * 300)[0].figure
    assert figure.get_size_inches().tolist() == [24, 24]


@pytest.mark.parametrize("draw", [plot_norms, plot_similarity])
def test_layers_and_positions_are_counted_in_whole_numbers(acts, draw):
    picture = draw(acts)
    assert all(float(tick).is_integer() for tick in (*picture.get_xticks(), *picture.get_yticks()))


def test_a_pattern_of_one_head_is_one_picture():
    model = bridge()
    with capture(model, PATTERN, slice={"head": 1}) as acts:
        model(tokens())
    assert len(plot_pattern(acts, PATTERN)) == 1


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
        "'blocks.1.attn.hook_pattern' has 7 keys, but 1 was given; give one for each"
    )


def test_heads_that_a_slice_selected_are_numbered():
    model = bridge()
    with capture(model, PATTERN, slice={"head": [3, 1]}) as acts:
        model(tokens())
    pictures = plot_pattern(acts, PATTERN, heads=[3, 1])
    assert [picture.get_title() for picture in pictures] == ["head 3", "head 1"]
    with pytest.raises(OptionError, match="has 2 heads, but 4 were given; give one for each"):
        plot_pattern(acts, PATTERN, heads=range(4))


def test_a_sequence_that_is_not_there_is_refused(acts):
    for sequence in (3, -1):
        with pytest.raises(OptionError) as caught:
            plot_pattern(acts, PATTERN, sequence=sequence)
        said = f"there is no sequence {sequence} of '{PATTERN}'; there are 3, from 0"
        assert str(caught.value) == said


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
    assert "rgba(0,114,200,0.25)" in html
    assert "rgba(230,120,0,0.50)" in html
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
        "tokens must be strings; give those of model.to_str_tokens(text), or of "
        "tokenizer.convert_ids_to_tokens(ids)"
    )
    for draw in (
        lambda: plot_pattern(acts, PATTERN, tokens=[*range(7)]),
        lambda: plot_pattern(acts, PATTERN, tokens=7),
        lambda: colour_tokens(torch.arange(2), torch.zeros(2)),
        lambda: colour_tokens("ab", torch.zeros(2)),
        lambda: colour_tokens(None, torch.zeros(2)),
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
    first, *_ = plot_pattern(acts, PATTERN, tokens=list("abcdefg"))
    assert len(first.get_xticks()) == 7
    assert not len(first.get_yticks())
    first, *_ = plot_pattern(acts, PATTERN)
    assert not len(first.get_yticks())


def test_numbers_that_are_not_finite_colour_no_others():
    shown = colour_tokens(["a", "b", "c"], torch.tensor([float("nan"), float("inf"), 2.0]))
    html = shown._repr_html_()
    assert "nan)" not in html
    assert html.count(",0.50)") == 2


def test_norms_of_heads_are_a_heat_map_of_their_mean():
    model = bridge()
    with capture(model, "blocks.*.attn.hook_z") as acts:
        model(tokens())
    expected = acts.stack("attn.hook_z").norm(dim=-1).mean((1, 3))
    torch.testing.assert_close(shown_in(plot_norms(acts, "attn.hook_z")), expected)


def test_norms_of_one_sequence_are_a_heat_map():
    model = bridge()
    with capture(model, RESID, slice={"batch": 0}) as acts:
        model(tokens())
    expected = acts.stack("hook_resid_post").norm(dim=-1)
    torch.testing.assert_close(shown_in(plot_norms(acts)), expected)


@pytest.mark.parametrize("sliced", [0, 1])
def test_layers_with_positions_and_without_are_refused(sliced):
    model = bridge()
    sites = [Site(f"blocks.{n}.hook_resid_post", slice=-1 if n == sliced else {}) for n in (0, 1)]
    with capture(model, sites) as acts:
        model(tokens())
    with pytest.raises(JoinError):
        plot_norms(acts)


def test_norms_of_what_a_mask_kept_lie_at_their_positions():
    model = bridge()
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
    model = bridge()
    with capture(model, RESID, slice={"pos": [2, 5]}) as acts:
        model(tokens())
    assert labels_of(plot_norms(acts, positions=[2, 5])) == ["2", "5"]
    with pytest.raises(OptionError, match="has 2 positions, but 3 were given; give one"):
        plot_norms(acts, positions=range(3))


def test_positions_that_are_not_known_have_no_numbers():
    model = bridge()
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
    model = bridge()
    with capture(model, "blocks.*.mlp.hook_post", slice={"pos": 0, "d_mlp": 3}) as acts:
        model(tokens())
    for draw in (plot_norms, plot_similarity):
        with pytest.raises(AxisError, match="has one number per row, but features along a last"):
            draw(acts, "mlp.hook_post")


def test_a_pattern_of_a_data_set_is_that_which_was_captured(acts, tmp_path):
    path = tmp_path / "pattern.lance"
    extract(bridge(), tokens(), [PATTERN, "blocks.1.hook_resid_post"], path)
    data = ActivationDataset(path)
    stored, captured = (plot_pattern(each, PATTERN, sequence=2) for each in (data, acts))
    for one, two in zip(stored, captured, strict=True):
        torch.testing.assert_close(shown_in(one), shown_in(two))
    some = ActivationDataset(path, where="position > 3")
    assert shown_in(plot_pattern(some, PATTERN, heads=range(4))[0]).shape == (3, 7)
    with pytest.raises(
        OptionError, match=r"there is no sequence 3 in '.*'; give a number of its c"
    ):
        plot_pattern(data, PATTERN, sequence=3)
    with pytest.raises(AxisError, match=r"the axes 'batch query d_model', but a picture"):
        plot_pattern(data, "blocks.1.hook_resid_post")


def test_a_query_of_a_data_set_is_no_pattern_but_one_head_is(tmp_path):
    extract(bridge(), tokens(), PATTERN, tmp_path / "query", slice={"query": -1})
    with pytest.raises(AxisError, match=r"the axes 'batch head key', but a picture"):
        plot_pattern(ActivationDataset(tmp_path / "query"), PATTERN)
    extract(bridge(), tokens(), PATTERN, tmp_path / "head", slice={"head": 1})
    assert len(plot_pattern(ActivationDataset(tmp_path / "head"), PATTERN)) == 1


def test_scores_are_no_pattern():
    model = bridge()
    with capture(model, "blocks.1.attn.hook_attn_scores") as acts:
        model(tokens())
    with pytest.raises(OptionError, match=r"are between 0 and 1; capture attn\.hook_pattern"):
        plot_pattern(acts, "blocks.1.attn.hook_attn_scores")


def test_layers_with_other_rows_are_not_compared():
    model = bridge()
    sites = [Site("blocks.0.hook_resid_post", slice=[0]), Site("blocks.1.hook_resid_post")]
    with capture(model, sites) as acts:
        model(tokens())
    with pytest.raises(JoinError, match=r"has 3 rows and 'blocks\.1\.hook_resid_post' has 21"):
        layer_similarity(acts)


@pytest.mark.parametrize("rows", [1, 5])
def test_rows_that_are_all_the_same_are_not_compared(rows):
    model = bridge()
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


def test_a_data_set_is_drawn_as_what_was_captured(acts, tmp_path, monkeypatch):
    pytest.importorskip("lance")
    extract(bridge(), [tokens()], RESID, tmp_path / "data", progress=False)
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
    extract(bridge(), [tokens(9)], RESID, tmp_path / "data", slice=-1, progress=False)
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
    model, ids = bridge(), tokens()
    mask = torch.ones_like(ids)
    with capture(model, RESID, slice=-1, mask=mask) as acts:
        model(ids)
    assert not plot_norms(acts).images


def test_layers_of_aliases_are_numbered_as_in_the_model():
    model = bridge()
    with capture(model, {"v2": "blocks.1.hook_resid_post", "v3": "blocks.0.hook_out"}) as acts:
        model(tokens())
    picture = plot_similarity(acts, "v*")
    picture.figure.canvas.draw()
    shown = [label.get_text() for label in picture.get_yticklabels()]
    assert [each for each in shown if each] == ["1", "0"]


def test_rows_that_are_none_or_no_numbers_are_refused():
    model, ids = bridge(), tokens()
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
def test_tokens_may_be_an_array_and_ids_are_refused_in_any_form(acts):
    assert len(plot_pattern(acts, PATTERN, tokens=np.array(list("abcdefg")))) == 4
    with pytest.raises(OptionError, match="tokens must be strings"):
        plot_pattern(acts, PATTERN, tokens=tokens()[0])


@pytest.mark.parametrize("sequence", ["0", 0.5])
@pytest.mark.usefixtures("unchecked")
def test_a_sequence_that_is_no_number_is_refused(acts, sequence):
    with pytest.raises(OptionError, match=rf"^sequence={sequence!r} must be an integer$"):
        plot_pattern(acts, PATTERN, sequence=sequence)


def test_positions_without_tokens_are_numbered_by_whole_numbers(acts):
    first, *_ = plot_pattern(acts, PATTERN)
    assert all(label.isdecimal() for label in labels_of(first))


def test_a_pattern_without_queries_is_refused():
    model = bridge()
    with capture(model, PATTERN, slice={"query": slice(0, 0)}) as acts:
        model(tokens())
    with pytest.raises(AxisError, match="so there is nothing to draw"):
        plot_pattern(acts, PATTERN)


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


@pytest.mark.parametrize("values", [["x"], None, [None]])
@pytest.mark.usefixtures("unchecked")
def test_values_that_are_no_numbers_are_refused(values):
    with pytest.raises(OptionError) as caught:
        colour_tokens(["a"], values)
    assert str(caught.value) == "values must be numbers; give one for each token"


@pytest.mark.parametrize("text", ["$$", "$\\frac$", "$x^", "a$b$c"])
def test_dollars_in_tokens_and_names_are_shown_as_they_are(text):
    sites = {f"{text}1": Site("0", axes="batch head query key"), "b$": Site("1"), "c$": Site("2")}
    model = nn.Sequential(nn.Softmax(-1), nn.Identity(), nn.Identity())
    with capture(model, sites) as acts:
        model(torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0)))
    first, _ = plot_pattern(acts, f"{text}1", tokens=[text] * 3)
    shown = [first.figure._suptitle, *first.get_xticklabels(), *first.get_yticklabels()]
    first.figure.canvas.draw()
    assert not any(label.get_parse_math() for label in shown)
    assert [label.get_text() for label in shown] == [f"{text}1", *[text] * 6]


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
