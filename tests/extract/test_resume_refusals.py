"""An extraction is not resumed with other inputs, another model or other options."""

import pytest
import torch
from extracted import RESID, Read, Z, batches, refusal
from models import Mlp, bridge, huggingface, other_weights, tokens
from resumed import unbroken

from actctx import DataError, Site
from actctx._extract.inputs import Batch
from actctx._model.fingerprint import describe_model
from actctx.extract import extract

# Inputs.


SENTENCES = [torch.tensor([[1, 2, 9], [3, 4, 9]]), torch.tensor([[5, 6, 9], [7, 8, 9]])]


OTHER = (
    "the rows on disk came from another input: row {row} is token 9 of sequence {row}, position 2 "
    "in both, but its sequence has other tokens, other arguments of the forward, or other carried "
    "values; give the same input in the same order, or another path"
)


@pytest.mark.parametrize(
    "options", [{"slice": -1}, {"pool": "mean"}, {"drop": {"token": range(9)}}]
)
def test_other_tokens_are_refused_where_they_leave_no_rows(options, out):
    extract(bridge(), SENTENCES[:1], RESID, out, **options)
    for add, site in ((False, RESID), (True, Z)):
        message = refusal(DataError, bridge(), SENTENCES[1:], site, out, add=add, **options)
        assert message == OTHER.format(row=0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"label": [0, 1]}, {"label": [0, 7]}),
        (
            {"label": [0, 0], "position_ids": torch.arange(3).expand(2, 3)},
            {"label": [0, 0], "position_ids": torch.tensor([[0, 1, 2], [2, 1, 0]])},
        ),
    ],
)
def test_other_labels_or_arguments_of_the_forward_are_another_input(first, second, out):
    one, other = ({"input_ids": SENTENCES[0], **more} for more in (first, second))
    model = huggingface("GPT2LMHeadModel")
    extract(model, [one], RESID, out, slice=-1, carry="label")
    message = refusal(DataError, model, [other], RESID, out, slice=-1, carry="label")
    assert message == OTHER.format(row=1)
    assert extract(model, [one, other], RESID, out, slice=-1, carry="label").rows == 4


def test_digests_tell_apart_what_is_given_in_any_shape():
    def digests(**given):
        return Batch(SENTENCES[0], None, torch.arange(2), given).digests.tolist()

    ways = [
        digests(),
        digests(scale=torch.tensor(2.0)),
        digests(scale=2.5),
        digests(bias=torch.ones(1, 3)),
        digests(bias=torch.ones(2, 3, dtype=torch.bfloat16) * 2),
    ]
    assert len({number for way in ways for number in way}) == 2 * len(ways)
    assert digests(attention_mask=torch.ones(2, 3)) == digests()


MASKED = {"input_ids": SENTENCES[0], "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
OTHERWISE = {**MASKED, "attention_mask": torch.tensor([[1, 0, 0], [1, 1, 1]])}


def test_another_mask_is_another_input_where_padding_leaves_rows(out):
    extract(bridge(), [MASKED], RESID, out, mask=None)
    for add, site in ((False, RESID), (True, Z)):
        message = refusal(DataError, bridge(), [OTHERWISE] * 2, site, out, mask=None, add=add)
        assert message.startswith(
            "the rows on disk came from another input: row 0 is token 1 of sequence 0, position 0 "
            "in both, but its sequence has other tokens, other arguments of the forward"
        )
    assert extract(bridge(), [MASKED] * 2, RESID, out, mask=None).new_rows == 6


def test_other_tokens_to_pool_are_another_input(out):
    rows = [{"input_ids": [1, 2, 9], "kept": kept} for kept in ([0, 1, 1], [1, 1, 1])]
    options = {"mask": "kept", "pool": "mean"}
    extract(bridge(), rows[:1], RESID, out, **options)
    message = refusal(DataError, bridge(), rows[1:], RESID, out, **options)
    assert message == OTHER.format(row=0)


def test_the_same_sequences_padded_otherwise_are_the_same_input(out):
    ids, mask = torch.tensor([[1, 2, 9, 0], [3, 4, 5, 9]]), torch.tensor([[1, 1, 1, 0], [1] * 4])
    extract(bridge(), [{"input_ids": ids, "attention_mask": mask}], RESID, out, slice=-1)
    longer = {"input_ids": torch.zeros(2, 6).long(), "attention_mask": torch.zeros(2, 6).long()}
    longer["input_ids"][:, :4], longer["attention_mask"][:, :4] = ids, mask
    assert extract(bridge(), [longer], RESID, out, slice=-1).new_rows == 0


def test_fewer_tokens_than_there_are_rows_are_refused(out):
    unbroken(out, 3)
    options = {"drop": {"position": [0]}, "max_tokens": 70}
    assert refusal(DataError, bridge(), batches(3), [RESID, Z], out, **options) == (
        f"'{out}' has 90 rows, more than max_tokens=70; give max_tokens=90 or more, or another path"
    )


def test_another_input_is_refused(out):
    unbroken(out, 3)
    other = batches(3)
    other[2][1, 4] = 0
    was = int(batches(3)[2][1, 4])
    message = refusal(DataError, bridge(), other, [RESID, Z], out, drop={"position": [0]})
    assert message == (
        f"the rows on disk came from another input: row 69 is token {was} of sequence 11, "
        "position 4 there, but token 0 of sequence 11, position 4 in the input; give the same "
        "input in the same order, or another path"
    )


def test_a_shorter_input_is_refused(out):
    unbroken(out, 3)
    message = refusal(DataError, bridge(), batches(2), [RESID, Z], out, drop={"position": [0]})
    assert message == (
        "the input leaves 60 rows, but 90 are already on disk, so they came from another input; "
        "give the same input, or another path"
    )


# Models and options.


def test_a_change_of_one_weight_is_refused(out):
    unbroken(out, 3)
    message = refusal(
        DataError, other_weights(), batches(), [RESID, Z], out, drop={"position": [0]}
    )
    assert message.startswith(
        f"cannot resume '{out}': its weight 'transformer.wte._original_component.weight' is '"
    )


class Named:
    """A tokenizer, of which only the name is looked at."""

    def __init__(self, name):
        self.name_or_path = name

    def __call__(self, texts, **_):
        raise AssertionError(texts)


def test_the_same_weights_and_tokens_from_another_path_go_on(out):
    for count, path in ((3, "gpt2"), (4, "/models/gpt2")):
        model = huggingface("LlamaForCausalLM")
        model.config._name_or_path = path
        site = {"resid": "blocks.0.hook_resid_post"}
        done = extract(model, batches(count), site, out, tokenizer=Named(path))
    assert done.rows == 4 * 35
    assert Read(out).layout.model["name"] == "gpt2"
    assert Read(out).layout.input["tokenizer"] == "gpt2"


def test_a_compiled_model_goes_on_where_it_was_not_compiled(out):
    site = {"resid": "blocks.0.hook_resid_post"}
    extract(huggingface("LlamaForCausalLM"), batches(3), site, out)
    compiled = torch.compile(huggingface("LlamaForCausalLM"), backend="eager")
    done = extract(compiled, batches(4), site, out)
    assert done.new_rows == 35


def test_parts_that_are_compiled_leave_the_fingerprint(mlp):
    before = describe_model(mlp)
    mlp.block = torch.compile(mlp.block, backend="eager")
    assert describe_model(mlp) == before
    assert describe_model(torch.compile(mlp, backend="eager")) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("offset", [1, 2, 3, 4])
def test_where_weights_lie_leaves_the_fingerprint(dtype, offset):
    model = torch.nn.Linear(4, 2).to(dtype)
    moved = torch.nn.Linear(4, 2)
    for name, weights in model.named_parameters():
        lies = torch.empty(weights.numel() + offset, dtype=dtype)
        lies[offset:] = weights.detach().flatten()
        setattr(moved, name, torch.nn.Parameter(lies[offset:].view_as(weights)))
    assert describe_model(moved) == describe_model(model)


def test_other_axes_are_refused(out, mlp):
    extract(mlp, batches(2), Site("block", axes="batch pos d"), out)
    site = Site("block", axes="batch pos neuron")
    assert refusal(DataError, mlp, batches(3), site, out) == (
        f"cannot resume '{out}': its list of axes of 'block' is ['d'], not ['neuron']; give the "
        "same, or another path"
    )
    assert Read(out).layout.finished


@pytest.mark.parametrize(
    ("was", "now", "shown"),
    [
        ({"io": "in"}, {"io": "out"}, "'in', not 'out'"),
        ({"firing": 0}, {"firing": 1}, "'out, firing 0', not 'out, firing 1'"),
        ({}, {"output": 0}, "'out', not 'out 0'"),
    ],
)
@pytest.mark.parametrize("add", [False, True])
def test_another_tensor_of_the_same_place_is_refused(out, was, now, shown, add):
    mlp = Mlp()
    first, second = ({"x": Site("block", axes="batch pos d", **each)} for each in (was, now))
    where, rest = out, "another path"
    extract(mlp, batches(2), first, out)
    if add:
        where, rest = out.with_name("acts.lance.adding"), "delete that directory"
        out.rename(where)
        extract(mlp, batches(2), Site("head", axes="batch pos d"), out)
    assert refusal(DataError, mlp, batches(2), second, out, add=add) == (
        f"cannot resume '{where}': its tensor of 'x' (io, output, firing) is {shown}; give the "
        f"same, or {rest}"
    )


@pytest.mark.parametrize(
    ("options", "names", "message"),
    [
        ({}, [RESID], f"list of sites is ['{RESID}', '{Z}'], not ['{RESID}']"),
        (
            {"dtype": torch.float16},
            [RESID, Z],
            f"dtype of '{RESID}' is 'float32', not 'float16'",
        ),
        (
            {"slice": {"head": 0}},
            [Site(RESID, slice={}), Z],
            f"slice of '{Z}' is '', not 'axis 2 0'",
        ),
        (
            {"slice": {"pos": -1}},
            [RESID, Z],
            f"slice of '{RESID}' is '', not 'token -1'",
        ),
        (
            {},
            {RESID: "blocks.0.hook_resid_post", Z: Z},
            f"hook of '{RESID}' is 'blocks.1.hook_out', not 'blocks.0.hook_out'",
        ),
        (
            {"drop": {"position": [1]}},
            [RESID, Z],
            "drop is {'position': [0]}, not {'position': [1]}",
        ),
    ],
)
def test_what_would_make_other_rows_is_refused(out, options, names, message):
    unbroken(out, 3)
    options = {"drop": {"position": [0]}, **options}
    assert refusal(DataError, bridge(), batches(), names, out, **options) == (
        f"cannot resume '{out}': its {message}; give the same, or another path"
    )
    assert len(Read(out)) == 90


def test_a_model_in_another_dtype_is_refused(out):
    site = {"resid": "blocks.0.hook_resid_post"}
    extract(huggingface("LlamaForCausalLM"), tokens(), site, out)
    model = huggingface("LlamaForCausalLM").bfloat16()
    message = refusal(DataError, model, tokens(), site, out)
    assert "is 'float32 (50, 32) " in message
    assert "', not 'bfloat16 (50, 32) " in message
