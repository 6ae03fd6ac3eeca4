"""What `extract` refuses: sites, inputs and options before any forward, values as they come."""

import pytest
import torch
from extracted import RESID, Read, Z, refusal
from models import Poisoned, tokens
from torch import nn

from actctx import DataError, HookNameError, NeverFiredError, OptionError, SelectionError, Site
from actctx.extract import extract


def test_no_sites_are_refused(gpt2, out):
    message = refusal(HookNameError, gpt2, tokens(), [], out)
    assert message.startswith("no hook point was requested: the names are empty")


def test_object_stores_are_not_written_to(gpt2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(DataError, gpt2, tokens(), RESID, "s3://bucket/a.lance") == (
        "cannot write to 's3://bucket/a.lance': object stores cannot be written to; write to a "
        "local path, and upload the result"
    )
    assert not [*tmp_path.iterdir()]


def test_what_is_refused_leaves_nothing_at_its_path(gpt2, out):
    refusal(DataError, gpt2, [], RESID, out)
    assert not out.exists()
    out.mkdir()
    refusal(DataError, gpt2, [], RESID, out)
    assert not [*out.iterdir()]


def test_an_empty_input_is_refused(gpt2, out):
    assert refusal(DataError, gpt2, [], RESID, out) == (
        "data is empty, so there is nothing to run; give some input"
    )


def test_an_input_without_rows_is_refused(gpt2, out):
    assert refusal(DataError, gpt2, tokens(), RESID, out, drop={"position": range(7)}) == (
        "the input leaves no rows: it has no sequences, or all of its tokens are padding or "
        "dropped; keep some"
    )


def test_a_slice_that_leaves_no_rows_is_named(gpt2, out):
    assert refusal(DataError, gpt2, tokens(), RESID, out, slice={"pos": slice(0)}) == (
        "the input leaves no rows: slice= selects none of the remaining tokens; give another"
    )


def test_one_text_is_no_input(gpt2, out):
    assert refusal(DataError, gpt2, "one", RESID, out) == (
        "data is one str, not an iterable of inputs; give a list, such as [data]"
    )


def test_texts_need_a_tokenizer(llama, out):
    assert refusal(OptionError, llama, ["one"], "blocks.0.hook_resid_post", out) == (
        "data holds texts, and the model has no tokenizer; give tokenizer="
    )


def test_ragged_batches_are_refused(gpt2, out):
    message = refusal(DataError, gpt2, iter([tokens(), [[1, 2], [3]]]), RESID, out)
    assert message == (
        "from sequence 3 on, the input holds a batch of sequences of 1 to 2 tokens; pad them to "
        "one length, with an attention_mask, as tokenizer(..., padding=True) does, or give single "
        "sequences, which are batched here"
    )
    assert len(Read(out)) == 21


def test_token_ids_are_integers(gpt2, out):
    assert refusal(DataError, gpt2, [torch.rand(2, 3)], RESID, out) == (
        "from sequence 0 on, the input holds a tensor of float32 (2, 3), which are not token ids; "
        "give integers"
    )


def test_dicts_without_tokens_are_refused(gpt2, out):
    assert refusal(DataError, gpt2, [{"ids": tokens()}], RESID, out) == (
        "data holds dicts of 'ids', none of which is input_ids, tokens or text; rename the entry "
        "with the tokens"
    )


def test_sites_have_the_same_rows(gpt2, out):
    names = [Site(RESID, slice={"pos": -1}), Site(Z, slice={"pos": 0})]
    assert refusal(OptionError, gpt2, tokens(), names, out) == (
        f"'{Z}' selects other positions than '{RESID}', but all sites need the same rows; give "
        "them one slice along 'pos', or a data set each"
    )


def test_a_sequence_without_the_position_is_refused(gpt2, out):
    message = refusal(SelectionError, gpt2, tokens(), RESID, out, slice={"pos": 9})
    assert "in sequence 0" in message


def test_names_of_columns_are_not_taken_twice(gpt2, out):
    assert refusal(OptionError, gpt2, tokens(), {"token": RESID}, out) == (
        "'token' is the name of another column; give the site an alias, as in {'resid': ...}, or "
        "rename the carried entry"
    )


@pytest.mark.parametrize("name", ["_rowid", "_row_created_at_version", "_input", "sequence"])
def test_names_of_lances_columns_are_not_carried(gpt2, out, name):
    batch = {"input_ids": tokens(), name: [1, 2, 3]}
    ran = []
    hook = gpt2.register_forward_pre_hook(lambda *args: ran.append(args))
    message = refusal(OptionError, gpt2, [batch], RESID, out, carry=name)
    hook.remove()
    assert message.startswith(f"{name!r} is the name of another column; ")
    assert not ran


def test_a_site_and_what_is_carried_have_two_names(gpt2, out):
    batch = {"input_ids": tokens(), "resid": [1, 2, 3]}
    message = refusal(OptionError, gpt2, [batch], {"resid": RESID}, out, carry="resid")
    assert message.startswith("'resid' is the name of another column; ")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("path", [5, "a\0b", None, b"acts"])
def test_what_is_no_path_is_refused(gpt2, path):
    assert refusal(OptionError, gpt2, tokens(), RESID, path) == (
        f"{path!r} is not a path; give a string, or a pathlib.Path, without NUL characters"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0 is too small; give 1 or more"),
        ({"batch_size": 0}, "batch_size=0 is too small; give 1 or more"),
        (
            {"context": 65},
            "context=65 is more than the 64 tokens that the model reads; give 64 or less",
        ),
        (
            {"drop": {"id": [1]}},
            "drop names 'id'; give the ids of a 'token' or the numbers of a 'position' to leave "
            "out, such as drop={'position': [0]}",
        ),
        ({"drop": {"token": [-1]}}, "drop has [-1] for 'token'; give ints from 0 to 2**63 - 1"),
        (
            {"pack": True},
            "pack=True joins sequences, but data holds batches; give texts or sequences of token "
            "ids instead",
        ),
        (
            {"slice": {"d_model": slice(0)}},
            f"'{RESID}' has empty rows of the shape (0,); give a slice that selects something",
        ),
        (
            {"dtype": torch.float64},
            f"'{RESID}' yields float64, which a data set cannot store; give dtype= torch.float32, "
            "torch.float16 or torch.bfloat16",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(gpt2, out, options, message):
    assert refusal(OptionError, gpt2, tokens(), RESID, out, **options) == message
    assert not out.exists()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("of_site", [True, False])
def test_a_dtype_is_no_string(gpt2, out, of_site):
    site, options = (Site(RESID, dtype="float16"), {}) if of_site else (RESID, {"dtype": "float16"})
    assert refusal(OptionError, gpt2, tokens(), site, out, **options) == (
        "dtype='float16' is not one of torch's floating-point dtypes; give one, such as "
        "torch.float16"
    )


def test_a_mask_that_is_named_is_there(gpt2, out):
    message = refusal(DataError, gpt2, [{"input_ids": tokens()}], RESID, out, mask="loss_mask")
    assert message == (
        "mask names 'loss_mask', but the input has no entry of that name; give dicts that have it, "
        "or 'attention' for all tokens that are not padding"
    )


def test_what_is_carried_is_there(gpt2, out):
    assert refusal(DataError, gpt2, [{"input_ids": tokens()}], RESID, out, carry=["label"]) == (
        "carry names 'label', but a batch of 3 sequences has nothing under that name; give one "
        "value for each sequence"
    )


class Half(nn.Module):
    """Has parts that its forward does not call."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(1, 4) for _ in range(3))

    def forward(self, ids):
        return self.first(ids[..., None].float())


@pytest.mark.parametrize("names", [["first", "second"], ["second"]])
def test_a_site_that_never_fires_is_named_before_anything_is_written(out, names):
    sites = [Site(name, axes="batch pos d") for name in names]
    assert refusal(NeverFiredError, Half(), tokens(), sites, out) == (
        "'second' never fired in 1 forward: the forwards did not call this module, or only its "
        ".forward, which skips hooks"
    )
    assert not out.exists()


def test_a_pattern_of_which_nothing_fires_is_refused(out):
    message = refusal(NeverFiredError, Half(), tokens(), Site("[st]*d", axes="batch pos d"), out)
    assert message.startswith("'second', 'third' never fired in 1 forward: the forwards did not ")
    assert not out.exists()


def test_a_site_that_fires_no_more_is_refused_with_its_row(out):
    class Once(Half):
        def forward(self, ids):
            return super().forward(ids) if ids[0, 0] else ids

    ids = torch.tensor([[[1, 2]], [[0, 3]]])
    site = Site("first", axes="batch pos d")
    assert refusal(DataError, Once(), [*ids], site, out) == (
        "'first' did not fire in the forward after row 2, so its rows would be missing; leave it "
        "out"
    )
    assert len(Read(out)) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_with_its_row(out, value):
    site = Site("embed", axes="batch pos d")
    ids = torch.tensor([[1, 2, 3], [4, 7, 5]])
    assert refusal(DataError, Poisoned(value), [ids[:1], ids[1:]], site, out) == (
        f"'embed' is {value} in row 4: token 7 of sequence 1, position 1; finite=False writes it "
        "as it is"
    )
    assert len(Read(out)) == 3


@pytest.mark.parametrize(("value", "ends"), [(1e6, True), (float("nan"), False)])
def test_what_float16_cannot_hold_is_refused_with_what_can(out, value, ends):
    site = Site("embed", axes="batch pos d")
    ids = torch.tensor([[4, 7, 5]])
    message = refusal(DataError, Poisoned(value), [ids], site, out, dtype=torch.float16)
    assert ("float16 ends at 65504, but dtype=torch.bfloat16 has a larger range" in message) == ends


def test_a_row_of_one_number_is_held_against_what_is_finite(out):
    site = Site("embed", axes="batch pos d", slice={"d": 0})
    ids = torch.tensor([[1, 2, 3], [4, 7, 5]])
    model = Poisoned(float("nan"))
    message = refusal(DataError, model, [ids], site, out)
    assert message.startswith("'embed' is nan in row 4: token 7 of sequence 1, position 1; ")
    extract(model, [ids], site, out, finite=False)
    assert Read(out)["embed"].shape == (6,)


def test_rows_that_differ_in_length_are_refused(gpt2, out):
    pattern = "blocks.0.attn.hook_pattern"
    message = refusal(DataError, gpt2, [tokens(), tokens(2, 5)], pattern, out)
    assert message == (
        f"'{pattern}' has rows of float32 (4, 5) from row 21 on, but those before are float32 "
        "(4, 7); give input of one length, or select what is alike with slice="
    )
    assert len(Read(out)) == 21
