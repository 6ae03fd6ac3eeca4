"""What `extract` reads: which tokens a model is given of an input, and what beside them."""

import numpy as np
import pytest
import torch
import transformers
from extracted import RESID, Read, refusal, resid, sequences
from models import HAS_T5, Mlp, bridge, huggingface, plainly_hooked, tokens
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from actctx import (
    ActctxError,
    AxisError,
    DataError,
    OptionError,
    SelectionError,
    SeveralFiringsError,
    Site,
)
from actctx.extract import extract

BLOCK = Site("block", axes="batch pos d")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "acts.lance"


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
        f"data holds a {kind} of 2 tensors, which do not say what they are; give dicts of "
        "input_ids and what else there is, such as attention_mask"
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


# Packing.


class Words:
    """A tokenizer whose words are numbers."""

    eos_token_id, pad_token_id, name_or_path = 9, 0, "words"

    def __init__(self, *, first="", last=""):
        self.first, self.last = first, last

    def __call__(self, texts, **_):
        return {"input_ids": [[*map(int, (self.first + t + self.last).split())] for t in texts]}


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
        "attention mask, so that they would attend to it; give equal_lengths=True, which runs "
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
        "the model's forward takes no attention mask, so that tokens attend to the padding behind "
        "them if it is not causal; give equal_lengths=True, which runs sequences without padding, "
        "or single sequences"
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
        "is of the decoder, but a row is a token of what the encoder is given; capture it with "
        "capture(), or extract from the decoder by itself"
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


# Which rows.


def test_those_who_stop_early_are_not_left_with_the_longest(mlp, out):
    lengths = [1 + number % 50 for number in range(1000)]
    done = extract(mlp, [[1] * length for length in lengths], BLOCK, out, max_tokens=4000)
    numbers = {*Read(out)["sequence"]}
    found = sum(lengths[number] for number in numbers) / len(numbers)
    assert done.rows == 4000
    assert 15 < found < 36  # 25.5 of all; the longest alone have 46


def test_a_hole_in_the_mask_of_a_single_sequence_is_refused(gpt2, out):
    row = {"input_ids": [1, 2, 3, 4], "attention_mask": [1, 0, 1, 1]}
    assert refusal(DataError, gpt2, [row], RESID, out) == (
        "the attention mask of sequence 0 has a hole, and single sequences run without what it "
        "leaves out; give it in a batch, which runs as it is"
    )


def test_what_a_misspelt_carry_could_have_been_is_listed(gpt2, out):
    rows = [{"input_ids": [1, 2], "label": 1}]
    assert refusal(DataError, gpt2, rows, RESID, out, carry=["labl"]) == (
        "carry names 'labl', but sequence 0 of the input has nothing under that name, only "
        "'input_ids', 'label'; give dicts that have it"
    )


@pytest.mark.parametrize(
    ("how", "join"), [("mean", lambda rows: rows.mean(0)), ("max", lambda rows: rows.amax(0))]
)
def test_rows_of_a_sequence_are_pooled(gpt2, out, how, join):
    ids = tokens(3)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [1, 1, 1, 1, 0, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "label": ["a", "b", "c"]}
    options = {"pool": how, "drop": {"position": [0]}, "carry": "label"}
    done = extract(gpt2, [batch, batch], [RESID, "blocks.0.attn.hook_z"], out, **options)
    whole = resid(gpt2, ids, attention_mask=mask)
    wanted = [join(whole[0, 3:]), join(whole[1, 1:]), join(whole[2, 1:4])]
    read = Read(out)
    assert done.rows == len(read) == 6
    torch.testing.assert_close(read[RESID], torch.stack(wanted * 2), atol=1e-6, rtol=1e-5)
    assert read["blocks.0.attn.hook_z"].shape == (6, 4, 8)
    assert read["position"] == [4, 6, 3] * 2
    assert read["token"] == [int(ids[0, 6]), int(ids[1, 6]), int(ids[2, 3])] * 2
    assert read["sequence"] == [*range(6)]
    assert read["label"] == ["a", "b", "c"] * 2
    assert read.layout.rows == "sequence"
    assert read.layout.input["pool"] == how


def test_pooled_rows_are_counted_and_gone_on_with(gpt2, out):
    texts = sequences()
    extract(gpt2, texts, RESID, out, pool="mean", max_tokens=11)
    extract(gpt2, texts, RESID, out, pool="mean")
    whole = out.with_name("whole.lance")
    extract(gpt2, texts, RESID, whole, pool="mean")
    assert len(Read(out)) == 40
    assert torch.equal(Read(out)[RESID], Read(whole)[RESID])
    assert Read(out)["sequence"] == Read(whole)["sequence"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pooled_row_is_that_of_float32_rounded_once(gpt2, out, dtype):
    ids = tokens(3)
    extract(gpt2, ids, RESID, out, pool="mean", dtype=dtype)
    assert torch.equal(Read(out)[RESID], resid(gpt2, ids).mean(1).to(dtype))


def test_pooled_rows_of_another_dtype_are_not_gone_on_with(gpt2, out):
    extract(gpt2, tokens(3), RESID, out, pool="mean", max_tokens=2)
    message = refusal(DataError, gpt2, tokens(3), RESID, out, pool="mean", dtype=torch.float16)
    assert f"its dtype of '{RESID}' is 'float32', not 'float16'" in message


class OtherNumbers(nn.Module):
    """A module of which parts yield what is no floating-point number."""

    def __init__(self):
        super().__init__()
        self.bools, self.waves = nn.Identity(), nn.Identity()

    def forward(self, input_ids):
        spread = torch.stack([input_ids % 2, input_ids % 3], dim=-1)
        self.bools(spread > 0)
        return self.waves(torch.complex(spread.float(), spread.float()))


def test_means_of_bools_are_numbers(out):
    extract(OtherNumbers(), [[2, 3], [3, 3, 4, 6]], "bools", out, pool="mean")
    wanted = torch.tensor([[0.5, 0.5], [0.5, 0.25]])
    assert torch.equal(Read(out)["bools"][torch.tensor(Read(out)["sequence"]).argsort()], wanted)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_complex_numbers_are_refused_and_not_halved(out, dtype):
    message = refusal(OptionError, OtherNumbers(), [[2, 3]], "waves", out, pool="max", dtype=dtype)
    assert message == (
        "'waves' yields complex64, but a data set holds floating-point numbers, bools, and "
        "integers of up to 64 bits with a sign, or 8 without; leave the site out, or keep it in "
        "memory with capture()"
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("pool", ["sum", ["mean"]])
def test_ways_to_pool_are_these(gpt2, out, pool):
    assert refusal(OptionError, gpt2, tokens(), RESID, out, pool=pool) == (
        f"pool={pool!r} is not a way to pool; give 'mean', 'max' or None"
    )


@pytest.mark.parametrize("pos", [-1, 0])
def test_a_sequence_with_no_token_left_leaves_no_row(gpt2, out, pos):
    ids = tokens(3)
    ids[1] = 7
    extract(gpt2, ids, RESID, out, slice={"pos": pos}, drop={"token": [7]})
    assert Read(out)["sequence"] == [0, 2]


def test_errors_number_sequences_as_the_input_does(gpt2, out):
    texts = [[1, 2, 3, 4], [1, 2], [1, 2, 3, 4, 5]]
    message = refusal(SelectionError, gpt2, texts, RESID, out, slice={"pos": 3})
    assert message.startswith("in sequence 1, ")


@pytest.mark.parametrize(
    ("site", "options", "message"),
    [
        (
            BLOCK,
            {"slice": {"batch": 0}},
            "the slice of 'block' selects along 'batch', which a data set does not allow; leave "
            "the sequences out of data",
        ),
        (
            BLOCK,
            {"slice": {"pos": torch.tensor([True, False, True])}},
            "the slice of 'block' is a mask along 'pos', as long as one batch; give positions, or "
            "mask= the name of an entry of data",
        ),
    ],
)
def test_slices_that_make_no_rows_are_refused(mlp, out, site, options, message):
    with pytest.raises(ActctxError) as refused:
        extract(mlp, tokens(), site, out, **options)
    assert str(refused.value) == message


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.mean = nn.Embedding(50, 8), nn.Identity()

    def forward(self, ids):
        return self.mean(self.embed(ids).mean(1))


@pytest.mark.parametrize("options", [{}, {"slice": {"pos": -1}}], ids=str)
def test_what_has_no_positions_leaves_no_rows(out, options):
    with pytest.raises(ActctxError) as refused:
        extract(Pooled(), tokens(), "mean", out, **options)
    assert str(refused.value) == (
        "a data set has one row per token, but 'mean' has no axis 'pos': its axes are 'batch _'; "
        "leave it out"
    )


def test_cut_tokens_are_counted_where_they_ran(gpt2, out):
    texts = [[1] * 70, [2] * 80]
    assert extract(gpt2, texts, RESID, out, batch_size=1, max_tokens=64).cut == 6
    assert extract(gpt2, texts, RESID, out, batch_size=1).cut == 16


def test_tokens_that_a_model_flattens_are_rows_as_well(out):
    ids, name = tokens(4), "blocks.0.mlp.hook_post"
    extract(huggingface("OPTForCausalLM"), ids, name, out, slice={"pos": [0, 3]})
    hook = bridge("OPTForCausalLM").hook_dict[name].name
    wanted = plainly_hooked(bridge("OPTForCausalLM"), ids, hook)[hook][0]
    torch.testing.assert_close(Read(out)[name], wanted[:, [0, 3]].flatten(0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tokenizer": "gpt2"},
            "tokenizer='gpt2' cannot be called; give one that takes texts, such as "
            "AutoTokenizer.from_pretrained(...)",
        ),
        (
            {"drop": [0]},
            "drop=[0] does not say what the numbers are; give a dict, such as "
            "drop={'position': [0]}",
        ),
        (
            {"drop": {"position": None}},
            "drop has [None] for 'position'; give ints from 0 to 2**63 - 1",
        ),
        (
            {"drop": {"token": [2**63]}},
            f"drop has [{2**63}] for 'token'; give ints from 0 to 2**63 - 1",
        ),
        ({"carry": 5}, "carry=5 names nothing; give a list of names, such as ['label']"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_options_of_another_kind_are_refused(gpt2, out, options, message):
    assert refusal(OptionError, gpt2, tokens(), RESID, out, **options) == message


@pytest.mark.usefixtures("unchecked")
def test_numbers_of_numpy_are_numbers(gpt2, out):
    drop = {"position": np.array([0]), "token": []}
    options = {"max_tokens": np.int64(4), "batch_size": np.int32(2), "drop": drop}
    assert extract(gpt2, tokens(), RESID, out, **options).rows == 4
    assert Read(out).layout.input["drop"] == {"position": [0]}


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
        "data holds single numbers, as one sequence of token ids does; give a list of sequences, "
        "such as [data]"
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
        "itertools.chain.from_iterable(data), which are put into batches"
    )


def test_a_mask_that_nothing_reads_is_refused(gpt2, out):
    batch = {"input_ids": tokens(2), "attn_mask": torch.ones(2, 7)}
    assert refusal(DataError, gpt2, [batch], RESID, out) == (
        "data holds 'attn_mask', which nothing reads, and no 'attention_mask'; call it "
        "'attention_mask' where it tells padding, give mask='attn_mask' where it tells which "
        "tokens leave rows, or leave it out"
    )


def test_a_mask_is_of_0_and_1(gpt2, out):
    batch = {"input_ids": tokens(2), "attention_mask": torch.full((2, 7), -1.0)}
    assert refusal(DataError, gpt2, [batch], RESID, out) == (
        "'attention_mask' holds other values than 0 and 1; give 1 for each token that is not "
        "padding"
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
        f"carry names {name!r}, which no column can be called; rename it to a string without . / `"
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
        "random (p=0.25), so that each run leaves other activations; call model.eval() first"
    )
    assert extract(model.eval(), [tokens()], BLOCK, out).rows == 21


def test_positions_of_roberta_begin_behind_its_padding(out):
    config = transformers.RobertaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=50,
        max_position_embeddings=20,
    )
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
