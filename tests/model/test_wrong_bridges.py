"""TransformerLens' bridges are wrong where docs/known-wrong-bridges.md says that they are."""

import pytest
import torch
from models import GENERATION

if GENERATION < 4:
    pytest.skip("the architectures of TransformerLens 4 and later", allow_module_level=True)

import architectures
from architectures import WRONG, apart, bridge, inputs, plain, run
from grown import Matrix

_TURNED = ["blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_rot_k"]
_JOINT = ["blocks.0.attn.qkv.hook_in", "blocks.0.attn.qkv.hook_out"]
NEVER = {
    "Gemma4ForCausalLM": _TURNED,
    "GPTJForCausalLM": _TURNED,
    "NanoChatForCausalLM": _TURNED,
    "GPTNeoXForCausalLM": [*_TURNED, *_JOINT],
    "FalconForCausalLM": [*_TURNED, *_JOINT],
    "CodeGenForCausalLM": [*_TURNED, *_JOINT],
    "Phi3ForCausalLM": [*_TURNED, *_JOINT],
    "GPT2LMHeadModel": _JOINT,
    "BloomForCausalLM": _JOINT,
    "MptForCausalLM": _JOINT,
    "LlamaForCausalLM": ["rotary_emb.hook_out", "blocks.0.attn.hook_hidden_states"],
    "OpenAIGPTLMHeadModel": ["blocks.0.hook_resid_post", "blocks.1.hook_out", *_JOINT],
    "LEDForConditionalGeneration": [
        "encoder_blocks.0.attn.hook_pattern",
        "decoder_blocks.1.self_attn.hook_attn_scores",
        "decoder_blocks.1.cross_attn.hook_pattern",
    ],
    "LongT5ForConditionalGeneration": ["encoder_blocks.0.attn.hook_pattern", "hook_embed"],
    "T5ForConditionalGeneration": ["hook_embed"],
    "MT5ForConditionalGeneration": ["hook_embed"],
    "SwitchTransformersForConditionalGeneration": ["hook_embed"],
    "Qwen3NextForCausalLM": ["blocks.0.linear_attn.hook_q"],
    "Qwen3_5ForCausalLM": ["blocks.0.linear_attn.hook_v"],
}


def logits(model, given):
    output = run(model, given)
    return getattr(output, "logits", output)


@pytest.mark.parametrize("name", WRONG)
def test_hook_points_are_off(name):
    model, bridged = (Matrix(name, kind, alone=True) for kind in ("plain", "bridge"))
    expected = bridged.by_alias()
    sites = [site for site in model.translated if WRONG[name] in site and site in expected]
    pairs = [(model.fired[site][0], expected[site][0]) for site in sites]
    others = [one.numel() != other.numel() for one, other in pairs]
    assert any(others) or max(apart(one, other) for one, other in pairs) > 0.5


def test_logits_of_a_grouped_falcon_are_off():
    model, bridged = plain("FalconForCausalLM/grouped"), bridge("FalconForCausalLM/grouped")
    given = inputs(model)
    assert (logits(model, given) - logits(bridged, given)).abs().max() > 1


def test_a_bridge_of_openai_gpt_sees_what_comes_if_it_is_given_a_mask():
    model = bridge("OpenAIGPTLMHeadModel")
    given = inputs(model)
    other = given["input_ids"].clone()
    other[:, -1] += 1
    seen = {}
    for mask in ({}, {"attention_mask": torch.ones_like(other)}):
        first = [
            logits(model, {"input_ids": ids, **mask})[:, 0] for ids in (*given.values(), other)
        ]
        seen[len(mask)] = not torch.equal(*first)
    assert seen == {0: False, 1: True}


def test_rows_of_a_pattern_of_switch_transformers_do_not_sum_to_one():
    fired = Matrix("SwitchTransformersForConditionalGeneration", "bridge", alone=True).fired
    rows = fired["encoder_blocks.0.attn.hook_pattern"][0].sum(-1)
    assert rows.min() < 0
    assert rows.max() > 1


@pytest.mark.parametrize("name", NEVER)
def test_hook_points_never_fire(name):
    matrix = Matrix(name, "bridge", alone=True)
    assert set(NEVER[name]) <= matrix.model.hook_dict.keys()
    assert not set(NEVER[name]) & matrix.by_alias().keys()


@pytest.mark.parametrize(
    "name", sorted(architectures.NO_BRIDGE.keys() - architectures.NOT_BUILT.keys())
)
def test_what_is_listed_as_without_a_bridge_has_none(name):
    with pytest.raises((AttributeError, ImportError, NotImplementedError, RuntimeError)):
        bridge(name)
