"""Bridges that are known to be wrong: a capture of them warns, and no other does."""

import importlib.metadata
import re
import warnings

import pytest
import torch
import transformers
from models import (
    ARCHITECTURES,
    GENERATION,
    OLD_CACHE,
    bridge,
    bridge_of,
    huggingface,
    plainly_hooked,
    tokens,
)

from actctx import Site, capture, captures
from actctx._model import known_faults

pytestmark = pytest.mark.skipif(GENERATION < 3, reason="TransformerLens 2 has no bridges")
RESID = "blocks.0.hook_out"


@pytest.fixture
def warned(recwarn):
    """What was warned of that is about TransformerLens."""
    return lambda: [str(each.message) for each in recwarn if "TransformerLens" in str(each.message)]


def falcon(**options):
    return huggingface("FalconForCausalLM", **options)


GROUPED = {"new_decoder_architecture": True, "multi_query": False, "num_kv_heads": 2}
FALCONS = [
    GROUPED,
    {**GROUPED, "num_kv_heads": None},
    {**GROUPED, "alibi": True},
    {**GROUPED, "num_kv_heads": 1},
    {"new_decoder_architecture": True, "num_kv_heads": 1},
    {"multi_query": False},
    {"multi_query": False, "alibi": True},
    {},
]


@pytest.mark.parametrize("options", FALCONS, ids=str)
def test_a_falcon_bridge_is_warned_of_where_its_logits_are_wrong(options, warned):
    model = falcon(**options)
    with torch.no_grad():
        expected = model(tokens()).logits
    wrapped = bridge_of(model)
    with capture(wrapped, RESID) as acts:
        logits = wrapped(tokens())
    assert len(acts) == 1
    is_wrong = not torch.allclose(logits, expected, atol=1e-4)
    assert [each.startswith("TransformerLens ") for each in warned()] == [True] * is_wrong


def test_the_warning_says_what_is_wrong_and_what_to_do():
    version = importlib.metadata.version("transformer_lens")
    message = (
        f"TransformerLens {version} splits the queries, keys and values of Falcon's new decoder "
        "wrongly if there are several key heads, so the bridge computes other values than the "
        "model, and captures are wrong; capture from the Hugging Face model itself"
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$") as told:
        capture(bridge_of(falcon(**GROUPED)), RESID)
    assert [each.filename for each in told] == [__file__]


def test_an_extraction_warns_once(tmp_path, warned):
    pytest.importorskip("lance")
    from actctx.extract import extract

    extract(bridge_of(falcon(**GROUPED)), tokens(6, 4), RESID, tmp_path / "a.lance", batch_size=2)
    assert len(warned()) == 1


def test_the_plain_model_is_not_warned_of(warned):
    capture(falcon(**GROUPED), "transformer.h.0")
    assert not warned()


def test_a_newer_transformer_lens_is_taken_to_be_mended(warned, monkeypatch):
    monkeypatch.setattr(known_faults, "version", lambda _: "4.4.0")
    capture(bridge_of(falcon(**GROUPED)), RESID)
    assert not warned()


def switch():
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2}
    experts = {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    config = transformers.SwitchTransformersConfig(
        **sizes, **experts, num_heads=4, vocab_size=50, decoder_start_token_id=0, pad_token_id=0
    )
    config.architectures = ["SwitchTransformersForConditionalGeneration"]
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return transformers.SwitchTransformersForConditionalGeneration(config).eval()


PATTERN = "encoder_blocks.0.attn.hook_pattern"


def test_a_pattern_of_switch_is_warned_of_and_is_none():
    model = bridge_of(switch())
    with (
        pytest.warns(UserWarning, match=f"^'{re.escape(PATTERN)}' is the position bias"),
        capture(model, PATTERN) as acts,
    ):
        model(tokens(2, 5), decoder_input_ids=tokens(2, 4))
    assert not torch.allclose(acts.tensor.sum(-1), torch.ones(()))


def test_the_pattern_of_switch_is_where_the_warning_says():
    model = switch()
    site = Site("encoder.block.0.layer.0.SelfAttention", output=2)
    with capture(model, site) as acts:
        model(input_ids=tokens(2, 5), decoder_input_ids=tokens(2, 4))
    assert torch.allclose(acts.tensor.sum(-1), torch.ones(()))


def test_other_sites_of_switch_are_not_warned_of(warned):
    capture(bridge_of(switch()), "encoder_blocks.0.hook_out")
    assert not warned()


def _given(model):
    """What a step of a generation is called with, but for its cache."""
    return {"decoder_input_ids": tokens(2, 1)} if hasattr(model, "decoder_blocks") else {}


CACHED = [name for name in ARCHITECTURES if name != "BertForMaskedLM"]


@pytest.mark.parametrize("architecture", [*CACHED, "FalconForCausalLM", "Phi3ForCausalLM"])
@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_a_lost_cache_is_warned_of_once_and_a_kept_one_never(architecture, warned):
    model = bridge(architecture).original_model
    given = _given(bridge(architecture))
    with torch.no_grad():
        cache = model(tokens(2, 5), use_cache=True, **given).past_key_values
    is_lost = cache.get_seq_length() == 0
    assert not (is_lost and OLD_CACHE)
    with capture(model, Site("", output="logits")):
        model(tokens(2, 5), **given)
        assert not warned()
        for _ in range(2):
            model(tokens(2, 1), past_key_values=cache, use_cache=True, **given)
    assert ["loses the KV cache" in each for each in warned()] == [True] * is_lost


@pytest.mark.skipif(OLD_CACHE, reason="no cache is lost")
def test_generating_with_a_lost_cache_is_warned_of_and_without_one_is_not():
    model = bridge("LlamaForCausalLM")
    options = {"max_new_tokens": 3, "do_sample": False, "verbose": False}

    @captures(RESID)
    def generated(model, **more):
        return model.generate(tokens(1, 4), **options, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right, _ = generated(model, use_past_kv_cache=False)
    with pytest.warns(UserWarning, match="install 'transformers<5.24', or generate without a"):
        wrong, _ = generated(model)
    assert not torch.equal(right, wrong)


def test_a_bridge_of_openai_gpt_that_is_given_a_mask_is_warned_of(ids):
    model = bridge("OpenAIGPTLMHeadModel")
    with capture(model, "blocks.0.hook_mlp_out"):
        model(ids)
    with capture(model, "blocks.0.hook_mlp_out"):
        with pytest.warns(UserWarning, match="attend to later ones"):
            model(ids, attention_mask=torch.ones_like(ids))
        model(ids, attention_mask=torch.ones_like(ids))  # once is enough


def test_rows_of_openai_gpt_are_those_of_sequences_that_run_alone(tmp_path):
    pytest.importorskip("lance")
    from actctx.dataset import ActivationDataset
    from actctx.extract import extract

    model, name = bridge("OpenAIGPTLMHeadModel"), "blocks.1.hook_mlp_out"
    texts = [tokens()[0, :length] for length in (3, 7, 5)]
    extract(model, [{"input_ids": each} for each in texts], name, tmp_path / "acts.lance")
    data = ActivationDataset(tmp_path / "acts.lance")
    for number, text in enumerate(texts):
        (alone,) = plainly_hooked(model, text[None])["blocks.1.mlp.hook_out"]
        rows = data.read(name)[data.read("sequence") == number]
        torch.testing.assert_close(rows, alone[0], atol=1e-5, rtol=1e-5)
