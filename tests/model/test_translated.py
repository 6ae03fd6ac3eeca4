"""TransformerLens' hook names on plain Hugging Face models, against bridges of the same weights."""

import copy
import functools
import gc
import subprocess
import sys
import types
import weakref
from contextlib import contextmanager

import pytest
import torch
import transformers
from jaxtyping import Float
from models import (
    ARCHITECTURES,
    GENERATION,
    HAS_T5,
    JOINT,
    OLD_CACHE,
    UNEVEN,
    Mlp,
    bridge,
    hooks_of,
    huggingface,
    plainly_hooked,
    shared,
    tokens,
)
from torch import Tensor, nn

from actctx import HookNameError, OutputError, Schema, Stopped, capture, hook_names, site

pytestmark = pytest.mark.skipif(GENERATION < 3, reason="TransformerLens 2 has no adapters")
WITHOUT_T5 = [*(name for name in ARCHITECTURES if not name.startswith("T5")), *JOINT]
# What the kernel of sdpa may round otherwise than eager attention, in float32.
TOLERANCE = {"eager": 1e-6, "sdpa": 1e-4}
EAGER_ONLY = {"BloomForCausalLM", "CodeGenForCausalLM", "Gemma2ForCausalLM"}
PATTERN = "blocks.0.attn.hook_pattern"


_built = functools.cache(huggingface)  # by the tests that leave a model as it was


@pytest.fixture(scope="module", params=WITHOUT_T5)
def architecture(request):
    return request.param


@functools.cache
def _of_a_bridge(architecture):
    if architecture == "CodeGenForCausalLM" and not OLD_CACHE:
        pytest.skip("its bridge does not run with this transformers")
    return plainly_hooked(shared(architecture), tokens())


def _shaped_as(found, expected):
    """Give the shape of a bridge's to what Hugging Face flattens or broadcasts."""
    if found.dim() == expected.dim() - 1:  # the MLP of OPT has a row a token
        return found.unflatten(0, expected.shape[:2])
    return found.expand_as(expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_name_is_captured_as_on_a_bridge(architecture, attention):
    if attention == "sdpa" and architecture in EAGER_ONLY:
        pytest.skip("Hugging Face has no other attention for it")
    expected = _of_a_bridge(architecture)
    model = _built(architecture, attention)
    before = hooks_of(model)
    with capture(model, "**.hook_*") as acts:
        model(tokens())
    assert hooks_of(model) == before
    assert len(acts) > 40
    for name in acts:
        if (
            GENERATION == 3
            and name.endswith(("mlp.hook_in", "mlp.hook_out"))
            and (name not in expected)
        ):
            continue  # an MLP that is no module of Hugging Face's fires on bridges from 4 on
        found = _shaped_as(acts[name], expected[name][0])
        torch.testing.assert_close(found, expected[name][0], atol=TOLERANCE[attention], rtol=1e-4)


@pytest.mark.skipif(GENERATION < 4, reason="their bridges came with TransformerLens 4")
@pytest.mark.parametrize("architecture", UNEVEN)
def test_what_layers_differ_in_is_captured_as_on_a_bridge(architecture):
    wanted = ["hook_embed", "hook_resid_post", "hook_pre", "hook_post", "gate.hook_out"]
    whole, model = bridge(architecture), huggingface(architecture)
    named = whole.hook_dict
    asked = [name for name in hook_names(model, "**.hook_*") if name.endswith(tuple(wanted))]
    flat = "blocks.1.mlp.hook_out"  # of Llama 4, whose sequences a bridge gives back
    asked = [name for name in asked if name in named and named[name].name != flat]
    with capture(model, asked) as acts:
        model(tokens())
    with capture(whole, asked) as expected:
        whole(tokens())
    assert {name.rpartition(".")[2] for name in asked} >= {"hook_embed", "hook_pre", "hook_post"}
    for name in asked:
        torch.testing.assert_close(acts[name], expected[name], atol=1e-5, rtol=1e-4)


def test_a_module_that_returns_no_pattern_unless_asked_says_so():
    model = huggingface("OpenAIGPTLMHeadModel")
    with (
        pytest.raises(OutputError) as caught,
        capture(model, PATTERN),
    ):
        model(tokens())
    assert str(caught.value) == (
        "'blocks.0.attn.hook_pattern' is looked for among what 'transformer.h.0.attn' returns, but "
        "of its tensors ((3, 7, 32)) none is an attention pattern, whose rows sum to 1; call the "
        "model with output_attentions=True"
    )
    with capture(model, PATTERN) as acts:
        model(tokens(), output_attentions=True)
    assert torch.equal(acts.tensor.sum(-1).round(decimals=4), torch.ones(3, 4, 7))


def test_names_and_aliases_are_those_of_a_bridge(architecture):
    point_of = {name: point.name for name, point in shared(architecture).hook_dict.items()}
    model = _built(architecture, "eager")
    names = hook_names(model, "**.hook_*")
    assert set(names) <= set(point_of)
    with capture(model, "**.hook_*") as acts:
        model(tokens())
    for name in names:
        assert acts[name] is acts[point_of[name]]


def test_what_is_missing_is_what_hugging_face_computes_inside(architecture):
    model = _built(architecture, "eager")
    names = set(hook_names(model, "**.hook_*"))
    for name in _of_a_bridge(architecture):
        if name not in names:
            why = "do not expose it|has other shapes or outputs than a bridge's"
            with pytest.raises(HookNameError, match=why):
                capture(model, name)


def test_heads_are_split_and_axes_named(architecture):
    class Heads(Schema):
        q: Float[Tensor, "batch pos head d_head"] = site("blocks.0.attn.hook_q")
        k: Float[Tensor, "batch pos kv_head d_head"] = site("blocks.0.attn.hook_k")
        v: Float[Tensor, "batch pos kv_head d_head"] = site("blocks.0.attn.hook_v")
        z: Float[Tensor, "batch pos head d_head"] = site("blocks.0.attn.hook_z")
        resid: Float[Tensor, "layer batch d_model"] = site(
            "blocks.*.hook_resid_post", slice={"pos": -1}
        )

    model = _built(architecture, "eager")
    with capture(model, Heads, stop=True) as acts:
        assert isinstance(model(tokens()), Stopped)
    assert acts.resid.shape == (2, 3, 32)


def test_a_stop_at_any_name_ends_the_forward_there(architecture):
    model = _built(architecture, "eager")
    with capture(model, "**.hook_*") as acts:
        model(tokens())
    expected = {name: acts[name] for name in acts}
    for name, tensor in expected.items():
        with capture(model, name, stop=True) as acts:
            assert isinstance(model(tokens()), Stopped)
        assert torch.equal(acts[name], tensor), name


@pytest.mark.skipif(not HAS_T5, reason="this TransformerLens cannot run T5")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_encoder_and_a_decoder_are_captured_as_on_a_bridge(attention):
    ids = tokens()
    whole = bridge("T5ForConditionalGeneration")
    expected = plainly_hooked(whole, ids, decoder_input=tokens(seed=1))
    model = huggingface("T5ForConditionalGeneration", attention=attention)
    with capture(model, "**.hook_*") as acts:
        model(ids, decoder_input_ids=tokens(seed=1))
    names = [name for name in acts if name in expected]
    assert len(names) > 100
    for name in names:
        wanted = expected[name][0]
        torch.testing.assert_close(
            acts[name], wanted, atol=max(1e-5, TOLERANCE[attention]), rtol=1e-4
        )
    assert acts.missing == ()
    # Encoder and decoder embed with modules of their own, on a bridge as well.
    assert expected.keys().isdisjoint({"embed.hook_in", "embed.hook_out"})


def test_only_the_part_of_a_joint_projection_lives_on():
    model = huggingface("GPT2LMHeadModel")
    with capture(model, "blocks.0.attn.hook_q", slice={"head": [1]}, stop=True) as acts:
        model(tokens())
    assert acts.tensor.shape == (3, 7, 1, 8)
    assert acts.tensor.untyped_storage().nbytes() == 3 * 7 * 8 * 4


def test_gradients_flow_through_the_heads():
    model, by_hand = huggingface("GPTNeoXForCausalLM"), huggingface("GPTNeoXForCausalLM")
    weights = [
        each.gpt_neox.layers[0].attention.query_key_value.weight for each in (model, by_hand)
    ]
    with capture(model, "blocks.0.attn.hook_k", grad=True) as acts:
        model(tokens())
    (acts.tensor**2).sum().backward()
    layer = by_hand.gpt_neox.layers[0]
    joint = layer.attention.query_key_value(
        layer.input_layernorm(by_hand.gpt_neox.embed_in(tokens()))
    )
    (joint.unflatten(-1, (4, 3, 8))[..., 1, :] ** 2).sum().backward()
    assert weights[0].grad.abs().sum() > 0
    torch.testing.assert_close(weights[0].grad, weights[1].grad)


def test_a_mask_keeps_real_tokens():
    model = huggingface("LlamaForCausalLM")
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, :3] = 0
    with capture(model, "blocks.1.hook_resid_post", mask="attention") as acts:
        model(tokens(), attention_mask=mask)
    with capture(model, "model.layers.1") as whole:
        model(tokens(), attention_mask=mask)
    assert torch.equal(acts.tensor, whole.tensor[mask.bool()])
    assert torch.equal(acts.positions("blocks.1.hook_resid_post"), mask.nonzero())


def test_module_names_come_first():
    model = huggingface("LlamaForCausalLM")
    assert "model.layers.0" in hook_names(model)
    assert hook_names(model, "blocks.0.hook_resid_*") == [
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_resid_mid",
        "blocks.0.hook_resid_post",
    ]
    with capture(model, lambda name: name.endswith("mlp")) as acts:
        model(tokens())
    assert list(acts) == ["model.layers.0.mlp", "model.layers.1.mlp"]


def _refused(model, name):
    with pytest.raises(HookNameError) as caught:
        capture(model, name)
    return str(caught.value)


def test_a_pattern_needs_eager_attention():
    model = huggingface("LlamaForCausalLM", attention="sdpa")
    for name in (PATTERN, "blocks.*.attn.hook_pattern"):
        assert _refused(model, name) == (
            f"no hook point matches {name!r}: the attention of this LlamaForCausalLM is 'sdpa', "
            "which does not compute patterns; load the model with attn_implementation='eager', or "
            "capture from a TransformerBridge of it"
        )


def test_what_hugging_face_keeps_to_itself_is_refused():
    model = huggingface("LlamaForCausalLM")
    assert _refused(model, "blocks.0.ln1.hook_scale") == (
        "no hook point matches 'blocks.0.ln1.hook_scale': Hugging Face's modules do not expose it; "
        "capture it from a TransformerBridge of the model"
    )


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM"])
def test_a_model_without_its_head_has_the_same_names(name):
    model = huggingface(name)
    headless = getattr(model, model.base_model_prefix)
    with capture(headless, "blocks.1.hook_resid_post") as acts:
        headless(tokens())
    with capture(model, "blocks.1.hook_resid_post") as expected:
        model(tokens())
    assert torch.equal(acts.tensor, expected.tensor)
    assert _refused(headless, "unembed.hook_out") == (
        "no hook point matches 'unembed.hook_out': a model without a head, as AutoModel loads it, "
        "has no unembedding; load it with one, as AutoModelForCausalLM does"
    )


def test_each_name_is_refused_for_its_own_reason():
    scales, model = ["blocks.0.ln1.hook_scale", "blocks.1.ln1.hook_scale"], "LlamaForCausalLM"
    said = _refused(huggingface(model, "sdpa"), [scales[0], PATTERN, scales[1]])
    assert said.startswith(f"no hook point matches {scales[0]!r}, {scales[1]!r}: Hugging ")
    assert f"; no hook point matches {PATTERN!r}: the attention of this {model} is 'sdpa'" in said


def test_a_model_without_an_adapter_is_refused():
    class Own(Mlp):
        config = transformers.ViTConfig()

    assert _refused(Own(), "blocks.0.hook_resid_post") == (
        "no hook point matches 'blocks.0.hook_resid_post': TransformerLens has no adapter for "
        "Own; give the names of its modules (see actctx.hook_names(model))"
    )


def test_a_model_that_its_adapter_fails_on_is_refused():
    class Own(Mlp):
        config = types.SimpleNamespace(model_type="llama")

    for name in ("blocks.0.hook_resid_post", "blocks.*.hook_reisd"):
        said = _refused(Own(), name)
        assert said.startswith(
            f"no hook point matches {name!r}: TransformerLens' adapter fails on this Own ("
        )
        assert said.endswith("); give the names of its modules (see actctx.hook_names(model))")
    assert hook_names(Own(), "**.hook_*") == []


@pytest.mark.skipif(GENERATION < 4, reason="the adapter refuses it since TransformerLens 4")
def test_what_an_adapter_refuses_is_said_as_it_says_it():
    config = transformers.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=2, vocab_size=50, max_position_embeddings=8
    )
    said = _refused(transformers.BartForConditionalGeneration(config), "unembed.hook_out")
    assert "only supports symmetric configs for now: encoder_layers=1, decoder_layers=2" in said


def test_a_wrong_hook_name_is_told_the_closest():
    assert _refused(huggingface("LlamaForCausalLM"), "blocks.0.hook_reisd_post") == (
        "no hook point matches 'blocks.0.hook_reisd_post'; closest: 'blocks.0.hook_resid_post', "
        "'blocks.1.hook_resid_post', 'blocks.0.hook_resid_pre' (see actctx.hook_names(model))"
    )


@pytest.mark.thorough
def test_transformer_lens_is_imported_only_for_its_names():
    code = (
        "import sys, transformers\n"
        "from actctx import capture\n"
        "config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, vocab_size=9,\n"
        "    num_hidden_layers=1, num_attention_heads=2)\n"
        "model = transformers.LlamaForCausalLM(config)\n"
        "capture(model, 'model.layers.0')\n"
        "assert 'transformer_lens' not in sys.modules\n"
        "capture(model, 'blocks.0.hook_resid_post')\n"
        "assert 'transformer_lens' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_module_of_ones_own_has_no_hook_names():
    assert "no module matches 'blocks.0.hook_resid_post'" in _refused(
        Mlp(), "blocks.0.hook_resid_post"
    )


@pytest.mark.parametrize("pattern", ["blocks.*.hook_resid_post", "*resid_post", "blocks.**.*post"])
def test_patterns_find_names_where_no_module_matches(pattern):
    model = huggingface("LlamaForCausalLM")
    resid = [f"blocks.{layer}.hook_resid_post" for layer in (0, 1)]
    assert set(resid) <= set(hook_names(model, pattern))
    with capture(model, pattern, stop=True) as acts:
        model(tokens())
    assert set(resid) <= set(acts)


def test_a_predicate_finds_names_where_it_accepts_no_module():
    model = huggingface("LlamaForCausalLM")
    with capture(model, lambda name: name.startswith("blocks.0.attn.hook_")) as acts:
        model(tokens())
    assert {"blocks.0.attn.hook_q", "blocks.0.attn.hook_z"} <= set(acts)


def test_a_module_that_holds_a_model_is_told_where_it_is():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = huggingface("LlamaForCausalLM")

    with pytest.raises(HookNameError) as caught:
        capture(Whole(), "blocks.1.hook_resid_post")
    assert str(caught.value) == (
        "no hook point matches 'blocks.1.hook_resid_post': it is a name in the Hugging Face model "
        "that this Whole holds as 'inner'; capture from that, as in "
        "capture(model.get_submodule('inner'), ...), and run the wrapper as before"
    )


def test_names_follow_what_was_changed_since_they_were_asked_for():
    model = huggingface("GPT2LMHeadModel", attention="sdpa")
    assert hook_names(model, "blocks.2.hook_resid_post") == []
    model.transformer.h.append(copy.deepcopy(model.transformer.h[1]))
    model.config.num_hidden_layers = 3
    model.transformer.h[1] = copy.deepcopy(model.transformer.h[0])
    with capture(model, "blocks.*.hook_resid_post") as acts, plainly_kept(model) as kept:
        model(tokens(), use_cache=False)
    assert [*acts] == [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    assert all(torch.equal(acts[name], kept[n]) for n, name in enumerate(acts))
    assert not hook_names(model, PATTERN)
    model.set_attn_implementation("eager")
    assert hook_names(model, PATTERN) == [PATTERN]


@contextmanager
def plainly_kept(model):
    kept = []
    hooks = [
        block.register_forward_hook(lambda _module, _args, output: kept.append(output.clone()))
        for block in model.transformer.h
    ]
    yield kept
    for hook in hooks:
        hook.remove()


def test_a_model_whose_names_were_asked_for_is_freed():
    model = huggingface("GPT2LMHeadModel", attention="sdpa")
    assert hook_names(model, "blocks.0.hook_resid_post")
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
