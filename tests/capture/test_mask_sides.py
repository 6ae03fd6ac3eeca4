"""Masks of models with an encoder and a decoder: each site has that of its side."""

import functools

import pytest
import torch
import transformers
from configs import PROPHET
from masked import OTHER, RIGHT
from models import GENERATION, VOCAB, bart, bridge, bridge_of, tokens

from actctx import OptionError, SelectionError, Site, capture

_bart = functools.cache(bart)


@functools.cache
def _bridge_of_bart():
    return bridge_of(bart())


@pytest.mark.parametrize(
    ("site", "mask"),
    [
        (Site("model.encoder.layers.1"), RIGHT),
        (Site("model.encoder.layers.1.self_attn.k_proj"), RIGHT),
        (Site("model.decoder.layers.1"), OTHER),
        (Site("model.decoder.layers.1.encoder_attn.q_proj"), OTHER),
        (Site("model.decoder.layers.1.encoder_attn.k_proj"), RIGHT),
        (Site("model.decoder.layers.1.encoder_attn.v_proj", io="in"), RIGHT),
        (Site("model.decoder.layers.1.encoder_attn.out_proj"), OTHER),
        (Site("model.decoder", io="in", output="encoder_hidden_states"), RIGHT),
        (Site("model", output="last_hidden_state"), OTHER),
        (Site("model", output="encoder_last_hidden_state"), RIGHT),
        (Site("lm_head"), OTHER),
        (Site("", output="logits"), OTHER),
        (Site("", output="encoder_last_hidden_state"), RIGHT),
        (Site("", io="in", output="input_ids"), RIGHT),
        (Site("", io="in", output="decoder_input_ids"), OTHER),
    ],
    ids=str,
)
def test_a_site_is_masked_by_the_mask_of_its_side(site, mask):
    """Encoder and decoder have as many positions, so that their number tells nothing."""
    model = _bart()
    axes = "batch pos" if (site.output or "").endswith("input_ids") else "batch pos width"
    site = Site(site.name, io=site.io, output=site.output, axes=axes)
    with capture(model, {"it": site}, mask="attention") as acts:
        model(
            input_ids=tokens(3, 7),
            attention_mask=RIGHT,
            decoder_input_ids=tokens(3, 7, seed=1),
            decoder_attention_mask=OTHER,
        )
    assert acts.positions("it").tolist() == mask.nonzero().tolist()


@pytest.mark.skipif(GENERATION < 4, reason="bridges before 4 cannot run BART")
@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("encoder_blocks.1.hook_out", RIGHT),
        ("decoder_blocks.1.hook_out", OTHER),
        ("decoder_blocks.0.cross_attn.q.hook_out", OTHER),
        ("decoder_blocks.0.cross_attn.k.hook_out", RIGHT),
        ("embed.hook_out", RIGHT),
        ("decoder_embed.hook_out", OTHER),
        ("unembed.hook_out", OTHER),
    ],
)
def test_a_hook_point_is_masked_by_the_mask_of_its_side(name, mask):
    model = _bridge_of_bart()
    axes = "batch pos head d_head" if "cross_attn" in name else "batch pos width"
    with capture(model, {"it": Site(name, axes=axes)}, mask="attention") as acts:
        model(
            tokens(3, 7),
            attention_mask=RIGHT,
            decoder_input_ids=tokens(3, 7, seed=1),
            decoder_attention_mask=OTHER,
        )
    assert acts.positions("it").tolist() == mask.nonzero().tolist()


def test_logits_of_a_decoder_without_a_mask_of_its_own_are_refused():
    model, site = bart(), Site("lm_head", axes="batch pos d_vocab")
    with pytest.raises(OptionError, match="uses the forward's decoder_attention_mask"):  # noqa: SIM117
        with capture(model, site, mask="attention"):
            model(tokens(3, 7), attention_mask=RIGHT, decoder_input_ids=tokens(3, 7))


class _Shared(torch.nn.Module):
    """A model whose two sides look up one table."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(VOCAB, 8)
        self.encoder, self.decoder = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, ids, attention_mask, decoder_input_ids, decoder_attention_mask):  # noqa: ARG002
        hidden = self.encoder(self.table(ids)).mean(1, keepdim=True)
        return self.decoder(self.table(decoder_input_ids)) + hidden


def test_what_both_sides_run_is_told_by_the_number_of_its_positions():
    model, site = _Shared(), Site("table", axes="batch pos d_model", firing=1)
    with capture(model, site, mask="attention") as acts:
        model(tokens(3, 7), RIGHT, tokens(3, 5), OTHER[:, :5])
    assert acts.positions("table").tolist() == OTHER[:, :5].nonzero().tolist()
    with pytest.raises(SelectionError) as caught, capture(model, site, mask="attention"):
        model(tokens(3, 7), RIGHT, tokens(3, 7), OTHER)
    assert str(caught.value) == (
        "'table' is run by both the encoder and the decoder, and its 7 positions do not determine "
        "which one; give a decoder_attention_mask and sequences of another length, or capture from "
        "a module of one of them"
    )


def test_bridges_tell_the_sides_of_models_without_sides():
    from actctx._model.places import Places
    from actctx._model.sides import side_of

    model = bridge("LlamaForCausalLM")
    places = Places(model)
    assert {side_of(places[name], model) for name in model.hook_dict} == {None}


ENCODER = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
DECODER = torch.tensor([[1] * 6, [1, 1, 1, 1, 1, 0]])


@pytest.mark.parametrize("name", ["encoder.layers.1", "decoder.layers.1.cross_attn.key_proj"])
def test_the_side_of_a_site_is_told_by_whose_positions_it_grows_with(name):
    torch.manual_seed(0)
    model = transformers.ProphetNetModel(transformers.ProphetNetConfig(**PROPHET)).eval()
    ids = tokens(2, 6)
    with capture(model, name, mask="attention") as acts:
        model(
            ids,
            attention_mask=ENCODER,
            decoder_input_ids=ids,
            decoder_attention_mask=DECODER,
        )
    assert acts.positions(name)[:, 0].bincount().tolist() == [4, 6]  # the encoder's tokens
