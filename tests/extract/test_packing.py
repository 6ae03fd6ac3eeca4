"""Texts and sequences that run together: tokenizers, and padding that nobody attends to."""

import pytest
import torch
from extracted import RESID, Read, Words, refusal, sequences
from models import HAS_T5, Mlp, bridge, huggingface, tokens
from torch import nn

from actctx import (
    DataError,
    OptionError,
    SeveralFiringsError,
    Site,
)
from actctx.extract import extract

BLOCK = Site("block", axes="batch pos d")


@pytest.mark.parametrize(
    ("words", "stream"),
    [
        (Words(), [1, 2, 9, 3, 4, 9, 5]),
        (Words(first="9 "), [9, 1, 2, 9, 3, 4, 9, 5]),
        (Words(last=" 9"), [1, 2, 9, 3, 4, 9, 5, 9]),
    ],
)
def test_one_token_parts_texts(mlp, out, words, stream):
    texts = ["1 2", "3 4", "", "5"] if not words.first + words.last else ["1 2", "3 4", "5"]
    extract(mlp, texts, BLOCK, out, tokenizer=words, pack=True, context=4)
    assert Read(out)["token"] == stream


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            lambda texts: [[1] for _ in texts],
            "the tokenizer returned a list without 'input_ids'; give one that returns a dict of "
            "them, such as AutoTokenizer.from_pretrained(...)",
        ),
        (
            lambda texts: {"ids": [[1] for _ in texts]},
            "the tokenizer returned a dict without 'input_ids'; give one that returns a dict of "
            "them, such as AutoTokenizer.from_pretrained(...)",
        ),
        (
            lambda texts: {"input_ids": [[1] for _ in texts[1:]]},
            "the tokenizer returned 1 sequence for 2 texts; give one that returns one for each",
        ),
    ],
)
def test_what_is_no_tokenizer_is_refused(mlp, out, words, message):
    assert refusal(OptionError, mlp, ["1 2", "3"], BLOCK, out, tokenizer=words) == message


def test_a_tokenizer_need_not_take_more_than_texts(mlp, out):
    def words(texts):
        return {"input_ids": [[*map(int, text.split())] for text in texts]}

    extract(mlp, ["1 2", "3"], BLOCK, out, tokenizer=words)
    assert Read(out)["token"] == [1, 2, 3]


def test_a_tokenizer_says_nothing_of_long_texts(mlp, out):
    given = []

    def words(texts, *, verbose=True):
        given.append(verbose)
        return {"input_ids": [[1] for _ in texts]}

    extract(mlp, ["1 2", "3"], BLOCK, out, tokenizer=words)
    assert given == [False]


def test_token_ids_are_joined_as_they_are(mlp, out):
    extract(mlp, sequences(), BLOCK, out, tokenizer=Words(), pack=True, context=16)
    assert Read(out)["token"] == torch.cat(sequences()).tolist()


@pytest.mark.parametrize(
    ("first", "then", "wanted"),
    [([1, 2], [0.5, 2.5], None), ([0.5, 2.5], [1, 2], [0.5, 2.5, 1, 2])],
)
def test_numbers_that_are_carried_stay_what_they_are(mlp, out, first, then, wanted):
    batches = [{"input_ids": tokens(2, 1), "n": numbers} for numbers in (first, then)]
    if wanted is None:
        assert refusal(DataError, mlp, batches, BLOCK, out, carry=["n"]) == (
            "carry names 'n', whose values were int64 so far, but are double in sequence 2 of the "
            "input or after it; give values of one type throughout"
        )
    else:
        extract(mlp, batches, BLOCK, out, carry={"n"})
        assert Read(out)["n"] == wanted


class Attending(nn.Module):
    """Mixes all positions, and takes a mask under a name, or none."""

    def __init__(self, name=None):
        super().__init__()
        self.name = name
        self.block = nn.Embedding(50, 8)

    def mixed(self, ids, mask):
        weights = torch.ones_like(ids) if mask is None else mask
        found = self.block(ids) * weights[..., None]
        return found.sum(1, keepdim=True).expand(-1, ids.shape[1], -1)


class Blind(Attending):
    def __init__(self):
        super().__init__()
        self.out = nn.Identity()

    def forward(self, ids):
        return self.out(self.mixed(ids, None))


class Masked(Blind):
    def forward(self, ids, one_zero_attention_mask=None):
        return self.out(self.mixed(ids, one_zero_attention_mask))


MIXED = Site("out", axes="batch pos d")


@pytest.mark.parametrize("model", [Blind(), Masked()])
def test_no_sequence_sees_the_padding_of_another(out, model):
    extract(model, [[1, 2, 3], [4, 5], [6, 7, 8]], MIXED, out)
    read = Read(out)
    for number, ids in enumerate(([1, 2, 3], [4, 5], [6, 7, 8])):
        rows = torch.tensor(read["sequence"]) == number
        with torch.no_grad():
            wanted = model(torch.tensor([ids]))[0]
        torch.testing.assert_close(read["out"][rows], wanted)


def test_padding_before_tokens_is_refused_where_the_model_takes_no_mask(out):
    batch = {"input_ids": tokens(2, 3), "attention_mask": [[1, 1, 1], [0, 1, 1]]}
    assert refusal(DataError, Blind(), [batch], MIXED, out) == (
        "from sequence 0 on, the input has padding before tokens, but the model's forward takes no "
        "attention mask, so tokens would attend to it; give equal_lengths=True, which runs "
        "sequences without padding, or single sequences"
    )
    extract(Masked(), [batch], MIXED, out)


@pytest.mark.parametrize("ones", [1, 2])
def test_padding_behind_tokens_is_warned_of_where_the_model_takes_no_mask(out, ones):
    whole = {"input_ids": tokens(2, 3), "attention_mask": [[1, 1, 1], [1, 1, 1]]}
    model = Blind()
    extract(model, [whole], MIXED, out)
    batch = {**whole, "attention_mask": [[1, 1, 1], [1] * ones + [0] * (3 - ones)]}
    with pytest.warns(UserWarning, match="takes no attention mask") as caught:
        extract(model, [whole, batch, batch], MIXED, out)
    assert [str(each.message) for each in caught] == [
        "the model's forward takes no attention mask, so tokens attend to the padding after them "
        "if it is not causal; give equal_lengths=True, which runs sequences without padding, or "
        "single sequences"
    ]
    assert Read(out)["position"] == [*range(3)] * 3 + [*range(ones), *range(3), *range(ones)]


@pytest.mark.parametrize("mask", ["attention", None])
def test_padding_of_single_sequences_is_left_out_whatever_the_mask(out, mask):
    row = {"input_ids": [1, 2, 0, 0], "attention_mask": [1, 1, 0, 0]}
    model = Masked()
    extract(model, [row], MIXED, out, mask=mask)
    with torch.no_grad():
        assert torch.equal(Read(out)["out"], model(torch.tensor([[1, 2]]))[0])


def test_a_mask_of_transformer_lens_leaves_padding_out(out):
    batch = {"input_ids": tokens(2, 3), "one_zero_attention_mask": [[1, 1, 0], [1, 1, 1]]}
    extract(Masked(), [batch], MIXED, out)
    assert Read(out)["position"] == [0, 1, 0, 1, 2]


@pytest.mark.skipif(not HAS_T5, reason="its bridge does not run")
@pytest.mark.parametrize("build", [huggingface, bridge])
def test_tokens_of_an_encoder_are_no_rows_of_its_decoder(out, build):
    model = build("T5ForConditionalGeneration")
    decoder = next(name for name, _ in model.named_modules() if name.startswith("decoder"))
    message = refusal(OptionError, model, tokens(2), Site(decoder, axes="batch pos d"), out)
    assert message.endswith(
        "belongs to the decoder, but a row is a token of the encoder's input; capture it with "
        "capture(), or extract from the decoder alone"
    )


def test_a_site_that_fires_several_times_is_asked_for_its_firing(out):
    model = Mlp(twice=True)
    sites = [BLOCK, Site("head", axes="batch pos d")]
    message = refusal(SeveralFiringsError, model, tokens(2), sites, out)
    assert message.endswith("a row has one of them: give Site(..., firing=0) for the first")
    sites[0] = Site("block", axes="batch pos d", firing=0)
    assert extract(model, tokens(2), sites, out).rows == 14


def test_padding_that_the_model_does_not_know_is_filled_with_what_it_does(gpt2, out):
    words = Words()
    words.pad_token_id = 50
    extract(gpt2, ["1 2 3", "4"], RESID, out, tokenizer=words)
    assert Read(out)["token"] == [1, 2, 3, 4]
