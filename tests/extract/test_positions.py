"""Inputs that are longer than a model has positions."""

import pytest
import torch
import transformers
from extracted import Read, refusal
from models import VOCAB, bart, bridge, huggingface, tiny_transformer, tokens
from torch import nn

from actctx import DataError, Site
from actctx.extract import extract

FIRST = "blocks.0.hook_resid_post"


def check_refused(model, ids, site, out, *, table, size):
    data = [ids[:, :8], ids]
    message = refusal(DataError, model, data, site, out)
    assert message == (
        f"from sequence {len(ids)} on, the input holds sequences of {ids.shape[1]} tokens, but "
        f"{table} has {size} positions; give shorter ones, or single sequences and context="
    )
    assert len(Read(out)) == 8 * len(ids)  # what ran before it


@pytest.mark.parametrize(
    ("architecture", "table", "size"),
    [
        ("GPT2LMHeadModel", "'transformer.wpe.weight'", 64),
        ("OPTForCausalLM", "'model.decoder.embed_positions.weight'", 66),
    ],
)
def test_batches_that_are_longer_than_a_table_are_refused(out, architecture, table, size):
    check_refused(huggingface(architecture), tokens(2, 70), FIRST, out, table=table, size=size)


def test_batches_that_are_longer_than_a_table_that_was_cut_are_refused(out):
    model = huggingface("BertForMaskedLM")
    message = refusal(DataError, model, [tokens(2, 70)], FIRST, out)
    assert "the input holds sequences of 70 tokens, but" in message
    assert " has 64 positions; give shorter ones" in message


def test_an_encoder_has_the_positions_of_its_table(out):
    site = Site("model.encoder.layers.0", axes="batch pos d")
    table = "'model.encoder.embed_positions.weight'"
    check_refused(bart(), tokens(2, 70), site, out, table=table, size=66)


def test_a_table_that_is_no_embedding_has_its_length(out):
    model, table = huggingface("CodeGenForCausalLM"), "'transformer.h.0.attn.embed_positions'"
    check_refused(model, tokens(2, 70), FIRST, out, table=table, size=64)


def test_models_of_transformer_lens_have_their_positions(out):
    message = refusal(DataError, tiny_transformer(), [tokens(2, 70)], FIRST, out)
    assert " has 64 positions; give shorter ones" in message


@pytest.mark.parametrize("build", [huggingface, bridge], ids=["plain", "bridge"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BloomForCausalLM"])
def test_models_without_a_table_read_on(out, architecture, build):
    assert extract(build(architecture), [tokens(2, 70)], FIRST, out).rows == 140


def test_a_table_that_grows_is_read_on(out):
    sizes = {"attention_heads": 4, "ffn_dim": 64, "num_layers": 1, "max_position_embeddings": 16}
    config = transformers.XGLMConfig(vocab_size=VOCAB, d_model=32, **sizes)
    model = transformers.XGLMModel(config).eval()
    assert extract(model, [tokens(2, 70)], Site("layers.0", axes="batch pos d"), out).rows == 140


class Own(nn.Module):
    def __init__(self, *, cut):
        super().__init__()
        self.embed, self.block = nn.Embedding(VOCAB, 8), nn.Identity()
        self.places, self.cut = nn.Parameter(torch.randn(16, 8)), cut

    def forward(self, ids, token_type_ids=None):
        count = ids.shape[1]
        places = self.places[:count] if self.cut else self.places[torch.arange(count)]
        types = 0 if token_type_ids is None else self.embed(token_type_ids)
        return self.block(self.embed(ids) + places + types)


BLOCK = Site("block", axes="batch pos d")


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize(
    "data", [[tokens(2, 20)], tokens(2, 20).tolist()], ids=["batch", "sequences"]
)
def test_an_own_model_says_no_limit_but_has_one(out, cut, data):
    assert refusal(DataError, Own(cut=cut), data, BLOCK, out) == (
        "from sequence 0 on, the input holds sequences of 20 tokens, but 'places' has 16 "
        "positions; give shorter ones, or single sequences and context="
    )
    assert extract(Own(cut=cut), tokens(2, 16), BLOCK, out).rows == 32


class Spread(nn.Module):
    """A module with weights, buffers and look-ups that look like tables which are too short."""

    def __init__(self):
        super().__init__()
        self.embed, self.block = nn.Embedding(VOCAB, 8), nn.Identity()
        self.scale = nn.Parameter(torch.ones(1, 1, 8))
        self.register_buffer("adjacent", torch.eye(8).to_sparse())

    def forward(self, ids):
        resid = self.embed(ids) * self.scale[:, : ids.shape[1]]
        last = resid[torch.ones_like(ids, dtype=torch.bool), torch.tensor([7])]
        return self.block(resid + last.view(*ids.shape, 1))


def test_what_torch_can_look_up_is_not_refused(out):
    assert extract(Spread(), [tokens(2, 5)], BLOCK, out).rows == 10


def test_numbers_that_are_no_positions_are_not_taken_for_them(out):
    ids = tokens(2, 5)
    ids[1, 1] = VOCAB
    assert refusal(DataError, Own(cut=True), [ids], BLOCK, out).startswith(
        f"from sequence 0 on, the input holds the token id {VOCAB}, but the model knows those"
    )
    batch = {"input_ids": tokens(2, 5), "token_type_ids": torch.full((2, 5), 60)}
    path = out.with_name("types.lance")
    assert refusal(DataError, Own(cut=True), [batch], BLOCK, path) == (
        "from sequence 0 on, the input holds 60 under 'token_type_ids', but the model knows "
        f"numbers from 0 to {VOCAB - 1}; give those"
    )
