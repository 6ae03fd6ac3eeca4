"""Inputs that do not fit the model, and models that do not fit an extraction."""

import numpy as np
import pytest
import torch
import transformers
from configs import SIZES, VOCAB
from extracted import RESID, Read, refusal
from models import bridge, huggingface, tokens
from torch import nn

from actctx import (
    AxisError,
    DataError,
    OptionError,
    Site,
)
from actctx.extract import extract

BLOCK = Site("block", axes="batch pos d")


# What is no input of this model.


@pytest.mark.parametrize(("worst", "ids"), [(50, [3, 50]), (-100, [-100, 3])])
@pytest.mark.parametrize("build", [huggingface, bridge])
def test_ids_that_the_model_does_not_know_are_refused(out, build, worst, ids):
    model = build("GPT2LMHeadModel")
    assert refusal(DataError, model, [[1], ids], "blocks.0.hook_resid_post", out) == (
        f"from sequence 1 on, the input holds the token id {worst}, but the model knows those from "
        "0 to 49; give the ids of its own tokenizer"
    )


@pytest.mark.parametrize("data", [[1, 2, 3], torch.arange(3), np.arange(3)])
def test_one_sequence_is_no_input(mlp, out, data):
    assert refusal(DataError, mlp, data, BLOCK, out) == (
        "data holds single numbers, like one sequence of token ids; give a list of sequences, such "
        "as [data]"
    )


def test_splits_and_tables_are_no_input(gpt2, out):
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    rows = [{"input_ids": [1, 2]}]
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(rows))
    message = refusal(DataError, gpt2, splits, RESID, out)
    assert message.endswith("give one split, such as data['train']")
    message = refusal(DataError, gpt2, pandas.DataFrame(rows), RESID, out)
    assert message.endswith("give its rows, data.to_dict('records')")
    extract(gpt2, pandas.DataFrame(rows).to_dict("records"), RESID, out)


def test_what_a_tokenizer_gives_is_told_to_be_filled_up(gpt2, out):
    given = {"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]]}
    ragged = transformers.BatchEncoding(given)
    assert refusal(DataError, gpt2, ragged, RESID, out) == (
        "data is one BatchEncoding, not an iterable of inputs; give a list, such as [data]"
    )
    message = refusal(DataError, gpt2, [ragged], RESID, out)
    assert message.startswith("from sequence 0 on, the input holds a batch of sequences of 1 to 2 ")
    filled = {"input_ids": [[1, 2], [3, 0]], "attention_mask": [[1, 1], [1, 0]]}
    extract(gpt2, [transformers.BatchEncoding(filled)], RESID, out)
    assert Read(out)["token"] == [1, 2, 3]


@pytest.mark.parametrize("batch", [["one", "two"], {"text": ["one", "two"]}])
def test_batches_of_texts_are_refused(gpt2, out, batch):
    assert refusal(DataError, gpt2, [batch], RESID, out) == (
        "from sequence 0 on, the input holds a list of texts; give single texts, such as "
        "itertools.chain.from_iterable(data), which are batched here"
    )


def test_a_mask_that_nothing_reads_is_refused(gpt2, out):
    batch = {"input_ids": tokens(2), "attn_mask": torch.ones(2, 7)}
    assert refusal(DataError, gpt2, [batch], RESID, out) == (
        "data holds 'attn_mask', which is not used, and no 'attention_mask'; name it "
        "'attention_mask' if it marks padding, give mask='attn_mask' if it marks the tokens that "
        "become rows, or leave it out"
    )


def test_a_mask_is_of_0_and_1(gpt2, out):
    batch = {"input_ids": tokens(2), "attention_mask": torch.full((2, 7), -1.0)}
    assert refusal(DataError, gpt2, [batch], RESID, out) == (
        "'attention_mask' has values other than 0 and 1; give 1 for each token that is not padding"
    )


def test_a_context_cuts_no_batches(gpt2, out):
    assert refusal(OptionError, gpt2, tokens(), RESID, out, context=4) == (
        "context= cuts sequences, but data holds batches; give texts or sequences of token ids "
        "instead"
    )


@pytest.mark.parametrize("name", ["a.b", "a/b", "", 3])
@pytest.mark.usefixtures("unchecked")
def test_names_that_no_column_has_are_not_carried(mlp, out, name):
    assert refusal(OptionError, mlp, tokens(), BLOCK, out, carry=[name]) == (
        f"carry names {name!r}, which cannot be the name of a column; rename it to a string "
        "without . / `"
    )


class Dropping(nn.Module):
    def __init__(self, *, functional):
        super().__init__()
        self.block = nn.Embedding(50, 8)
        if functional:
            self.attention_dropout = 0.25
        else:
            self.drop = nn.Dropout(0.25)

    def forward(self, ids):
        return self.block(ids)


@pytest.mark.parametrize("functional", [True, False])
def test_a_model_that_drops_at_random_is_refused(out, functional):
    model = Dropping(functional=functional)
    assert refusal(OptionError, model, [tokens()], BLOCK, out) == (
        f"the model is in training mode, in which {'it' if functional else 'drop'!r} drops at "
        "random (p=0.25), so each run yields other activations; call model.eval() first"
    )
    assert extract(model.eval(), [tokens()], BLOCK, out).rows == 21


def test_positions_of_roberta_begin_behind_its_padding(out):
    config = transformers.RobertaConfig(**SIZES, vocab_size=VOCAB, max_position_embeddings=20)
    model = transformers.RobertaModel(config).eval()
    done = extract(model, [[5] * 30], Site("encoder.layer.0", axes="batch pos d"), out)
    assert (done.rows, done.cut) == (18, 12)


@pytest.mark.parametrize("options", [{}, {"slice": {"pos": -1}}])
def test_a_site_whose_axes_nothing_tells_leaves_no_rows(out, options):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(AxisError) as refused:
        extract(model, tokens(), "0", out, **options)
    assert str(refused.value) == (
        "a data set has one row per token, but '0' has no 'batch' and 'pos' axes to find them by: "
        "its axes are not known; name them with Site(axes='batch pos ...'), or leave it out"
    )
    assert not out.exists()
