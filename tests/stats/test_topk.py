"""TopK: the largest values of each feature, where they are, and the tokens around them."""

import pytest
import torch
from observed import observed, seen, split

from actctx import OptionError
from actctx.stats import Observation, TopK


def _values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _tokens(batch, pos, first=0):
    return torch.arange(first * pos, (first + batch) * pos).reshape(batch, pos)


def test_values_and_where_they_are_are_those_of_all_rows():
    values, top = _values(6, 5, 3), TopK(4)
    for part, first in split(values, [2, 1, 3]):
        top.merge(seen(top, part, first=first, tokens=_tokens(len(part), 5, first)))
    found = values.reshape(-1, 3).topk(4, dim=0)
    assert torch.equal(top.values, found.values.T)
    assert torch.equal(top.sequence, found.indices.T // 5)
    assert torch.equal(top.position, found.indices.T % 5)
    assert torch.equal(top.token, found.indices.T)
    assert top.axes == ("d_model",)


def test_more_features_than_fit_at_once_are_taken_in_parts():
    values = _values(2, 300, 5000)
    top = seen(TopK(3), values)
    assert torch.equal(top.values, values.reshape(-1, 5000).topk(3, dim=0).values.T)


def test_features_keep_their_axes():
    values = _values(3, 4, 2, 5)
    top = seen(TopK(2), values, axes=("batch", "pos", "head", "d_head"))
    found = values.flatten(0, 1).topk(2, dim=0)
    assert torch.equal(top.values, found.values.movedim(0, -1))
    assert torch.equal(top.position, found.indices.movedim(0, -1) % 4)


def test_each_position_has_its_own_where_it_is_kept():
    values = _values(6, 4, 3)
    top = seen(TopK(2, over="batch"), values, tokens=_tokens(6, 4))
    found = values.topk(2, dim=0)
    assert torch.equal(top.values, found.values.movedim(0, -1))
    assert torch.equal(top.sequence, found.indices.movedim(0, -1))
    assert torch.equal(top.position, torch.arange(4)[:, None, None].expand(4, 3, 2))
    assert torch.equal(top.token, top.sequence * 4 + top.position)


def test_heads_may_be_reduced_as_well():
    values = _values(3, 4, 2, 5)
    top = seen(TopK(2, over="batch pos head"), values, axes=("batch", "pos", "head", "d_head"))
    found = values.flatten(0, 2).topk(2, dim=0)
    assert torch.equal(top.values, found.values.T)
    assert torch.equal(top.sequence, found.indices.T // 8)
    assert torch.equal(top.position, found.indices.T // 2 % 4)


def test_one_number_a_row_has_one_list():
    values = _values(3, 4)
    top = seen(TopK(2), values, axes=("batch", "pos"))
    assert torch.equal(top.values, values.flatten().topk(2).values)
    top.merge(seen(top, values + 1, first=3))
    assert top.sequence.shape == (2,)
    assert (top.sequence >= 3).all()


def test_contexts_are_the_tokens_around_and_end_with_the_sequence():
    values = torch.zeros(2, 5, 1)
    values[0, 0], values[1, 3], values[1, 4] = 3, 2, 1
    top = seen(TopK(3, context=2), values, first=7, tokens=_tokens(2, 5, 7))
    assert top.sequence.tolist() == [[7, 8, 8]]
    assert top.contexts.tolist() == [
        [[-1, -1, 35, 36, 37], [41, 42, 43, 44, -1], [42, 43, 44, -1, -1]]
    ]


def test_contexts_leave_padding_out():
    values = torch.zeros(1, 5, 1)
    values[0, 2] = 1
    real = torch.tensor([[False, False, True, True, False]])
    top = seen(TopK(1, context=3), values, tokens=_tokens(1, 5), real=real)
    assert top.contexts.tolist() == [[[-1, -1, -1, 2, 3, -1, -1]]]


def test_contexts_of_rows_that_a_mask_chose_are_of_the_whole_forward():
    top = TopK(1, context=1)
    top.update(
        Observation(
            values=torch.tensor([[1.0], [5.0]]),
            axes=("token", "d_model"),
            sequence=torch.tensor([4, 5]),
            position=torch.tensor([10, 12]),
            tokens=_tokens(2, 4),
            first_sequence=4,
            first_position=10,
        )
    )
    assert (top.sequence, top.position) == (torch.tensor([[5]]), torch.tensor([[12]]))
    assert top.contexts.tolist() == [[[5, 6, 7]]]


def test_where_nothing_is_known_there_is_minus_one():
    top = TopK(2, context=1)
    top.update(Observation(values=_values(5, 2), axes=("_", "_")))
    assert (top.sequence == -1).all()
    assert (top.position == -1).all()
    assert (top.token == -1).all()
    assert (top.contexts == -1).all()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_of_equal_values_the_earlier_ones_are_taken(order):
    top = TopK(5)
    for number in order:
        top.merge(seen(top, torch.zeros(2, 2, 3), first=2 * number))
    assert top.sequence.tolist() == [[0, 0, 1, 1, 2]] * 3
    assert top.position.tolist() == [[0, 1, 0, 1, 0]] * 3


def test_of_equal_values_of_a_sequence_the_earlier_positions_are_taken():
    top = TopK(2)
    for first in (2, 0):  # as steps with a KV cache, merged the other way round
        part = TopK(2)
        part.update(
            Observation(
                values=torch.zeros(1, 2, 1),
                axes=("batch", "pos", "d_model"),
                sequence=torch.zeros(1, 2).long(),
                position=torch.arange(first, first + 2)[None],
            )
        )
        top.merge(part)
    assert top.position.tolist() == [[0, 1]]


def test_positions_in_front_of_sequences_are_taken_in_the_order_of_sequences():
    top = TopK(3)
    top.update(
        Observation(
            values=torch.tensor([[0.0, 0.0], [0.0, -0.0]])[..., None],
            axes=("pos", "batch", "d_model"),
            sequence=torch.tensor([[0, 1], [0, 1]]),
            position=torch.tensor([[0, 0], [1, 1]]),
        )
    )
    assert top.sequence.tolist() == [[0, 0, 1]]
    assert top.position.tolist() == [[0, 1, 0]]


def test_nan_is_the_smallest_and_infinity_the_largest():
    values = torch.tensor([[torch.nan, 1.0, torch.inf, 2.0]])[..., None]
    top = seen(TopK(3), values)
    assert top.values.tolist() == [[torch.inf, 2, 1]]
    top.merge(seen(top, torch.full((1, 4, 1), torch.nan), first=1))
    assert top.values.tolist() == [[torch.inf, 2, 1]]
    assert seen(TopK(4), values).values.isnan().tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_values_are_in_single_precision(dtype):
    values = _values(2, 3, 4).to(dtype)
    top = seen(TopK(2), values)
    assert top.values.dtype == torch.float32
    assert torch.equal(top.values, values.float().flatten(0, 1).topk(2, dim=0).values.T)


def test_more_than_there_are_rows_are_refused_and_nothing_is_lost():
    top = seen(TopK(7), _values(1, 5, 3))
    with pytest.raises(OptionError) as error:
        top.values  # noqa: B018  it is read
    assert str(error.value) == (
        "TopK(k=7) has seen 5 rows, so there are not as many largest ones; run more forwards, or "
        "take TopK(k=5)"
    )
    assert "5 rows" in top._repr_html_()
    top.merge(seen(top, _values(1, 5, 3, seed=1), first=1))
    assert top.values.shape == (3, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), "TopK takes k= a whole number from 1 up, not 0"),
        (lambda: TopK(2, context=-1), "TopK takes context= a whole number from 0 up, not -1"),
        (
            lambda: TopK(2, decode=3),
            "decode=3 makes no text of token ids; give a tokenizer, or a function of an id",
        ),
        (
            lambda: seen(TopK(2), _values(1, 5, 3)).contexts,
            "this TopK keeps no contexts; make it with context= the number of tokens to keep on "
            "each side",
        ),
        (
            lambda: seen(TopK(2), _values(1, 5, 3)).show(3),
            "there is no feature 3: there are 3, counted from 0 along all kept axes",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(OptionError) as error:
        make()
    assert str(error.value) == message


def test_contexts_are_shown_as_coloured_text():
    class Tokenizer:
        def decode(self, ids):
            return "".join(f"<{token}>" for token in ids)

    values = torch.tensor([[[1.0, 0.0], [3.0, 5.0], [2.0, 0.0]]])
    top = seen(TopK(2, context=1, decode=Tokenizer()), values, tokens=_tokens(1, 3))
    assert repr(top.show()) == (
        "feature 0\n          3  '<0><1><2>'\n          2  '<1><2>'\n"
        "feature 1\n          5  '<0><1><2>'\n          0  '<0><1>'"
    )
    assert repr(top.show(1, decode=lambda token: "abc"[token], most=1)) == (
        "feature 1\n          5  'abc'"
    )
    shown = top._repr_html_()
    assert '<span title="3" style="white-space:pre-wrap;background:rgba(230,120,0,0.50)">' in shown
    assert "&lt;1&gt;" in shown
    assert top.empty().decode is top.decode


def test_spaces_between_tokens_are_those_of_the_tokenizer():
    class Words:
        def decode(self, ids):
            return " ".join(["the", "cat", "sat"][token] for token in ids).replace(
                "cat sat", "cats"
            )

    values = torch.tensor([[[1.0], [3.0], [2.0]]])
    top = seen(TopK(1, context=1), values, tokens=_tokens(1, 3))
    assert top.show(0, decode=Words())._lines[0][0][1].tokens == ("the", " cat", "s")


def test_tokens_that_change_the_text_before_them_are_decoded_alone():
    class Backwards:
        def decode(self, ids):
            return "".join(str(token) for token in reversed(ids))

    values = torch.tensor([[[1.0], [3.0], [2.0]]])
    top = seen(TopK(1, context=1), values, tokens=_tokens(1, 3))
    assert top.show(0, decode=Backwards())._lines[0][0][1].tokens == ("0", "1", "2")


def test_without_a_tokenizer_ids_are_shown():
    top = seen(TopK(1), torch.tensor([[[1.0], [3.0]]]), tokens=_tokens(1, 2, 9))
    assert repr(top.show(0)) == "feature 0\n          3  ' 19'"
    assert " 19" in top._repr_html_()
    assert observed(torch.ones(1, 1, 1)).tokens is None
