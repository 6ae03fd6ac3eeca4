"""Heads, and joint projections that are divided into queries, keys and values."""

import copy
import types

import peft
import pytest
import torch
from models import GENERATION, OLD_CACHE, bridge_of, huggingface, plainly_hooked, tokens
from torch import nn
from torch._subclasses import FakeTensorMode

from actctx import HookNameError, capture, hook_names
from actctx._model.heads import Heads, joint_heads_of, labelled

pytestmark = pytest.mark.skipif(GENERATION < 3, reason="TransformerLens 2 has no adapters")
Q, K, V, Z = (f"blocks.0.attn.hook_{key}" for key in "qkvz")
ADAPTED = {
    "BloomForCausalLM": ["query_key_value"],
    "CodeGenForCausalLM": ["qkv_proj"],
    "FalconForCausalLM": ["query_key_value"],
    "GPT2LMHeadModel": ["c_attn", "c_proj", "c_fc"],
    "GPTBigCodeForCausalLM": ["c_attn"],
    "GPTNeoXForCausalLM": ["query_key_value", "dense", "dense_h_to_4h"],
    "LlamaForCausalLM": "all-linear",
    "Phi3ForCausalLM": ["qkv_proj"],
}


@pytest.mark.parametrize(
    "index",
    [
        torch.arange(8),
        torch.arange(8, 16),
        torch.tensor([0, 1, 2, 3, 12, 13, 14, 15]),
        torch.tensor([4, 5, 6, 7, 16, 17, 18, 19]),
        torch.tensor([8, 9, 10, 11, 16, 17, 18, 19]),
        torch.tensor([20, 21, 22, 23]),
        torch.tensor([3, 2, 1, 0]),
    ],
)
def test_any_division_of_a_joint_projection_is_read(index):
    joint = torch.randn(2, 5, 24)
    found = Heads(4, index)(joint)
    assert torch.equal(found, joint[..., index].unflatten(-1, (-1, 4)))


def _adapted(architecture):
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules=ADAPTED[architecture], init_lora_weights=False)
    return peft.get_peft_model(huggingface(architecture), config).eval()


@pytest.mark.filterwarnings("ignore")  # of PEFT
@pytest.mark.parametrize("architecture", ADAPTED)
def test_a_model_within_peft_is_captured_as_a_bridge_of_the_merged_weights(architecture):
    if architecture == "CodeGenForCausalLM" and not OLD_CACHE:
        pytest.skip("its bridge does not run with this transformers")
    whole = _adapted(architecture)
    expected = plainly_hooked(bridge_of(copy.deepcopy(whole).merge_and_unload()), tokens())
    model = whole.get_base_model()
    for run in (whole, model):
        with capture(model, "blocks.*.**.hook_*") as acts:
            run(tokens())
        assert {Q, K, V, Z, "blocks.1.hook_resid_post", "blocks.1.mlp.hook_post"} <= {
            name for key in acts for name in acts._columns[key].label.names
        }
        for name in acts:
            if name in expected:
                torch.testing.assert_close(acts[name], expected[name][0], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_a_model_within_peft_is_told_where_it_is():
    with pytest.raises(HookNameError, match=r"holds as 'base_model\.model'; capture from that"):
        capture(_adapted("LlamaForCausalLM"), "blocks.1.hook_resid_post")


@pytest.mark.parametrize("multi_query", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_grouped_heads_of_falcon_are_those_that_it_attends_with(groups, multi_query):
    options = {"num_kv_heads": groups, "multi_query": multi_query}
    model = huggingface("FalconForCausalLM", new_decoder_architecture=True, **options)
    joint = "transformer.h.0.self_attention.query_key_value"
    with capture(model, [joint, Q, K, V, Z, "blocks.0.attn.hook_pattern"]) as acts:
        model(tokens())
    grouped = acts[joint].unflatten(-1, (groups, 4 // groups + 2, 8))
    assert torch.equal(acts[Q], grouped[..., :-2, :].flatten(2, 3))
    assert torch.equal(acts[K], grouped[..., -2, :])
    assert torch.equal(acts[V], grouped[..., -1, :])
    values = acts[V].repeat_interleave(4 // groups, 2)
    mixed = torch.einsum("bhqk,bkhd->bqhd", acts["blocks.0.attn.hook_pattern"], values)
    torch.testing.assert_close(acts[Z], mixed)


def test_a_projection_that_computes_its_weights_is_divided():
    model, plain = huggingface("GPTNeoXForCausalLM"), huggingface("GPTNeoXForCausalLM")
    for layer in model.gpt_neox.layers:
        nn.utils.parametrizations.weight_norm(layer.attention.query_key_value)
    with capture(model, [Q, K, V]) as acts, capture(plain, [Q, K, V]) as expected:
        model(tokens())
        plain(tokens())
    for name in expected:
        torch.testing.assert_close(acts[name], expected[name])


def test_a_projection_without_a_bias_is_divided():
    model = huggingface("GPTNeoXForCausalLM", attention_bias=False)
    joint = "gpt_neox.layers.0.attention.query_key_value"
    with capture(model, [joint, V]) as acts:
        model(tokens())
    assert torch.equal(acts[V], acts[joint].unflatten(-1, (4, 3, 8))[..., 2, :])


def _refused(model, name):
    with pytest.raises(HookNameError) as caught:
        capture(model, name)
    return str(caught.value)


@pytest.mark.parametrize("name", [Q, "blocks.0.attn.k.hook_out", "blocks.*.attn.hook_v"])
def test_only_what_cannot_be_divided_is_refused(name):
    model = huggingface("GPTBigCodeForCausalLM", multi_query=False)
    said = _refused(model, name)
    assert said.startswith(
        f"no hook point matches {name!r}: TransformerLens' adapter cannot split "
        "'transformer.h.0.attn.c_attn' into queries, keys and values (AssertionError: "
    )
    assert said.endswith("); capture 'transformer.h.0.attn.c_attn', and split what it returns")
    with capture(model, ["blocks.0.hook_resid_post", Z, "transformer.h.0"]) as acts:
        model(tokens())
    assert torch.equal(acts["blocks.0.hook_resid_post"], acts["transformer.h.0"])
    assert acts[Z].shape == (3, 7, 4, 8)
    assert "closest: 'blocks.0.hook_resid_post'" in _refused(model, "blocks.0.hook_reisd_post")


class _Foreign(nn.Module):
    """What no adapter knows: a projection that says nothing of its sizes, and holds another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden)


def test_a_projection_of_unknown_sizes_is_not_divided():
    model = huggingface("Phi3ForCausalLM")
    attention = model.model.layers[0].self_attn
    attention.qkv_proj = _Foreign(attention.qkv_proj)
    assert "(AttributeError: '_Foreign' object has no attribute 'out_features')" in _refused(
        model, V
    )
    assert hook_names(model, Z) == [Z]


@pytest.mark.parametrize(
    "starts",
    [(0.5, 8, 16), (0, 0, 16), (0, 8, 20), (0, 8, float("nan"))],
    ids=["fractions", "twice", "beyond", "nan"],
)
def test_what_is_no_division_of_the_outputs_is_refused(starts):
    def split(attention):
        assert attention.qkv.weight.shape == (24, 8)
        parts = [nn.Linear(8, 8) for _ in starts]
        for part, start in zip(parts, starts, strict=True):
            part.weight.data = (start + torch.arange(8.0))[:, None].expand(8, 8)
        return parts

    attention = nn.Module()
    attention.qkv = nn.Linear(8, 24)
    component = types.SimpleNamespace(
        submodules={"qkv": types.SimpleNamespace(name="qkv")}, split_qkv_matrix=split
    )
    with pytest.raises(ValueError, match="what it gives does not divide the outputs"):
        labelled(component, attention)


def test_parts_that_are_no_whole_heads_are_refused():
    model = huggingface("CodeGenForCausalLM")
    attention = model.transformer.h[0].attn

    def sized(*widths):
        def split(_attention):
            starts = [0, widths[0], widths[0] + widths[1]]
            parts = [nn.Linear(1, width) for width in widths]
            for part, start in zip(parts, starts, strict=True):
                part.weight.data = start + torch.arange(len(part.weight))[:, None].float()
            return parts

        return types.SimpleNamespace(
            submodules={"qkv": types.SimpleNamespace(name="qkv_proj")}, split_qkv_matrix=split
        )

    whole = joint_heads_of(sized(32, 32, 32), attention, None)
    assert [heads.d_head for heads in whole.values()] == [8, 8, 8]
    assert joint_heads_of(sized(28, 34, 34), attention, None) == dict.fromkeys(
        "qkv", "28 features are not 4 heads of 8"
    )
    assert joint_heads_of(sized(32, 36, 28), attention, None)["k"] == (
        "36 features are not heads of 8"
    )


@pytest.mark.parametrize(
    "mode",
    [lambda: torch.device("meta"), torch.inference_mode, FakeTensorMode],
    ids=["meta", "inference", "fake"],
)
def test_a_joint_projection_is_divided_in_any_mode(mode):
    model = huggingface("GPTNeoXForCausalLM")
    joint = "gpt_neox.layers.0.attention.query_key_value"
    with mode():
        captured = capture(model, [joint, V], grad=True)
    with captured as acts:
        model(tokens())
    assert torch.equal(acts[V], acts[joint].unflatten(-1, (4, 3, 8))[..., 2, :])
