"""Pictures of attention patterns, and coloured tokens."""

import numpy as np
import pytest
import torch
from models import shared, tokens
from pictures import PATTERN, labels_of, shown_in
from torch import nn

from actctx import AxisError, OptionError, Site, capture
from actctx.dataset import ActivationDataset
from actctx.extract import extract
from actctx.plot import (
    colour_tokens,
    plot_norms,
    plot_pattern,
    plot_similarity,
)


def test_a_pattern_has_a_picture_for_each_head(acts):
    pictures = plot_pattern(acts, PATTERN, sequence=2, tokens=list("abcdefg"))
    torch.testing.assert_close(torch.stack([*map(shown_in, pictures)]), acts[PATTERN][2])
    assert [label.get_text() for label in pictures[0].get_xticklabels()] == list("abcdefg")


def test_heads_share_a_scale_from_0_to_1(acts):
    *pictures, scale = plot_pattern(acts, PATTERN)[0].figure.axes
    assert {picture.images[0].get_clim() for picture in pictures} == {(0, 1)}
    assert scale.get_ylabel() == "attention"


def test_pictures_grow_with_the_tokens_to_be_read():
    model = shared()
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
    model = shared()
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
    model = shared()
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


def test_queries_that_were_selected_are_not_named_after_keys():
    model = shared()
    with capture(model, PATTERN, slice={"query": [5, 6]}) as acts:
        model(tokens())
    first, *_ = plot_pattern(acts, PATTERN, tokens=list("abcdefg"))
    assert len(first.get_xticks()) == 7
    assert not len(first.get_yticks())
    first, *_ = plot_pattern(acts, PATTERN)
    assert not len(first.get_yticks())


def test_a_pattern_of_a_data_set_is_that_which_was_captured(acts, tmp_path):
    path = tmp_path / "pattern.lance"
    extract(shared(), tokens(), [PATTERN, "blocks.1.hook_resid_post"], path)
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
    extract(shared(), tokens(), PATTERN, tmp_path / "query", slice={"query": -1})
    with pytest.raises(AxisError, match=r"the axes 'batch head key', but a picture"):
        plot_pattern(ActivationDataset(tmp_path / "query"), PATTERN)
    extract(shared(), tokens(), PATTERN, tmp_path / "head", slice={"head": 1})
    assert len(plot_pattern(ActivationDataset(tmp_path / "head"), PATTERN)) == 1


def test_scores_are_no_pattern():
    model = shared()
    with capture(model, "blocks.1.attn.hook_attn_scores") as acts:
        model(tokens())
    with pytest.raises(OptionError, match=r"are between 0 and 1; capture attn\.hook_pattern"):
        plot_pattern(acts, "blocks.1.attn.hook_attn_scores")


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
    model = shared()
    with capture(model, PATTERN, slice={"query": slice(0, 0)}) as acts:
        model(tokens())
    with pytest.raises(AxisError, match="so there is nothing to draw"):
        plot_pattern(acts, PATTERN)


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


# Coloured tokens.


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


def test_numbers_that_are_not_finite_colour_no_others():
    shown = colour_tokens(["a", "b", "c"], torch.tensor([float("nan"), float("inf"), 2.0]))
    html = shown._repr_html_()
    assert "nan)" not in html
    assert html.count(",0.50)") == 2


@pytest.mark.parametrize("values", [["x"], None, [None]])
@pytest.mark.usefixtures("unchecked")
def test_values_that_are_no_numbers_are_refused(values):
    with pytest.raises(OptionError) as caught:
        colour_tokens(["a"], values)
    assert str(caught.value) == "values must be numbers; give one for each token"
