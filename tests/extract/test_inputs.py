"""What `extract` reads: which tokens a model is given of an input, and what beside them."""

import numpy as np
import pytest
import torch
from extracted import RESID, Read, refusal, resid
from models import bridge, huggingface, tokens
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from actctx import (
    DataError,
    OptionError,
    Site,
)
from actctx.extract import extract

BLOCK = Site("block", axes="batch pos d")


@pytest.fixture(params=["plain", "bridge", "compiled"])
def bert(request):
    if request.param == "bridge":
        return bridge("BertForMaskedLM")
    model = huggingface("BertForMaskedLM")
    return torch.compile(model, backend="eager") if request.param == "compiled" else model


class Given(nn.Module):
    """Keeps what its forward is given beside the tokens."""

    def __init__(self):
        super().__init__()
        self.block = nn.Embedding(50, 8)
        self.given = []

    def forward(self, ids, attention_mask=None, token_type_ids=None, label=None):
        self.given.append((attention_mask, token_type_ids, label))
        return self.block(ids)


# Which tokens.


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (DataLoader(TensorDataset(tokens(4), torch.ones(4, 7)), batch_size=2), "list"),
        ([[tokens(1)[0], tokens(1)[0]], [tokens(1)[0], tokens(1)[0]]], "list"),
        ([(tokens(2), tokens(2))], "tuple"),
        ([(tokens(2).numpy(), tokens(2).numpy())], "tuple"),
    ],
)
def test_tensors_that_do_not_say_what_they_are_are_refused(gpt2, out, data, kind):
    assert refusal(DataError, gpt2, data, RESID, out) == (
        f"data holds a {kind} of 2 tensors without names; give dicts of input_ids and the others, "
        "such as attention_mask"
    )


@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
def test_a_list_of_scalars_is_a_sequence(mlp, out, kind):
    given = [[kind(3), kind(4)], [kind(5)]]
    extract(mlp, given, BLOCK, out)
    assert Read(out)["token"] == [3, 4, 5]


def test_batches_that_are_read_into_one_tensor_are_told_apart(gpt2, out):
    batch = {"input_ids": tokens(2), "attention_mask": torch.ones(2, 7, dtype=torch.bool)}
    wanted = [tokens(2, seed=seed) for seed in range(6)]

    def refill():
        for ids in wanted:
            batch["input_ids"].copy_(ids)
            yield batch
            batch["attention_mask"].zero_()
            batch["attention_mask"][:] = True

    extract(gpt2, refill(), RESID, out)
    read = Read(out)
    assert read["token"] == torch.cat(wanted).flatten().tolist()
    assert torch.equal(read[RESID], torch.cat([resid(gpt2, ids).flatten(0, 1) for ids in wanted]))


def test_what_forwards_are_given_is_not_read_over(out):
    model, types = Given(), torch.zeros(1, 3, dtype=torch.long)

    def refill():
        for number in range(6):
            types.fill_(number)
            yield {"input_ids": tokens(1, 3), "token_type_ids": types}

    extract(model, refill(), BLOCK, out)
    assert [int(types[0, 0]) for _, types, _ in model.given] == [*range(6)]


def test_sequences_that_are_read_into_one_tensor_are_told_apart(mlp, out):
    buffer = torch.zeros(3, dtype=torch.long)

    def refill():
        for number in range(5):
            buffer.fill_(number)
            yield buffer

    extract(mlp, refill(), BLOCK, out)
    assert Read(out)["token"] == [number for number in range(5) for _ in range(3)]


@pytest.mark.parametrize("name", ["tokens", "input_ids"])
def test_the_tokens_are_given_once(out, name):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Embedding(50, 8)

        def forward(self, tokens):
            return self.block(tokens)

    extract(Plain(), [{name: tokens(2), "tokens": tokens(2)}], BLOCK, out)
    assert Read(out)["token"] == tokens(2).flatten().tolist()


def test_a_column_that_is_named_as_the_tokens_of_a_forward_is_not_given(mlp, out):
    extract(mlp, [{"input_ids": tokens(2), "ids": tokens(2, seed=1)}], BLOCK, out)
    assert Read(out)["token"] == tokens(2).flatten().tolist()


# What else.


def typed(model, ids, **given):
    with torch.no_grad():
        model = getattr(model, "original_model", model)
        return model(ids, output_hidden_states=True, **given).hidden_states[1]


SECOND = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
FIRST = "blocks.0.hook_resid_post"


@pytest.mark.thorough
def test_batches_give_a_forward_all_that_it_takes(bert, out):
    ids = tokens(2)
    extract(bert, [{"input_ids": ids, "token_type_ids": SECOND}], FIRST, out)
    other = typed(bert, ids).flatten(0, 1)
    wanted = typed(bert, ids, token_type_ids=SECOND).flatten(0, 1)
    read = Read(out)[FIRST]
    torch.testing.assert_close(read, wanted, atol=1e-5, rtol=0)
    assert not torch.allclose(read, other, atol=1e-5)


@pytest.mark.thorough
def test_sequences_give_a_forward_what_has_an_entry_for_each_token(bert, out):
    ids = tokens(2)
    rows = [
        {"input_ids": ids[0].tolist(), "token_type_ids": SECOND[0].tolist()},
        {"input_ids": ids[1, :5].tolist(), "token_type_ids": SECOND[1, :5].tolist()},
    ]
    extract(bert, rows, FIRST, out)
    wanted = [
        typed(bert, ids[:1], token_type_ids=SECOND[:1])[0],
        typed(bert, ids[1:, :5], token_type_ids=SECOND[1:, :5])[0],
    ]
    torch.testing.assert_close(Read(out)[FIRST], torch.cat(wanted), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_wrapper_gives_the_model_within_what_that_takes(out):
    peft = pytest.importorskip("peft")
    model = huggingface("BertForMaskedLM")
    given = peft.LoraConfig(target_modules=["query"])
    wrapped = peft.PeftModel(model, given).eval()
    name = next(name for name, _ in wrapped.named_modules() if name.endswith("layer.0"))
    ids = tokens(2)
    extract(
        wrapped,
        [{"input_ids": ids, "token_type_ids": SECOND, "words": "no"}],
        Site(name, axes="batch pos d"),
        out,
    )
    wanted = typed(model, ids, token_type_ids=SECOND).flatten(0, 1)
    torch.testing.assert_close(Read(out)[name], wanted, atol=1e-5, rtol=0)


def wrapped(how):
    model = huggingface("GPT2LMHeadModel")
    if how == "compiled":
        return torch.compile(model, backend="eager")
    if how == "parallel":
        return nn.DataParallel(model)
    if how == "peft":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
        return peft.get_peft_model(model, config).eval()
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["plain", "compiled", "parallel", "peft"])
@pytest.mark.parametrize("asked", [None, True])
def test_no_cache_is_made_unless_the_input_asks_for_it(out, how, asked):
    model, seen = wrapped(how), []
    (inner,) = (each for each in model.modules() if type(each).__name__ == "GPT2Model")
    inner.h[1].register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    name = next(name for name, each in model.named_modules() if each is inner.h[1])
    batch = {"input_ids": tokens(2), **({} if asked is None else {"use_cache": asked})}
    site = Site(name.removeprefix("_orig_mod."), axes="batch pos d")
    extract(model, [batch], site, out)
    assert [each is None for each in seen] == [asked is None]


def test_a_model_of_transformer_lens_sees_to_its_cache_itself(gpt2, out):
    seen = []
    handle = gpt2.register_forward_pre_hook(lambda *args: seen.append(args[2]), with_kwargs=True)
    extract(gpt2, tokens(2), RESID, out)
    handle.remove()
    assert [{*given} for given in seen] == [{"attention_mask"}]


def test_what_has_no_entry_for_each_token_is_refused(out):
    rows = [{"input_ids": [1, 2, 3], "token_type_ids": [0, 1]}]
    assert refusal(DataError, Given(), rows, BLOCK, out) == (
        "sequence 0 of the input has a tensor of int64 (2,) under 'token_type_ids', which the "
        "model's forward takes, but 3 tokens; give one entry for each token, or batches, or leave "
        "it out"
    )


def test_what_only_some_sequences_have_is_refused(out):
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2], "token_type_ids": [0, 1]}]
    assert refusal(DataError, Given(), rows, BLOCK, out) == (
        "sequence 1 of the input has 'token_type_ids', which the model's forward takes, but "
        "sequence 0 does not; give it to all or none"
    )


def test_what_a_forward_takes_is_not_joined(out):
    rows = [{"input_ids": [1, 2], "token_type_ids": [0, 1]}]
    assert refusal(OptionError, Given(), rows, BLOCK, out, pack=True, context=2) == (
        "pack=True joins sequences, but they come with 'token_type_ids', which the model's forward "
        "takes; leave it out, or give pack=False"
    )


def test_the_mask_that_is_named_is_given_to_the_model_too(gpt2, out):
    ids, mask = tokens(2), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    batch = {"input_ids": ids, "attention_mask": mask}
    extract(gpt2, [batch], RESID, out, mask="attention_mask")
    wanted = resid(gpt2, ids, attention_mask=mask)[mask.bool()]
    assert torch.equal(Read(out)[RESID], wanted)


@pytest.mark.parametrize("form", [torch.Tensor.tolist, torch.Tensor.numpy])
def test_a_batch_is_a_dict_of_lists_or_arrays(gpt2, out, form):
    ids, mask = tokens(2), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    batch = {"input_ids": form(ids), "attention_mask": form(mask), "n": form(torch.arange(2))}
    extract(gpt2, [batch], RESID, out, carry=["n"])
    read = Read(out)
    assert torch.equal(read[RESID], resid(gpt2, ids, attention_mask=mask)[mask.bool()])
    assert read["n"] == [0] * 5 + [1] * 7


def test_batches_of_a_hugging_face_dataset_are_an_input(gpt2, out):
    datasets = pytest.importorskip("datasets")
    rows = [{"input_ids": ids.tolist(), "attention_mask": [1] * 7} for ids in tokens(6)]
    extract(gpt2, datasets.Dataset.from_list(rows).iter(4), RESID, out)
    assert torch.equal(Read(out)[RESID], resid(gpt2, tokens(6)).flatten(0, 1))


# What comes along.


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "is None; give a value of the same type as the others, such as -1"),
        (2**63, "is 9223372036854775808, which takes more than 64 bits; give it as a string"),
        (
            torch.arange(2),
            "is a tensor of int64 (2,); give one value for each sequence, a number or a string",
        ),
        ([1], "is a list; give one value for each sequence, a number or a string"),
    ],
)
def test_what_makes_no_column_is_not_carried(mlp, out, value, message):
    rows = [{"input_ids": [1, 2], "id": 7}, {"input_ids": [1, 2], "id": value}]
    assert refusal(DataError, mlp, rows, BLOCK, out, carry=["id"]) == (
        f"carry names 'id', which in sequence 1 of the input {message}"
    )


def test_a_string_is_not_carried_letter_by_letter(mlp, out):
    batch = {"input_ids": tokens(3), "id": "abc"}
    assert refusal(DataError, mlp, [batch], BLOCK, out, carry=["id"]) == (
        "carry names 'id', but a batch of 3 sequences has a str under that name; give one value "
        "for each sequence"
    )


# What is no input.


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("data", "kind"), [(5, "int"), (torch.tensor(5), "Tensor"), (np.array(5), "ndarray")]
)
def test_what_cannot_be_gone_through_is_no_input(mlp, out, data, kind):
    assert refusal(DataError, mlp, data, BLOCK, out) == (
        f"data is one {kind}, not an iterable of inputs; give a list of texts, or of sequences of "
        "token ids"
    )


@pytest.mark.parametrize("batch", [{"text": None}, None])
def test_a_text_that_is_not_there_is_refused(gpt2, out, batch):
    assert refusal(DataError, gpt2, [batch], RESID, out) == (
        "sequence 0 of the input has None for its tokens or its text; leave it out"
    )


def test_a_ragged_mask_is_refused(gpt2, out):
    batch = {"input_ids": tokens(2), "attention_mask": [[1] * 7, [1] * 6]}
    assert refusal(DataError, gpt2, [batch], RESID, out) == (
        "'attention_mask' holds a list, which is not a tensor; give one entry, 0 or 1, for each "
        "token"
    )
