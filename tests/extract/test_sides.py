"""Sites of models with an encoder and a decoder: which have the tokens of a data set."""

import pytest
import torch
import transformers
from extracted import Read, refusal
from models import GENERATION, HAS_T5, bart, bridge_of, hooked_config, huggingface, tokens
from torch import nn

from actctx import OptionError, Site
from actctx.extract import extract

OF_DECODERS = (
    " belongs to the decoder, but a row is a token of the encoder's input; capture it with "
    "capture(), or extract from the decoder alone"
)


def refused(model, site, out):
    return refusal(OptionError, model, tokens(2), site, out).endswith(OF_DECODERS)


@pytest.mark.parametrize(
    "site",
    [
        "lm_head",
        "model.decoder.layers.0",
        Site("model.decoder.embed_tokens", firing=0),
        Site("", output="logits"),
        Site("model", output="last_hidden_state"),
    ],
    ids=str,
)
def test_what_runs_on_a_decoders_tokens_is_refused(out, site):
    named = site if isinstance(site, Site) else Site(site)
    options = {"io": named.io, "output": named.output, "firing": named.firing}
    assert refused(bart(), Site(named.name, axes="batch pos d", **options), out)


@pytest.mark.parametrize("name", ["unembed.hook_in", "hook_unembed", "decoder_blocks.0.hook_out"])
@pytest.mark.parametrize("build", [bart, lambda: bridge_of(bart())], ids=["plain", "bridge"])
def test_hook_points_of_a_decoder_are_refused(out, build, name):
    assert refused(build(), name, out)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: model], ids=["parallel", "plain"])
def test_what_a_model_returns_of_its_encoder_is_not_refused(out, wrap):
    model = bart()
    site = Site("", output="encoder_last_hidden_state", axes="batch pos d")
    assert refusal(OptionError, wrap(model), tokens(2), site, out) == (
        "'' cannot be the name of a column; give the site an alias, as in {'resid': ...}"
    )
    extract(wrap(model), tokens(2), {"states": site}, out)
    with torch.no_grad():
        wanted = model.get_encoder()(tokens(2)).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(Read(out)["states"], wanted)


@pytest.mark.parametrize(
    "name", ["encoder_blocks.0.hook_out", "embed.hook_out", "embed_ln.hook_out"]
)
@pytest.mark.parametrize("build", [bart, lambda: bridge_of(bart())], ids=["plain", "bridge"])
def test_hook_points_of_an_encoder_are_rows(out, build, name):
    assert extract(build(), tokens(2), name, out).rows == 14


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_an_encoder_and_a_decoder_by_themselves_have_their_own_tokens(out, part):
    model = getattr(bart().model, part)
    assert extract(model, tokens(2), Site("layers.0", axes="batch pos d"), out).rows == 14


def test_a_decoder_only_model_of_that_kind_is_not_refused(out):
    config = transformers.BartConfig(
        d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=64, vocab_size=50
    )
    model = transformers.BartForCausalLM(config).eval()
    assert extract(model, tokens(2), Site("lm_head", axes="batch pos d"), out).rows == 14


class Translating(nn.Module):
    """A model of an encoder and a decoder that is nobody's."""

    def __init__(self):
        super().__init__()
        self.embed, self.encoder = nn.Embedding(50, 8), nn.Linear(8, 8)
        self.decoder = nn.Linear(8, 8)

    def forward(self, ids, decoder_input_ids=None):
        states = self.encoder(self.embed(ids))
        return self.decoder(self.embed(decoder_input_ids)) + states.mean(1, keepdim=True)


class Autoencoder(Translating):
    """Decodes what it encodes, of the same tokens."""

    def forward(self, ids):
        return self.decoder(self.encoder(self.embed(ids)))


def test_the_decoder_of_an_own_model_is_refused_where_it_has_tokens_of_its_own(out):
    batch = {"input_ids": tokens(2), "decoder_input_ids": tokens(2)}
    sites = [Site(name, axes="batch pos d") for name in ("encoder", "decoder")]
    message = refusal(OptionError, Translating(), [batch], sites[1], out)
    assert message.endswith(OF_DECODERS)
    assert extract(Translating(), [batch], sites[0], out).rows == 14
    assert extract(Autoencoder(), tokens(2), sites[1], out.with_name("auto.lance")).rows == 14


@pytest.mark.skipif(not HAS_T5, reason="its bridge does not run")
@pytest.mark.parametrize("name", ["unembed.hook_in", "lm_head"])
def test_logits_of_t5_are_refused(out, name):
    model = huggingface("T5ForConditionalGeneration")
    site = Site("lm_head", axes="batch pos d") if name == "lm_head" else name
    assert refused(model, site, out)


@pytest.mark.skipif(GENERATION != 3, reason="only TransformerLens 3 has it")
@pytest.mark.parametrize(
    "name", ["unembed.hook_in", "decoder.0.hook_resid_post", "decoder_final_ln.hook_normalized"]
)
def test_a_hooked_encoder_decoder_has_both_sides(out, name):
    from transformer_lens import HookedEncoderDecoder

    config = hooked_config(
        act_fn="relu",
        normalization_type="RMS",
        attention_dir="bidirectional",
        positional_embedding_type="relative_positional_bias",
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        decoder_start_token_id=0,
        use_attn_scale=False,
    )
    model = HookedEncoderDecoder(config).eval()
    for weight in model.parameters():  # which are made without values
        nn.init.normal_(weight, std=0.1)
    assert refused(model, name, out)
    batch = {"input_ids": tokens(2), "decoder_input": tokens(2, 3)}
    assert extract(model, [batch], "encoder.0.hook_resid_post", out).rows == 14
