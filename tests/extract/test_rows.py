"""Which rows an input leaves: pooled ones, slices that leave none, numbers that are kept."""

import numpy as np
import pytest
import torch
from extracted import RESID, Read, refusal, resid, sequences
from models import bridge, huggingface, plainly_hooked, tokens
from torch import nn

from actctx import (
    ActctxError,
    DataError,
    OptionError,
    SelectionError,
    Site,
)
from actctx.extract import extract

BLOCK = Site("block", axes="batch pos d")


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
        "the attention mask of sequence 0 has a gap, and single sequences run without the tokens "
        "that it excludes; give it in a batch, which runs as it is"
    )


def test_what_a_misspelt_carry_could_have_been_is_listed(gpt2, out):
    rows = [{"input_ids": [1, 2], "label": 1}]
    assert refusal(DataError, gpt2, rows, RESID, out, carry=["labl"]) == (
        "carry names 'labl', but sequence 0 of the input has no entry of that name, only "
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
        "'waves' yields complex64, but a data set stores floating-point numbers, bools, signed "
        "integers of up to 64 bits, and unsigned ones of 8 bits; leave the site out, or keep it in "
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
